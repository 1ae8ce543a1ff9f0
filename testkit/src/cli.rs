//! The CLI as a test sees it: what it printed where, and how it ended.

use std::process::ExitStatus;

#[derive(Debug, Clone)]
pub struct Output {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Output {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Must have worked, with nothing on stderr; gives stdout.
    #[track_caller]
    pub fn ok(&self) -> String {
        assert!(
            self.status.success() && self.stderr.is_empty(),
            "{} ended with {}\nstdout: {}\nstderr: {}",
            self.what,
            self.status,
            self.text(),
            self.stderr
        );
        self.text()
    }

    /// Must have worked; what it said on stderr is no matter.
    #[track_caller]
    pub fn ok_with_words(&self) -> String {
        assert!(
            self.status.success(),
            "{} ended with {}\nstderr: {}",
            self.what,
            self.status,
            self.stderr
        );
        self.text()
    }

    /// Must have failed with this code; gives stderr.
    #[track_caller]
    pub fn fails_with(&self, code: i32) -> String {
        assert_eq!(
            self.code(),
            code,
            "{}\nstdout: {}\nstderr: {}",
            self.what,
            self.text(),
            self.stderr
        );
        self.stderr.clone()
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|err| panic!("{}: {err}\n{text}", self.what))
    }
}
