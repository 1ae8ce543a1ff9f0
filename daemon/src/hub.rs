//! The hub of `/v1/events`: whatever changes is told here once, and every watching client hears it.

use pileus_api::Event;
use tokio::sync::broadcast;

#[derive(Clone)]
pub struct Hub {
    events: broadcast::Sender<Event>,
}

impl Hub {
    #[expect(clippy::new_without_default, reason = "a hub is made once, on purpose")]
    pub fn new() -> Self {
        Self {
            events: broadcast::channel(1024).0,
        }
    }

    /// Tells everyone who listens; nobody may.
    pub fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}
