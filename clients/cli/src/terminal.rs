//! The terminal: raw mode with a sure way back, its size, and text that can't drive it.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode of the terminal at standard input, until this is dropped (also by a panic).
pub(crate) struct RawMode {
    terminal: File,
    before: Termios,
}

impl RawMode {
    /// `None` if standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let terminal = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let before = termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// Columns and rows of the terminal at standard output.
pub(crate) fn size() -> (u16, u16) {
    match termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
        _ => (80, 24),
    }
}

/// Writes a line for a person to standard error. Where that is gone, nothing is left to do.
pub(crate) fn tell(text: &str) {
    let line = format!("{}\n", harmless(text));
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Text without escape sequences and control characters other than newline and tab.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if !text
        .chars()
        .any(|c| c.is_control() && c != '\n' && c != '\t')
    {
        return Cow::Borrowed(text);
    }
    let mut filter = Harmless::default();
    let mut out = filter.pass(text.as_bytes());
    out.push_str(&filter.rest());
    Cow::Owned(out)
}

/// Takes a stream of bytes from a guest and gives the text of it that is safe to show, whatever
/// the cutting.
#[derive(Default)]
pub(crate) struct Harmless {
    /// The beginning of a character whose end has not come yet.
    part: Vec<u8>,
    state: State,
}

#[derive(Default, Clone, Copy)]
enum State {
    #[default]
    Text,
    Escape,
    /// After `ESC [`, until a final character.
    Csi,
    /// After `ESC ]` and its like, until BEL or `ESC \`.
    Command,
    CommandEscape,
}

impl Harmless {
    pub fn pass(&mut self, bytes: &[u8]) -> String {
        self.part.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.part);
        let mut out = String::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.filter(text, &mut out);
                    break;
                }
                Err(err) => {
                    let (valid, after) = rest.split_at(err.valid_up_to());
                    self.filter(&String::from_utf8_lossy(valid), &mut out);
                    let Some(len) = err.error_len() else {
                        self.part = after.to_vec();
                        break;
                    };
                    self.filter("\u{fffd}", &mut out);
                    rest = &after[len..];
                }
            }
        }
        out
    }

    /// What was left unfinished at the end.
    pub fn rest(&mut self) -> String {
        if std::mem::take(&mut self.part).is_empty() {
            return String::new();
        }
        "\u{fffd}".to_owned()
    }

    fn filter(&mut self, text: &str, out: &mut String) {
        for c in text.chars() {
            self.state = match (self.state, c) {
                (State::Text | State::Escape | State::Csi, '\x1b') => State::Escape,
                (State::Text, '\u{9b}') | (State::Escape, '[') => State::Csi,
                (State::Text, '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}')
                | (State::Escape, ']' | 'P' | 'X' | '^' | '_') => State::Command,
                (State::Text, c) => {
                    if !c.is_control() || c == '\n' || c == '\t' {
                        out.push(c);
                    }
                    State::Text
                }
                // Intermediate characters of a two-character sequence.
                (State::Escape, ' '..='/') => State::Escape,
                (State::Csi, ' '..='?') => State::Csi,
                // A line's end ends any sequence, so that a broken one can't hide the rest.
                (_, '\n') => {
                    out.push('\n');
                    State::Text
                }
                (State::Command, '\x1b') => State::CommandEscape,
                (State::Command, '\x07' | '\u{9c}')
                | (State::CommandEscape | State::Escape | State::Csi, _) => State::Text,
                (State::Command, _) => State::Command,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_vanish_and_text_stays() {
        for (text, shown) in [
            ("plain\ttext\n", "plain\ttext\n"),
            ("[\x1b[0;32m  OK  \x1b[0m] up\r\n", "[  OK  ] up\n"),
            ("a\x1b]0;title\x07b", "ab"),
            ("a\x1b]52;c;AAAA\x1b\\b", "ab"),
            ("a\u{9b}31mb\u{85}c", "abc"),
            ("a\x1b(Bb\x1bcc\x07\x08", "abc"),
            ("broken \x1b]0;never ended\nnext", "broken \nnext"),
            ("grün ✓", "grün ✓"),
        ] {
            assert_eq!(harmless(text), shown, "{text:?}");
        }
    }

    #[test]
    fn cutting_changes_nothing() {
        let bytes = ["ü\x1b[31mrot\x1b[0m \x1b]0;t\x07✓".as_bytes(), b"\xff"].concat();
        let mut all = Harmless::default();
        let mut whole = all.pass(&bytes);
        whole.push_str(&all.rest());
        for cut in 0..bytes.len() {
            let mut filter = Harmless::default();
            let mut out = filter.pass(&bytes[..cut]);
            out.push_str(&filter.pass(&bytes[cut..]));
            out.push_str(&filter.rest());
            assert_eq!(out, whole, "{cut}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_marked() {
        let mut filter = Harmless::default();
        assert_eq!(filter.pass(b"a\xffb\xc3"), "a\u{fffd}b");
        assert_eq!(filter.rest(), "\u{fffd}");
    }
}
