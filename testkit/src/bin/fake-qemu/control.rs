//! The control socket: greeting, commands, one client at a time, as QEMU does it. Descriptors that
//! come along are dropped by the kernel, because they are not asked for.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::Machine;

pub fn serve(machine: &Arc<Machine>, socket: &UnixListener) {
    let mut devices = HashSet::new();
    while let Ok((stream, _)) = socket.accept() {
        let Ok(reading) = stream.try_clone() else {
            continue;
        };
        machine.connected(Some(stream));
        machine.tell(&json!({"QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "fake"},
            "capabilities": [],
        }}));
        talk(machine, reading, &mut devices);
        machine.connected(None);
    }
}

fn talk(machine: &Arc<Machine>, stream: UnixStream, devices: &mut HashSet<String>) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let Ok(command) = serde_json::from_str::<Value>(&line) else {
            return;
        };
        let name = command["execute"].as_str().unwrap_or_default();
        let reply = match perform(machine, name, &command["arguments"], devices) {
            Ok(value) => json!({"return": value, "id": command["id"]}),
            Err(why) => json!({
                "error": {"class": "GenericError", "desc": why},
                "id": command["id"],
            }),
        };
        machine.tell(&reply);
        after(machine, name);
    }
}

fn perform(
    machine: &Machine,
    name: &str,
    arguments: &Value,
    devices: &mut HashSet<String>,
) -> Result<Value, String> {
    let id = arguments["id"].as_str().unwrap_or_default().to_owned();
    match name {
        "query-status" => {
            let running = machine.running.load(Ordering::SeqCst);
            let status = if running { "running" } else { "paused" };
            Ok(json!({"running": running, "status": status}))
        }
        "device_add" | "netdev_add" => match devices.insert(format!("{name} {id}")) {
            true => Ok(json!({})),
            false => Err(format!("Duplicate device ID '{id}'")),
        },
        "device_del" | "netdev_del" => {
            let added = name.replace("del", "add");
            match devices.remove(&format!("{added} {id}")) || id == "nic0" {
                true if name == "device_del" => {
                    machine.event("DEVICE_DELETED", &json!({"device": id, "path": "/fake"}));
                    Ok(json!({}))
                }
                true => Ok(json!({})),
                false => Err(format!("Device '{id}' not found")),
            }
        }
        "query-cpus-fast" | "query-block" => Ok(json!([])),
        "qmp_capabilities" | "getfd" | "closefd" | "stop" | "cont" | "system_reset"
        | "system_powerdown" | "quit" => Ok(json!({})),
        _ => Err(format!("The command {name} has not been found")),
    }
}

/// What a command sets off once it was answered.
fn after(machine: &Arc<Machine>, name: &str) {
    match name {
        "stop" if machine.running.swap(false, Ordering::SeqCst) => {
            machine.event("STOP", &json!({}));
        }
        "cont" if !machine.running.swap(true, Ordering::SeqCst) => {
            machine.event("RESUME", &json!({}));
        }
        "system_reset" => machine.reset(false, "host-qmp-system-reset"),
        // Like a guest that has not come up yet: nobody listens to the button.
        "system_powerdown" => {
            machine.event("POWERDOWN", &json!({}));
            if machine.up.load(Ordering::SeqCst) && !machine.has("ignores-powerdown") {
                machine.shut_down(true, "guest-shutdown");
            }
        }
        "quit" => machine.shut_down(false, "host-qmp-quit"),
        _ => (),
    }
}
