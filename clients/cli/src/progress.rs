//! What long work is doing, on a terminal's standard error: a line for each operation with its
//! phase, bytes and elapsed time. Off a terminal nothing is drawn.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use pileus_api::{Operation, OperationEvent, Phase};

use crate::terminal::{harmless, tell};

const SPINNER: &str = "{spinner} {wide_msg} {elapsed}";
const BAR: &str = "{spinner} {wide_msg} [{bar:24}] {bytes}/{total_bytes} {elapsed}";
/// Of work that has no bytes to count.
const PERCENT: &str = "{spinner} {wide_msg} [{bar:24}] {percent:>3}% {elapsed}";

#[derive(Clone)]
pub(crate) struct Progress {
    lines: MultiProgress,
    visible: bool,
    /// Whether the work's log lines are shown.
    logs: bool,
    /// Whether warnings are kept back: scripts of Multipass take anything on standard error for a
    /// failure.
    silent: bool,
}

impl Progress {
    pub fn new(visible: bool, logs: bool) -> Self {
        let target = if visible {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            lines: MultiProgress::with_draw_target(target),
            visible,
            logs,
            silent: false,
        }
    }

    /// Without warnings.
    #[must_use]
    pub fn silent(mut self, silent: bool) -> Self {
        self.silent = silent;
        self
    }

    /// A line for the work on one instance or image; it goes away when dropped.
    pub fn line(&self, target: &str) -> Line {
        let bar = if self.visible {
            let bar = self.lines.add(ProgressBar::new_spinner());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        } else {
            ProgressBar::hidden()
        };
        let line = Line {
            progress: self.clone(),
            bar,
            target: target.to_owned(),
            phase: None,
            warned: Vec::new(),
            silent: self.silent,
        };
        line.spin();
        line
    }

    /// A whole line of text above what is drawn.
    pub fn say(&self, text: &str) {
        self.lines.suspend(|| tell(text));
    }
}

pub(crate) struct Line {
    progress: Progress,
    bar: ProgressBar,
    target: String,
    phase: Option<Phase>,
    /// Warnings that were shown.
    warned: Vec<String>,
    silent: bool,
}

impl Line {
    #[must_use]
    pub fn without_warnings(mut self) -> Self {
        self.silent = true;
        self
    }

    /// Says whole lines while the work goes on.
    pub fn speaker(&self) -> Progress {
        self.progress.clone()
    }

    pub fn message(&self, text: &str) {
        self.bar.set_message(harmless(text).into_owned());
    }

    pub fn event(&mut self, event: &OperationEvent) {
        match event {
            OperationEvent::Phase { phase } => {
                self.phase = Some(*phase);
                self.spin();
                self.message(&phase_text(*phase, &self.target));
            }
            OperationEvent::Progress { progress } => {
                if let Some(total) = progress.total {
                    if self.bar.length() != Some(total) {
                        self.style(match self.phase {
                            Some(Phase::BuildingImage | Phase::Halted | Phase::Restoring) => {
                                PERCENT
                            }
                            _ => BAR,
                        });
                        self.bar.set_length(total);
                    }
                    self.bar.set_position(progress.done);
                }
            }
            OperationEvent::Log { line } => {
                if self.progress.logs {
                    self.progress.say(line);
                } else if let Some(phase) = self.phase {
                    let line = line.lines().next().unwrap_or_default();
                    self.message(&format!("{}: {line}", phase_text(phase, &self.target)));
                }
            }
            OperationEvent::Warning { line } => self.warn(line),
            OperationEvent::Done { .. } => self.bar.finish_and_clear(),
        }
    }

    /// Ends the line, and tells of warnings that did not come as events (they may have been before
    /// the first one).
    pub fn end(&mut self, operation: &Operation) {
        self.bar.finish_and_clear();
        for warning in &operation.warnings {
            self.warn(warning);
        }
    }

    /// Says (with `-v`) what its phases took, and for how long the guest stood still.
    pub fn times(&self, operation: &Operation) {
        if self.progress.logs {
            for text in times(&self.target, operation) {
                self.progress.say(&text);
            }
        }
    }

    fn warn(&mut self, warning: &str) {
        if self.silent || self.warned.iter().any(|told| told == warning) {
            return;
        }
        self.warned.push(warning.to_owned());
        self.progress.say(&format!("warning: {warning}"));
    }

    fn spin(&self) {
        self.bar.unset_length();
        self.style(SPINNER);
    }

    fn style(&self, template: &str) {
        // The templates are constants; a bad one would only leave the default style.
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar
                .set_style(style.tick_chars("|/-\\ ").progress_chars("=> "));
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn times(target: &str, operation: &Operation) -> Vec<String> {
    let seconds =
        |milliseconds: u64| format!("{}.{:03}s", milliseconds / 1000, milliseconds % 1000);
    let (halted, others): (Vec<_>, Vec<_>) = operation
        .phases
        .iter()
        .partition(|time| time.phase == Phase::Halted);
    let others: Vec<_> = others
        .iter()
        .map(|time| format!("{} {}", time.phase.as_str(), seconds(time.milliseconds)))
        .collect();
    let mut lines = Vec::new();
    if !others.is_empty() {
        lines.push(format!("{target}: {}", others.join(", ")));
    }
    lines.extend(
        halted
            .iter()
            .map(|time| stood_still(target, time.milliseconds)),
    );
    lines
}

/// How long a guest did nothing.
pub(crate) fn stood_still(target: &str, milliseconds: u64) -> String {
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    format!("{target} stood still for {seconds}.{rest:03}s")
}

/// What a person reads while a phase lasts.
pub(crate) fn phase_text(phase: Phase, target: &str) -> String {
    match phase {
        Phase::Queued => format!("Waiting for other work on {target}"),
        Phase::ResolvingImage => "Looking for the image".to_owned(),
        Phase::BuildingImage => "Building the image".to_owned(),
        Phase::RetrievingImage => "Retrieving image".to_owned(),
        Phase::VerifyingImage => "Verifying image".to_owned(),
        Phase::PreparingImage => "Preparing image".to_owned(),
        Phase::Configuring => format!("Configuring {target}"),
        Phase::Starting => format!("Starting {target}"),
        Phase::Booting => format!("Waiting for {target} to boot"),
        Phase::Initializing => format!("Waiting for initialization of {target} to complete"),
        Phase::Restoring => format!("Restoring {target}"),
        Phase::Identifying => format!("Giving {target} its identity"),
        Phase::Quieting => format!("Bringing {target} to a quiet point"),
        Phase::Saving => format!("Saving {target}"),
        Phase::Halted => format!("Forking {target}"),
        Phase::Stopping => format!("Stopping {target}"),
        Phase::Suspending => format!("Suspending {target}"),
        Phase::Resuming => format!("Resuming {target}"),
        Phase::Snapshotting => format!("Taking a snapshot of {target}"),
        Phase::Archiving => format!("Archiving {target}"),
        Phase::Provisioning => format!("Carrying out the steps of {target}"),
        Phase::Cleaning => format!("Cleaning up in {target}"),
        Phase::Flattening => "Making one disk".to_owned(),
        Phase::Deleting => format!("Deleting {target}"),
    }
}
