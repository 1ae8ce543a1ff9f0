//! The control socket: greeting, commands, one client at a time, as QEMU does it. Of the descriptors
//! that come along only the files that a machine is saved to and restored from are used.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::Machine;

/// What a machine is saved as. Nothing else can be restored.
const SAVED: &[u8] = b"what the stand-in for QEMU saved";
const FIRST_SET: u32 = 1000;

/// What commands have made of the machine.
#[derive(Default)]
struct Held {
    devices: HashSet<String>,
    sets: BTreeMap<u32, File>,
    /// How the last migration ended.
    migration: Option<Result<(), String>>,
}

/// The socket's bytes; descriptors that come with them are put aside.
struct Reader<'a> {
    stream: UnixStream,
    descriptors: &'a std::sync::Mutex<VecDeque<OwnedFd>>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut pieces = [IoSliceMut::new(buffer)];
        let fd = self.stream.as_raw_fd();
        let got = recvmsg::<()>(fd, &mut pieces, Some(&mut space), MsgFlags::empty())?;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made these descriptors for us.
                let owned = numbers.iter().map(|n| unsafe { OwnedFd::from_raw_fd(*n) });
                crate::locked(self.descriptors).extend(owned);
            }
        }
        Ok(got.bytes)
    }
}

pub fn serve(machine: &Arc<Machine>, socket: &UnixListener) {
    let mut held = Held::default();
    while let Ok((stream, _)) = socket.accept() {
        let Ok(reading) = stream.try_clone() else {
            continue;
        };
        machine.connected(Some(stream));
        machine.tell(&json!({"QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "fake"},
            "capabilities": [],
        }}));
        talk(machine, reading, &mut held);
        machine.connected(None);
    }
}

fn talk(machine: &Arc<Machine>, stream: UnixStream, held: &mut Held) {
    let descriptors = std::sync::Mutex::default();
    let reader = Reader {
        stream,
        descriptors: &descriptors,
    };
    for line in BufReader::new(reader).lines() {
        let Ok(line) = line else { return };
        let Ok(command) = serde_json::from_str::<Value>(&line) else {
            return;
        };
        let name = command["execute"].as_str().unwrap_or_default();
        let file = crate::locked(&descriptors).pop_front();
        let reply = match perform(machine, name, &command["arguments"], held, file) {
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
    held: &mut Held,
    descriptor: Option<OwnedFd>,
) -> Result<Value, String> {
    let devices = &mut held.devices;
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
        "add-fd" => {
            let file = descriptor.ok_or("No file descriptor supplied via SCM_RIGHTS")?;
            let set = held.sets.keys().max().map_or(FIRST_SET, |set| set + 1);
            held.sets.insert(set, file.into());
            Ok(json!({"fdset-id": set, "fd": 99}))
        }
        "remove-fd" => {
            let set = arguments["fdset-id"].as_u64().unwrap_or_default();
            held.sets.remove(&u32::try_from(set).unwrap_or_default());
            Ok(json!({}))
        }
        "migrate" | "migrate-incoming" => {
            let uri = arguments["uri"].as_str().unwrap_or_default();
            let set = uri.rsplit('/').next().and_then(|set| set.parse().ok());
            let file = set.and_then(|set: u32| held.sets.get(&set));
            let file = file.ok_or_else(|| format!("Could not open '{uri}'"))?;
            held.migration = Some(match name {
                "migrate" => save(machine, file),
                _ => restore(machine, file),
            });
            Ok(json!({}))
        }
        "query-migrate" => Ok(match &held.migration {
            None => json!({}),
            Some(Ok(())) => json!({"status": "completed"}),
            Some(Err(why)) => json!({"status": "failed", "error-desc": why}),
        }),
        "query-cpus-fast" => Ok(json!([])),
        "query-block" => Ok(json!([{
            "qdev": "/machine/peripheral/vda/virtio-backend",
            "inserted": {"node-name": "disk", "image": {"virtual-size": 5_u64 << 30}},
        }])),
        "migrate-set-capabilities"
        | "migrate-set-parameters"
        | "migrate_cancel"
        | "blockdev-set-active"
        | "block_resize" => Ok(json!({})),
        "qmp_capabilities" | "getfd" | "closefd" | "stop" | "cont" | "system_reset"
        | "system_powerdown" | "quit" => Ok(json!({})),
        _ => Err(format!("The command {name} has not been found")),
    }
}

fn save(machine: &Machine, mut file: &File) -> Result<(), String> {
    machine.pause_for("save-ms");
    if machine.has("save-fails") {
        return Err("fake: told not to be saved".into());
    }
    file.write_all(SAVED).map_err(|err| err.to_string())
}

fn restore(machine: &Machine, mut file: &File) -> Result<(), String> {
    machine.pause_for("restore-ms");
    let mut saved = Vec::new();
    file.read_to_end(&mut saved)
        .map_err(|err| err.to_string())?;
    match saved == SAVED && !machine.has("restore-fails") {
        true => Ok(()),
        false => Err("fake: error while loading state".into()),
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
            machine.wakes_up();
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
