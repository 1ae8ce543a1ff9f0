//! The guest's agent, as `instances/src/guest/agent.py` talks: JSON lines over the agent's port.
//! Hello, cloud-init's state and a report at each connection, then answers by number.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::{Machine, locked, now};

const KERNEL: &str = "0.0-fake";

pub fn serve(machine: &Arc<Machine>, port: &UnixListener) {
    while let Ok((stream, _)) = port.accept() {
        let Ok(writer) = stream.try_clone() else {
            continue;
        };
        let writer = Arc::new(Mutex::new(Some(writer)));
        let speaking = (machine.clone(), writer.clone());
        std::thread::spawn(move || speak(&speaking.0, &speaking.1));
        answer(machine, stream, &writer);
        *locked(&writer) = None;
        machine.changed();
    }
}

type Writer = Mutex<Option<UnixStream>>;

/// `false` once the connection is gone.
fn send(writer: &Writer, message: &Value) -> bool {
    match locked(writer).as_mut() {
        Some(stream) => stream.write_all(format!("{message}\n").as_bytes()).is_ok(),
        None => false,
    }
}

/// Says by itself how far the guest is, anew after each boot.
fn speak(machine: &Machine, writer: &Writer) {
    let mut told = 0;
    let gone = || locked(writer).is_none();
    loop {
        let boot = || machine.boots.load(Ordering::SeqCst);
        machine.wait(|| gone() || (boot() != told && machine.is_awake()));
        if gone() {
            return;
        }
        told = boot();
        let was_template = machine.is_template.load(Ordering::SeqCst);
        send(writer, &hello(machine));
        // A clone says nothing more until it is somebody.
        machine.wait(|| gone() || !machine.is_template.load(Ordering::SeqCst));
        if was_template {
            send(writer, &hello(machine));
        }
        send(writer, &cloud_init("running", &[]));
        send(writer, &report(machine));
        machine.pause_for("cloud-init-ms");
        if machine.has("cloud-init-hangs") {
            continue;
        }
        send(writer, &final_state(machine));
        send(writer, &report(machine));
    }
}

fn answer(machine: &Arc<Machine>, stream: UnixStream, writer: &Writer) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let Ok(request) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        // What is sent to a guest that is not up waits in its port.
        machine.wait(|| machine.is_awake());
        let what = request["do"].as_str().unwrap_or_default();
        let mut reply = json!({"type": "reply", "id": request["id"], "ok": true});
        match what {
            "hello" => {
                send(writer, &hello(machine));
            }
            "report" => {
                send(writer, &report(machine));
            }
            "ping" | "set-time" | "set-keys" | "ssh-close" | "poweroff" | "reboot" | "resumed"
            | "grow" | "sync" => (),
            "wall" => machine.say(&format!(
                "wall: {}",
                request["text"].as_str().unwrap_or("?")
            )),
            "rename" if machine.has_now("rename-fails") => {
                reply["ok"] = json!(false);
                reply["error"] = json!("fake: told to keep its name");
            }
            "rename" | "name" => {
                take_name(machine, &request);
                reply["steps"] = json!([["fake", 1]]);
            }
            "quiesce" => {
                machine.pause_for("quiesce-ms");
                if machine.has("quiesce-fails") {
                    reply["ok"] = json!(false);
                    reply["error"] = json!("fake: told not to be quiet");
                }
            }
            "identify" => {
                machine.pause_for("identify-ms");
                // Says nothing at all, as a guest that did not survive.
                if machine.has("identify-hangs") {
                    continue;
                }
                if machine.has("identify-fails") {
                    reply["ok"] = json!(false);
                    reply["error"] = json!("fake: told to be nobody");
                } else {
                    take_name(machine, &request);
                    machine.becomes(request["machine_id"].as_str().unwrap_or_default());
                }
                reply["steps"] = json!([["fake", 1]]);
            }
            "identity" => {
                reply["items"] = identity(machine);
            }
            "ensure-user" => {
                reply["login"] = json!({"user": "ubuntu", "uid": 1000, "home": "/home/ubuntu"});
            }
            _ => {
                reply["ok"] = json!(false);
                reply["error"] = json!(format!("the fake guest can't do {what}"));
            }
        }
        if !send(writer, &reply) {
            return;
        }
        match what {
            "identify" => {
                machine.is_template.store(false, Ordering::SeqCst);
                machine.changed();
            }
            "poweroff" => machine.shut_down(true, "guest-shutdown"),
            "reboot" => machine.reset(true, "guest-reset"),
            _ => (),
        }
    }
}

fn take_name(machine: &Machine, request: &Value) {
    if let Some(name) = request["hostname"].as_str() {
        name.clone_into(&mut locked(&machine.known).hostname);
    }
}

/// What no other guest may have, and, for tests, what the guest sees of its disk: the last of its marks.
fn identity(machine: &Machine) -> Value {
    let id = machine.machine_id().unwrap_or_default();
    let known = locked(&machine.known);
    let disk = locked(&machine.disk);
    let marks = disk.marks();
    json!({
        "machine-id": [id], "hostname": [known.hostname], "boot-id": [known.boot_id],
        "disk": marks[marks.len().saturating_sub(30)..], "marks": [marks.len().to_string()],
    })
}

fn hello(machine: &Machine) -> Value {
    let known = locked(&machine.known);
    json!({
        "type": "hello", "proto": 1, "agent": "fake",
        "boot_id": known.boot_id,
        "hostname": known.hostname, "kernel": KERNEL, "machine": "x86_64", "python": "3",
        "os": "Fake GNU/Linux", "pid": 1, "instance": "",
        "template": machine.is_template.load(Ordering::SeqCst),
    })
}

fn cloud_init(state: &str, errors: &[&str]) -> Value {
    json!({
        "type": "cloud-init", "state": state, "stage": null, "stages": {},
        "errors": errors, "recoverable": [], "datasource": "NoCloud",
    })
}

fn final_state(machine: &Machine) -> Value {
    if machine.has("cloud-init-error") {
        return cloud_init("error", &["modules-final: fake error"]);
    }
    if machine.has("cloud-init-degraded") {
        let mut state = cloud_init("degraded", &[]);
        state["recoverable"] = json!(["WARNING: fake warning"]);
        return state;
    }
    cloud_init("done", &[])
}

fn report(machine: &Machine) -> Value {
    let addresses: Vec<&str> = machine.value("address").into_iter().collect();
    let booted_at = locked(&machine.known).booted_at.min(now());
    json!({
        "type": "report",
        "interfaces": [{"name": "eth0", "mac": "52:54:00:00:00:00", "addresses": addresses}],
        "load": [0.0, 0.0, 0.0],
        "memory": {"total": 1 << 30, "used": 100 << 20},
        "disk": {"total": 5_u64 << 30, "used": 1 << 30},
        "cpus": 1, "uptime": (now() - booted_at) as f64 / 1000.0,
        "kernel": {"running": KERNEL, "disk": KERNEL, "current": true},
        "time": 1.0,
    })
}
