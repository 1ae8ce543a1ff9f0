//! Turns what a guest tells by itself into events for the instance's task: signs of life, cloud-init's
//! state, reports. A guest without an agent is watched over the network instead, as far as it goes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use pileus_api::{CloudInit, CloudInitStatus, GuestReport, Usage};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::exec::{ExecSpec, Output};
use super::handle::Guest;
use super::wire::{self, CloudInitState};
use crate::machine::GuestEvent;

/// A guest whose SSH port has been open for so long without its agent saying hello has none.
const AGENTLESS_AFTER: Duration = Duration::from_secs(20);
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Of the text that `cloud-init status` prints.
const MAX_STATUS: usize = 64 << 10;

/// Watches until the receiver is dropped.
pub fn watch(guest: Guest) -> mpsc::Receiver<GuestEvent> {
    let (events, receiver) = mpsc::channel(16);
    tokio::spawn(watch_agent(guest.clone(), events.clone()));
    tokio::spawn(watch_network(guest, events));
    receiver
}

async fn watch_agent(guest: Guest, events: mpsc::Sender<GuestEvent>) {
    let mut hello = guest.agent().hello();
    let mut cloud_init = guest.agent().cloud_init();
    let mut report = guest.agent().report();
    let mut release = String::new();
    // What was told before this began counts as well.
    hello.mark_changed();
    cloud_init.mark_changed();
    loop {
        let event = tokio::select! {
            biased;
            () = events.closed() => return,
            Ok(()) = hello.changed() => match hello.borrow_and_update().as_ref() {
                // A clone that has no identity yet is not up.
                Some(hello) if hello.template => continue,
                Some(hello) => {
                    release.clone_from(&hello.os);
                    GuestEvent::Up
                }
                None => continue,
            },
            Ok(()) = cloud_init.changed() => {
                GuestEvent::CloudInit(convert_cloud_init(&cloud_init.borrow_and_update()))
            }
            Ok(()) = report.changed() => match report.borrow_and_update().as_ref() {
                Some(report) => convert_report(report, &release),
                None => continue,
            },
            else => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn convert_cloud_init(told: &wire::CloudInit) -> CloudInit {
    let status = match told.state {
        CloudInitState::NotStarted | CloudInitState::Running => CloudInitStatus::Running,
        CloudInitState::Done => CloudInitStatus::Done,
        CloudInitState::Degraded => CloudInitStatus::Degraded,
        CloudInitState::Error => CloudInitStatus::Error,
        CloudInitState::Disabled => CloudInitStatus::Absent,
    };
    let errors = told.errors.iter().chain(&told.recoverable);
    CloudInit {
        status,
        errors: errors.cloned().collect(),
    }
}

fn convert_report(told: &wire::Report, release: &str) -> GuestEvent {
    let usage = |u: &wire::Usage| Usage {
        used: u.used,
        total: u.total,
    };
    let load = |n: usize| told.load.get(n).copied().unwrap_or_default();
    // Whatever a guest claims of its uptime, a cast of a float saturates.
    let uptime_seconds = told.uptime as u64;
    GuestEvent::Report {
        report: GuestReport {
            os: release.to_owned(),
            kernel: told.kernel.running.clone(),
            cpus: told.cpus,
            load: [load(0), load(1), load(2)],
            memory: usage(&told.memory),
            disk: usage(&told.disk),
            uptime_seconds,
        },
        addresses: told
            .ipv4()
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            })
            .collect::<Vec<Ipv4Addr>>(),
        other_kernel: !told.kernel.current,
    }
}

/// Only for guests whose agent stays silent: an open SSH port is their sign of life.
async fn watch_network(guest: Guest, events: mpsc::Sender<GuestEvent>) {
    let hello = guest.agent().hello();
    let mut open_since: Option<Instant> = None;
    loop {
        tokio::select! {
            () = events.closed() => return,
            () = sleep(PROBE_EVERY) => {}
        }
        if hello.borrow().is_some() {
            // It has an agent. One that dies later is not this task's business.
            return;
        }
        if !greets(SocketAddr::from((guest.address(), 22))).await {
            open_since = None;
            continue;
        }
        let since = *open_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= AGENTLESS_AFTER {
            break;
        }
    }
    tracing::info!(address = %guest.address(), "the guest has no agent; it is reached over the network");
    if events.send(GuestEvent::Up).await.is_err() {
        return;
    }
    let state = tokio::select! {
        () = events.closed() => return,
        state = cloud_init_over_ssh(&guest) => state,
    };
    let _ = events.send(GuestEvent::CloudInit(state)).await;
}

async fn greets(address: SocketAddr) -> bool {
    let probe = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let mut start = [0; 4];
        stream.read_exact(&mut start).await.ok()?;
        (start == *b"SSH-").then_some(())
    };
    matches!(timeout(PROBE_EVERY, probe).await, Ok(Some(())))
}

#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    errors: Vec<serde_json::Value>,
}

/// Asks cloud-init itself until it has ended. A guest that can't be asked counts as one without.
async fn cloud_init_over_ssh(guest: &Guest) -> CloudInit {
    let absent = CloudInit {
        status: CloudInitStatus::Absent,
        errors: Vec::new(),
    };
    let spec = ExecSpec {
        command: ["cloud-init", "status", "--wait", "--format=json"]
            .map(str::to_owned)
            .to_vec(),
        ..ExecSpec::default()
    };
    let Ok(mut session) = guest.exec(&spec).await else {
        return absent;
    };
    let mut text = Vec::new();
    while let Some(output) = session.output.recv().await {
        if let Output::Stdout(bytes) = output
            && text.len() + bytes.len() <= MAX_STATUS
        {
            text.extend_from_slice(&bytes);
        }
    }
    let Ok(told) = serde_json::from_slice::<Status>(&text) else {
        return absent;
    };
    let errors = told.errors.iter().take(20).map(|error| match error {
        serde_json::Value::String(text) => wire::clean(text),
        other => wire::clean(&other.to_string()),
    });
    CloudInit {
        status: match told.status.as_str() {
            "done" => CloudInitStatus::Done,
            "degraded" => CloudInitStatus::Degraded,
            "error" => CloudInitStatus::Error,
            _ => CloudInitStatus::Absent,
        },
        errors: errors.collect(),
    }
}
