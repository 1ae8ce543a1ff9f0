//! Limits: what a machine leaves open is filled up to what is allowed, and what it says may not be more.

use pileus_base::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use super::Machine;

/// Memory of a machine that says nothing, where nobody else has an opinion.
const MEMORY: u32 = 2048;

/// What a machine may have at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MachineLimits {
    /// MiB.
    pub max_memory: u32,
    /// Threads × cores × sockets.
    #[serde(rename = "maxCPUs")]
    pub max_cpus: u32,
    /// Threads of a core, where they fit and the machine doesn't say.
    pub default_threads: u32,
}

impl MachineLimits {
    /// The machine with memory, threads, cores and sockets filled in. All CPUs that are allowed are
    /// given: first as threads up to the default, then as cores, then threads, then sockets.
    pub fn apply(&self, machine: &Machine) -> Result<Machine> {
        let memory = machine.memory.unwrap_or(self.max_memory);
        let set = |value: Option<u8>| u64::from(value.unwrap_or(1));
        let (mut threads, mut cores, mut sockets) = (
            set(machine.threads),
            set(machine.cores),
            set(machine.sockets),
        );
        let most = u64::from(self.max_cpus);
        let default = u64::from(self.default_threads.clamp(1, 255));
        if machine.threads.is_none() && default * cores * sockets <= most {
            threads = default;
        }
        // Up to the largest number that fits, never less than what is there already.
        let grown = |now: u64, others: u64| (most / others).min(255).max(now);
        if machine.cores.is_none() {
            cores = grown(cores, threads * sockets);
        }
        if machine.threads.is_none() {
            threads = grown(threads, cores * sockets);
        }
        if machine.sockets.is_none() {
            sockets = grown(sockets, threads * cores);
        }
        if memory > self.max_memory {
            return Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "The machine wants {memory} MiB of memory, and at most {} MiB are allowed",
                    self.max_memory
                ),
            ));
        }
        let total = threads * cores * sockets;
        if total > most {
            return Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "The machine wants {total} CPUs ({threads} threads × {cores} cores × {sockets} \
                     sockets), and at most {most} are allowed"
                ),
            ));
        }
        // None is larger than 255: each comes from a u8 or was held below.
        let small = |number: u64| u8::try_from(number).ok();
        Ok(Machine {
            memory: Some(memory),
            threads: small(threads),
            cores: small(cores),
            sockets: small(sockets),
            ..machine.clone()
        })
    }

    /// Limits that allow just this machine: its own memory, its own CPUs or all of the host's.
    pub fn derive(machine: &Machine, host_cpus: u32) -> Self {
        Self {
            max_memory: machine.memory.unwrap_or(MEMORY),
            max_cpus: machine.cpus().unwrap_or(1).max(host_cpus),
            default_threads: 1,
        }
    }
}

impl Machine {
    /// Threads × cores × sockets, where what is open counts as one; none if nothing is said.
    pub fn cpus(&self) -> Option<u32> {
        let said = [self.threads, self.cores, self.sockets];
        said.iter().any(Option::is_some).then(|| {
            let each = said.map(|value| u32::from(value.unwrap_or(1)));
            each.iter().product()
        })
    }
}
