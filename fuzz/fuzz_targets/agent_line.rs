//! No line of a guest's agent may make its parser panic, and what is taken of it is bounded and holds no
//! control characters.
#![no_main]

#[path = "../../instances/src/guest/wire.rs"]
#[allow(dead_code)]
mod wire;

use libfuzzer_sys::fuzz_target;
use wire::Message;

fn harmless(text: &str) {
    assert!(text.chars().count() <= 1024);
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

fuzz_target!(|bytes: &[u8]| {
    let Some(message) = wire::parse(bytes) else {
        return;
    };
    assert!(bytes.len() <= wire::MAX_LINE);
    match message {
        Message::Hello(hello) => {
            for text in [
                &hello.agent,
                &hello.boot_id,
                &hello.hostname,
                &hello.kernel,
                &hello.machine,
                &hello.python,
                &hello.os,
                &hello.instance,
            ] {
                harmless(text);
            }
        }
        Message::CloudInit(told) => {
            assert!(told.errors.len() <= 20 && told.recoverable.len() <= 20);
            assert!(told.stages.len() <= 8);
            told.errors
                .iter()
                .chain(&told.recoverable)
                .for_each(|t| harmless(t));
            for (name, times) in &told.stages {
                harmless(name);
                assert!(times.seconds().is_none_or(|seconds| seconds >= 0.0));
            }
            told.stage.iter().for_each(|t| harmless(t));
            harmless(&told.datasource);
        }
        Message::Report(report) => {
            assert!(report.interfaces.len() <= 64 && report.load.len() <= 3);
            for interface in &report.interfaces {
                assert!(interface.addresses.len() <= 32);
                harmless(&interface.name);
                harmless(&interface.mac);
            }
            assert!(report.ipv4().all(|ip| ip.is_ipv4() && !ip.is_loopback()));
            harmless(&report.kernel.running);
            harmless(&report.kernel.disk);
        }
        Message::Reply(reply) => reply.error.iter().for_each(|t| harmless(t)),
        Message::Ssh(end) => harmless(&end.nonce),
    }
});
