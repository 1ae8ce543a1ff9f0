//! What a transfer tells while it goes on, and what it must take back if it is interrupted: files that
//! are not complete lie beside their place under another name until they are.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fs::AtFlags;
use tokio::task::JoinSet;

use crate::sftp::session::Sftp;
use crate::terminal::{harmless, tell};

/// Files that are copied at once, so that many small ones don't wait for a round trip each.
const AT_ONCE: usize = 16;
/// How long the guest has to remove what was begun.
const GRACE: Duration = Duration::from_secs(3);

pub(super) struct Report {
    bar: ProgressBar,
    /// Stands before each error.
    prefix: &'static str,
    errors: AtomicU64,
    /// The reader of what is written is gone.
    closed: AtomicBool,
    next: AtomicU64,
    begun: Mutex<BTreeMap<u64, Partial>>,
}

/// A file that is not complete yet.
enum Partial {
    Host(Arc<OwnedFd>, OsString),
    Guest(Arc<Sftp>, Vec<u8>),
}

/// Marks a partial file as done with when it is dropped after [`Begun::over`].
pub(super) struct Begun {
    report: Arc<Report>,
    number: u64,
}

impl Begun {
    /// It is complete, or removed already.
    pub fn over(self) {
        self.report.partials().remove(&self.number);
    }
}

impl Report {
    pub fn new(visible: bool, prefix: &'static str) -> Arc<Self> {
        let bar = match visible {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
        };
        // A constant; a bad one would only leave the default.
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {wide_msg} {bytes} {bytes_per_sec} {elapsed}")
        {
            bar.set_style(style.tick_chars("|/-\\ "));
        }
        if visible {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Arc::new(Self {
            bar,
            prefix,
            errors: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            next: AtomicU64::new(0),
            begun: Mutex::default(),
        })
    }

    pub fn working_on(&self, name: &str) {
        self.bar.set_message(harmless(name).into_owned());
    }

    pub fn moved(&self, bytes: usize) {
        self.bar.inc(bytes as u64);
    }

    /// Tells an error; the transfer goes on with what else is to be done.
    pub fn fail(&self, text: &str) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        self.bar
            .suspend(|| tell(&format!("{} {text}", self.prefix)));
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub fn failed(&self) -> bool {
        self.errors.load(Ordering::Relaxed) > 0
    }

    #[cfg(test)]
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    pub fn end(&self) {
        self.bar.finish_and_clear();
    }

    fn partials(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Partial>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name beside another one for a file that is not complete.
    pub fn partial_name(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!(".pileus-transfer-{}-{number}", std::process::id())
    }

    fn begin(self: &Arc<Self>, partial: Partial) -> Begun {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.partials().insert(number, partial);
        Begun {
            report: self.clone(),
            number,
        }
    }

    pub fn begin_on_host(self: &Arc<Self>, folder: &Arc<OwnedFd>, name: &str) -> Begun {
        self.begin(Partial::Host(folder.clone(), name.into()))
    }

    pub fn begin_in_guest(self: &Arc<Self>, sftp: &Arc<Sftp>, path: &[u8]) -> Begun {
        self.begin(Partial::Guest(sftp.clone(), path.to_vec()))
    }

    /// Removes what was begun and is not complete; tells what could not be removed.
    pub async fn clear(&self) {
        let begun = std::mem::take(&mut *self.partials());
        for partial in begun.into_values() {
            match partial {
                Partial::Host(folder, name) => {
                    // One that was not made yet is no loss.
                    let _ = rustix::fs::unlinkat(&*folder, &name, AtFlags::empty());
                }
                Partial::Guest(sftp, path) => {
                    let removed = tokio::time::timeout(GRACE, sftp.remove(&path)).await;
                    let left = match removed {
                        Ok(Ok(()) | Err(crate::sftp::session::Failure::NoSuchFile)) => false,
                        Ok(Err(_)) | Err(_) => true,
                    };
                    if left {
                        let path = String::from_utf8_lossy(&path).into_owned();
                        self.fail(&format!(
                            "an incomplete file may be left in the guest: {path}"
                        ));
                    }
                }
            }
        }
    }
}

/// Copies of single files that go on at once.
#[derive(Default)]
pub(super) struct Jobs(JoinSet<()>);

impl Jobs {
    pub async fn add(&mut self, job: impl Future<Output = ()> + Send + 'static) {
        while self.0.len() >= AT_ONCE {
            self.0.join_next().await;
        }
        self.0.spawn(job);
    }

    pub async fn finish(&mut self) {
        while self.0.join_next().await.is_some() {}
    }
}

/// A path of a guest, for people.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
