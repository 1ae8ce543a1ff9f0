//! Man pages and the reference in docs/cli.md, made from the grammar so that they can't drift.

use clap::{Arg, Command};
use clap_mangen::Man;

use crate::args;

/// A man page for `pileus` and each of its commands: file name and content.
pub fn man_pages() -> Vec<(String, Vec<u8>)> {
    let root = built();
    let mut pages = Vec::new();
    let mut add = |command: &Command, name: &str| {
        let page = command.clone().name(name.to_owned());
        let mut bytes = Vec::new();
        // Writing to memory can't fail.
        if Man::new(page).render(&mut bytes).is_ok() {
            pages.push((format!("{name}.1"), bytes));
        }
    };
    add(&root, "pileus");
    for command in shown(&root) {
        let name = format!("pileus-{}", command.get_name());
        add(command, &name);
        for inner in shown(command).filter(|inner| inner.get_name() != "help") {
            add(inner, &format!("{name}-{}", inner.get_name()));
        }
    }
    pages
}

/// The reference of all commands, in markdown.
pub fn markdown() -> String {
    let root = built();
    let mut out = String::from(
        "<!-- Made by `pileus::docs::markdown`; UPDATE_DOCS=1 cargo test -p pileus rewrites it. -->\n\
         # The command line\n\n",
    );
    out.push_str(
        "`pileus [OPTIONS] COMMAND [ARGUMENTS]`; options may stand anywhere, `--` ends them.\n\n\
         | Exit code | Meaning |\n|---|---|\n\
         | 0 | it worked |\n\
         | 1 | the command line can't work |\n\
         | 2 | the command failed |\n\
         | 5 | the client's own `--timeout` was over |\n\
         | 130, 143 | ended by Ctrl-C, by SIGTERM |\n\
         | 255 | `exec`, `shell`: the way to the command broke; else they give the command's own code |\n\
         | 124, 125 | `run`: the command's time was over; pileus itself failed (else the command's own code) |\n\n\
         Called by the name `multipass` (a link to it) the program answers as Multipass 1.16 does: the same\n\
         commands, texts and shapes. What stands here is its behaviour as `pileus`.\n\n\
         Data goes to standard output, all else to standard error. Progress is drawn only if standard\n\
         error is a terminal. `NO_COLOR` is honoured.\n\n",
    );
    out.push_str("## Global options\n\n");
    table(
        &mut out,
        root.get_arguments().filter(|arg| !arg.is_hide_set()),
    );
    for command in shown(&root) {
        section(&mut out, command, command.get_name());
    }
    out
}

fn built() -> Command {
    let mut root = args::command();
    root.build();
    root
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|c| !c.is_hide_set())
}

fn section(out: &mut String, command: &Command, name: &str) {
    let level = if name.contains(' ') { "###" } else { "##" };
    out.push_str(&format!("{level} pileus {name}\n\n"));
    if let Some(about) = command.get_long_about().or(command.get_about()) {
        out.push_str(&format!("{about}\n\n"));
    }
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    out.push_str(&format!("```\n{usage}\n```\n\n"));
    let aliases: Vec<&str> = command.get_visible_aliases().collect();
    if !aliases.is_empty() {
        out.push_str(&format!("Also: `{}`\n\n", aliases.join("`, `")));
    }
    let own = |arg: &&Arg| !arg.is_hide_set() && !arg.is_global_set() && arg.get_id() != "help";
    if command.get_arguments().any(|arg| own(&arg)) {
        table(out, command.get_arguments().filter(own));
    }
    if let Some(after) = command.get_after_help() {
        out.push_str(&format!("```\n{after}\n```\n\n"));
    }
    for inner in shown(command) {
        section(out, inner, &format!("{name} {}", inner.get_name()));
    }
}

fn table<'a>(out: &mut String, args: impl Iterator<Item = &'a Arg>) {
    out.push_str("| Argument | Meaning |\n|---|---|\n");
    for arg in args {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let form = cell(&form(arg));
        out.push_str(&format!("| `{form}` | {} |\n", cell(&help)));
    }
    out.push('\n');
}

/// How an argument is written: `-c, --cpus <N>`.
fn form(arg: &Arg) -> String {
    let values: Vec<String> = arg
        .get_value_names()
        .unwrap_or_default()
        .iter()
        .map(|name| format!("<{name}>"))
        .collect();
    if arg.is_positional() {
        return values.join(" ");
    }
    let short = arg.get_short().map(|c| format!("-{c}"));
    let long = arg.get_long().map(|l| format!("--{l}"));
    let mut text = [short, long]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ");
    if arg.get_action().takes_values() {
        text = format!("{text} {}", values.join(" "));
    }
    text
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
        let text = markdown();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            kept == text,
            "docs/cli.md is not current: run UPDATE_DOCS=1 cargo test -p pileus docs"
        );
    }

    #[test]
    fn every_command_has_a_man_page_and_a_sentence() {
        let pages = man_pages();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"pileus.1") && names.contains(&"pileus-launch.1"));
        for command in shown(&built()) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                assert!(arg.get_help().is_some(), "{} {arg}", command.get_name());
            }
        }
    }
}
