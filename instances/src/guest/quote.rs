//! Shell command lines from argument vectors. Every argument is quoted by itself, so what the user
//! typed arrives as one word whatever is in it; the line then runs in the guest's login shell.

use pileus_base::{Code, Error, Result};

/// One word for a POSIX shell.
pub fn word(arg: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:=@%+,".contains(&b);
    // `~` and a leading `=` (zsh) mean something at the beginning of a word.
    if !arg.is_empty() && arg.bytes().all(plain) && !arg.starts_with('=') {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', r"'\''"))
}

/// The words of a command in one line.
pub fn words<S: AsRef<str>>(argv: &[S]) -> String {
    let quoted: Vec<String> = argv.iter().map(|a| word(a.as_ref())).collect();
    quoted.join(" ")
}

/// The line that runs `argv` in `cwd` as the login user. `sudo` drops no directory here, but the
/// login user may lack the right to enter `cwd`: so with `sudo` as the command, root enters it and
/// then runs the very same line as the user would.
pub fn command_line(argv: &[String], cwd: Option<&str>, user: &str) -> Result<String> {
    let bad = |what: &str| Error::new(Code::InvalidArgument, format!("{what} holds a NUL byte"));
    if argv.iter().any(|a| a.contains('\0')) {
        return Err(bad("The command"));
    }
    let line = words(argv);
    let Some(cwd) = cwd else {
        return Ok(line);
    };
    if cwd.contains('\0') {
        return Err(bad("The working directory"));
    }
    // `--` would keep a directory that begins with a hyphen from being an option.
    let dir = match cwd.starts_with('-') {
        true => word(&format!("./{cwd}")),
        false => word(cwd),
    };
    if argv.first().is_some_and(|a| a == "sudo") {
        let inner = format!("cd {dir} && sudo -u {} {line}", word(user));
        return Ok(format!("sudo sh -c {}", word(&inner)));
    }
    Ok(format!("cd {dir} && {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn sh(line: &str) -> Vec<u8> {
        Command::new("sh")
            .args(["-c", line])
            .output()
            .unwrap()
            .stdout
    }

    #[test]
    fn a_real_shell_gives_every_argument_back() {
        for arg in [
            "",
            " ",
            "plain",
            "two words",
            "it's",
            "'",
            "''",
            "\"",
            "$HOME",
            "`id`",
            "$(id)",
            "a\\b",
            "\\",
            "a\nb",
            "tab\there",
            "*",
            "?",
            "[a]",
            "{a,b}",
            "~",
            "~root",
            "#x",
            "!x",
            "a;b",
            "a&b",
            "a|b",
            "<a",
            ">a",
            "a=b",
            "=a",
            "-n",
            "--",
            "ä€",
            "\u{7f}",
            "\x01",
            "a'b\"c$d`e\\f",
        ] {
            let line = format!("printf '%s' {}", word(arg));
            assert_eq!(sh(&line), arg.as_bytes(), "{arg:?} as {line}");
        }
    }

    #[test]
    fn lines_of_the_reference() {
        let argv = |text: &str| text.split('|').map(String::from).collect::<Vec<_>>();
        let line = |text: &str, cwd| command_line(&argv(text), cwd, "ubuntu").unwrap();
        assert_eq!(line("echo|a b", None), "echo 'a b'");
        assert_eq!(line("exit|33", None), "exit 33");
        assert_eq!(line("ls", Some("/a b")), "cd '/a b' && ls");
        assert_eq!(
            line("sudo|id|-u", Some("/root")),
            "sudo sh -c 'cd /root && sudo -u ubuntu sudo id -u'"
        );
        assert_eq!(line("sudo|id", None), "sudo id");
        assert_eq!(line("ls", Some("-x")), "cd ./-x && ls");
    }

    #[test]
    fn the_directory_is_entered_by_a_real_shell() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("it's a $dir");
        std::fs::create_dir(&odd).unwrap();
        let line = command_line(&["pwd".into()], odd.to_str(), "ubuntu").unwrap();
        assert_eq!(
            String::from_utf8(sh(&line)).unwrap().trim_end(),
            odd.to_str().unwrap()
        );
    }

    #[test]
    fn nul_is_refused() {
        for (argv, cwd) in [("a\0b", None), ("a", Some("b\0"))] {
            let err = command_line(&[argv.to_owned()], cwd, "u").unwrap_err();
            assert_eq!(err.code, Code::InvalidArgument);
        }
    }
}
