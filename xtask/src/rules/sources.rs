//! Rules for single source files: each opens with `//!`, stays readable in size, and holds no
//! example code that nothing compiles.

use std::fs;

use anyhow::{Context, Result};

/// Lines without the tests at the end of the file.
const REPORTED: usize = 400;
const ALLOWED: usize = 700;

/// Files that may be longer, each with the reason.
const LONGER: &[(&str, &str)] = &[];

pub fn check(files: &[String]) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for path in files.iter().filter(|path| path.ends_with(".rs")) {
        let text = fs::read_to_string(path).with_context(|| format!("{path} can't be read"))?;
        broken.extend(check_one(path, &text));
    }
    for (path, _) in LONGER {
        if !files.iter().any(|file| file == path) {
            broken.push(format!(
                "xtask/src/rules/sources.rs excuses {path}, which is gone"
            ));
        }
    }
    Ok(broken)
}

fn check_one(path: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if !text.starts_with("//!") {
        broken.push(format!(
            "{path} doesn't open with `//!`: what it is for, where the next step is"
        ));
    }
    let lines = lines_without_tests(text);
    let excused = LONGER.iter().any(|(longer, _)| *longer == path);
    if lines > ALLOWED && !excused {
        broken.push(format!(
            "{path} has {lines} lines without its tests ({ALLOWED} are allowed): split it"
        ));
    } else if lines > REPORTED && !excused {
        eprintln!("    note: {path} has {lines} lines without its tests (aim at {REPORTED})");
    }
    if let Some(line) = untested_example(text) {
        broken.push(format!(
            "{path}:{line} begins example code in a comment, which no test compiles: name the \
             block's language (```text) or make it a test"
        ));
    }
    broken
}

/// Tests lie at the end, in a module of their own.
fn lines_without_tests(text: &str) -> usize {
    let mut lines = 0;
    let mut attribute = false;
    for line in text.lines() {
        if attribute && line.starts_with("mod ") && line.ends_with('{') {
            return lines - 1;
        }
        attribute = line == "#[cfg(test)]";
        lines += 1;
    }
    lines
}

/// The line of a doc comment's code block that rustdoc would take for Rust. Doc tests are not run
/// (each would be linked by itself), so there are none.
fn untested_example(text: &str) -> Option<usize> {
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        let Some(comment) = line.trim_start().strip_prefix("//") else {
            inside = false;
            continue;
        };
        let Some(comment) = comment.strip_prefix(['/', '!']) else {
            continue;
        };
        if let Some(language) = comment.trim_start().strip_prefix("```") {
            if !inside && matches!(language.trim(), "" | "rust" | "no_run" | "should_panic") {
                return Some(number + 1);
            }
            inside = !inside;
        }
    }
    None
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_file_without_an_opening_is_found() {
        assert_eq!(
            check_one("a.rs", "//! For this.\nfn a() {}\n"),
            Vec::<String>::new()
        );
        assert_eq!(check_one("a.rs", "fn a() {}\n").len(), 1);
        assert_eq!(check_one("a.rs", "").len(), 1);
    }

    #[test]
    fn a_long_file_is_found_and_its_tests_do_not_count() {
        let code = "//! Long.\n".to_string() + &"fn a() {}\n".repeat(ALLOWED);
        assert_eq!(check_one("a.rs", &code).len(), 1);
        let tests = "fn t() {}\n".repeat(ALLOWED);
        let tested = format!("//! Short.\nfn a() {{}}\n#[cfg(test)]\nmod tests {{\n{tests}}}\n");
        assert_eq!(lines_without_tests(&tested), 2);
        assert_eq!(check_one("a.rs", &tested), Vec::<String>::new());
    }

    #[test]
    fn only_examples_that_pass_for_rust_are_found() {
        let drawing = "//! A.\n//! ```text\n//! a -> b\n//! ```\nfn a() {}\n";
        assert_eq!(untested_example(drawing), None);
        let example = "//! A.\n/// Does.\n/// ```\n/// a();\n/// ```\nfn a() {}\n";
        assert_eq!(untested_example(example), Some(3));
    }
}
