//! Admission control: a launch that the host has no memory for is refused with a clear word, before the
//! kernel's OOM killer chooses somebody else's process.
//!
//! A guest takes its memory little by little, so a VM that has just started does not show in the
//! host's figures yet: what it will soon need is *promised* to it until it has grown or ended.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, Result, Size};

/// What must stay free for the host itself.
const HEADROOM: Size = Size::mib(256);
/// What a guest takes while it boots, whatever it may take at most.
const BOOT_NEED: Size = Size::mib(512);
/// A clone shares its template's memory; this much of it becomes its own, QEMU included.
const CLONE_NEED: Size = Size::mib(256);
/// After this time a guest's memory shows in the host's own figures.
const GROWN_AFTER: Duration = Duration::from_secs(60);

/// Reads how much memory the host could still give; none if it can't be known.
pub fn available() -> Option<Size> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// All the memory that the host has; none if it can't be known.
pub fn all() -> Option<Size> {
    field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

fn parse(meminfo: &str) -> Option<Size> {
    field(meminfo, "MemAvailable:")
}

fn field(meminfo: &str, name: &str) -> Option<Size> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Size(kib.saturating_mul(1024)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Cold,
    Warm,
}

/// A number of its own, since when, and how much.
type Promised = Arc<Mutex<Vec<(u64, Instant, Size)>>>;

pub struct Admission {
    available: fn() -> Option<Size>,
    promised: Promised,
}

/// A launch's share; given back when dropped.
pub struct Promise {
    promised: Promised,
    number: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        promised.retain(|(number, ..)| *number != self.number);
    }
}

impl Admission {
    pub fn new(available: fn() -> Option<Size>) -> Self {
        Self {
            available,
            promised: Arc::default(),
        }
    }

    /// Promises a new VM what it will need soon, or refuses.
    pub fn admit(&self, memory: Size, start: Start) -> Result<Promise> {
        let need = match start {
            Start::Cold => memory.min(BOOT_NEED),
            Start::Warm => memory.min(CLONE_NEED),
        };
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        promised.retain(|(_, since, _)| since.elapsed() < GROWN_AFTER);
        let others = promised.iter().map(|(.., size)| size.bytes()).sum::<u64>();
        if let Some(available) = (self.available)() {
            let free = available.bytes().saturating_sub(others);
            if free < need.bytes() + HEADROOM.bytes() {
                return Err(Error::new(
                    Code::NoMemory,
                    format!(
                        "The host has {} of free memory, and this instance needs {need} to start \
                         (with {HEADROOM} left for the host)",
                        Size(free)
                    ),
                )
                .advise("Stop an instance, or ask for less with --memory."));
            }
        }
        let number = promised
            .iter()
            .map(|(number, ..)| number + 1)
            .max()
            .unwrap_or(0);
        promised.push((number, Instant::now(), need));
        Ok(Promise {
            promised: self.promised.clone(),
            number,
        })
    }
}

impl super::Service {
    /// Admits a launch; standby clones go before one is refused.
    pub(super) async fn admit(&self, memory: Size, start: Start) -> Result<Promise> {
        match self.parts.admission.admit(memory, start) {
            Ok(promise) => Ok(promise),
            Err(_) => {
                self.empty_pool(|_| true).await;
                self.parts.admission.admit(memory, start)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_promised_and_given_back() {
        let admission = Admission::new(|| Some(Size::mib(1400)));
        let first = admission.admit(Size::gib(4), Start::Cold).unwrap();
        let second = admission.admit(Size::gib(1), Start::Cold).unwrap();
        let refused = admission.admit(Size::gib(1), Start::Cold).err().unwrap();
        assert_eq!(refused.code, Code::NoMemory);
        assert!(refused.advice.is_some());
        drop(first);
        // A clone needs less.
        let third = admission.admit(Size::gib(1), Start::Warm).unwrap();
        assert!(admission.admit(Size::gib(1), Start::Cold).is_err());
        drop((second, third));
        admission.admit(Size::gib(1), Start::Cold).unwrap();
    }

    #[test]
    fn a_host_that_does_not_tell_refuses_nothing() {
        let admission = Admission::new(|| None);
        assert!(admission.admit(Size::gib(999), Start::Cold).is_ok());
    }

    #[test]
    fn the_kernels_figures() {
        assert_eq!(
            parse("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"),
            Some(Size::mib(2))
        );
        assert_eq!(parse("MemTotal: 9 kB\n"), None);
        assert_eq!(parse("MemAvailable: x kB\n"), None);
    }
}
