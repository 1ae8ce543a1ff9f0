//! A guest's answers to what makes it a clone, and to who it is, may be anything: what is taken of them is
//! bounded and holds no control characters.
//!
//! The requests' file is taken in as it is; the link below it is one that has the answer already.
#![no_main]

#[path = "../../instances/src/guest/clone.rs"]
#[allow(dead_code, unused_imports)]
mod clone;
#[path = "../../instances/src/guest/wire.rs"]
#[allow(dead_code)]
mod wire;

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use pileus_base::Result;

use crate::agent::AgentLink;
use crate::clone::NameSpec;

pub const LOGIN_USER: &str = "ubuntu";

mod agent {
    use std::time::Duration;

    use pileus_base::Result;
    use serde_json::{Map, Value};

    /// Answers each request with the same.
    pub struct AgentLink(pub Map<String, Value>);

    impl AgentLink {
        pub async fn request(&self, _: &str, _: Value, _: Duration) -> Result<Map<String, Value>> {
            Ok(self.0.clone())
        }
    }
}

mod handle {
    pub struct Guest(crate::AgentLink);

    impl Guest {
        pub fn agent(&self) -> &crate::AgentLink {
            &self.0
        }
    }
}

mod keys {
    use pileus_base::Result;

    #[derive(Clone)]
    pub struct InstanceKeys;

    impl InstanceKeys {
        pub fn client_public_line(&self) -> Result<String> {
            Ok(String::new())
        }
        pub fn host_private_text(&self) -> Result<String> {
            Ok(String::new())
        }
        pub fn host_public_line(&self) -> Result<String> {
            Ok(String::new())
        }
    }
}

fn harmless(text: &str) {
    assert!(text.chars().count() <= 1024);
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

/// Nothing here ever waits.
fn done<T>(work: impl Future<Output = Result<T>>) -> Option<T> {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result.ok(),
        Poll::Pending => panic!("it waits"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some(wire::Message::Reply(reply)) = wire::parse(bytes) else {
        return;
    };
    let link = AgentLink(reply.rest);
    let bound = Duration::from_secs(1);
    if let Some(items) = done(link.identity(bound)) {
        assert!(items.len() <= 64);
        for (name, values) in &items {
            harmless(name);
            assert!(values.len() <= 32);
            values.iter().for_each(|value| harmless(value));
        }
    }
    let spec = NameSpec {
        hostname: "x".into(),
        entropy: Vec::new(),
        time: 0.0,
        timezone: None,
        grow: false,
        cloud_init: false,
    };
    if let Some(steps) = done(link.name(&spec, bound)) {
        assert!(steps.len() <= 64);
        steps.iter().for_each(|(step, _)| harmless(step));
    }
});
