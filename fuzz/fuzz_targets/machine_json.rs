//! No machine.json may make its parser panic or its error grow without bound; what it takes is written and
//! read again, merges with itself to itself, and stays within limits.
#![no_main]

#[path = "../../images/src/packed/machine/mod.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../../images/src/packed/rule.rs"]
#[allow(dead_code)]
mod rule;

use libfuzzer_sys::fuzz_target;
use machine::{Machine, MachineLimits};

fuzz_target!(|bytes: &[u8]| {
    let parsed = match Machine::parse(bytes) {
        Ok(parsed) => parsed,
        Err(err) => {
            assert!(!err.details.is_empty() && err.details.len() <= 65);
            for line in &err.details {
                assert!(line.len() < 4096 && !line.chars().any(char::is_control));
            }
            return;
        }
    };
    assert!(parsed.warnings.len() <= 17);
    let machine = parsed.machine;
    let again = Machine::parse(&machine.to_json()).unwrap();
    assert_eq!(again.machine, machine);
    assert!(again.warnings.is_empty());
    assert_eq!(machine.with_defaults(&machine), machine);
    MachineLimits::derive(&machine, 1).apply(&machine).unwrap();
    let limits = MachineLimits {
        max_memory: 1 << 20,
        max_cpus: 255,
        default_threads: 2,
    };
    if let Ok(full) = limits.apply(&machine) {
        assert!(full.cpus().unwrap() <= 255);
    }
});
