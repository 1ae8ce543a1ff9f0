//! The control socket: greeting, commands, one client at a time, as QEMU does it.

use std::collections::{HashSet, VecDeque};
use std::io::{BufRead, BufReader, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::{Machine, locked, memory};

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
                locked(self.descriptors).extend(owned);
            }
        }
        Ok(got.bytes)
    }
}

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
        let file = locked(&descriptors).pop_front();
        let reply = match perform(machine, name, &command["arguments"], devices, file) {
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
    machine: &Arc<Machine>,
    name: &str,
    arguments: &Value,
    devices: &mut HashSet<String>,
    descriptor: Option<OwnedFd>,
) -> Result<Value, String> {
    let id = arguments["id"].as_str().unwrap_or_default().to_owned();
    let done = json!({});
    match name {
        "query-status" => {
            let running = machine.running.load(Ordering::SeqCst);
            let status = if running { "running" } else { "paused" };
            Ok(json!({"running": running, "status": status}))
        }
        "device_add" | "netdev_add" => match devices.insert(format!("{name} {id}")) {
            true => Ok(done),
            false => Err(format!("Duplicate device ID '{id}'")),
        },
        "device_del" | "netdev_del" => {
            let added = name.replace("del", "add");
            match devices.remove(&format!("{added} {id}")) || id == "nic0" {
                true if name == "device_del" => {
                    machine.event("DEVICE_DELETED", &json!({"device": id, "path": "/fake"}));
                    Ok(done)
                }
                true => Ok(done),
                false => Err(format!("Device '{id}' not found")),
            }
        }
        "add-fd" | "remove-fd" => files(machine, name, arguments, descriptor),
        "blockdev-add" => locked(&machine.disk).add(arguments),
        "blockdev-del" => {
            let node = arguments["node-name"].as_str().unwrap_or_default();
            locked(&machine.disk).delete(node)
        }
        "blockdev-snapshot" if machine.has_now("freeze-fails") => Err("fake: told so".to_owned()),
        "blockdev-snapshot" => locked(&machine.disk).put_on_top(arguments),
        "block_resize" => locked(&machine.disk).resize(arguments),
        // It has the processors and the memory that it was started with, and room for no more.
        "query-hotpluggable-cpus" => Ok(machine.processors()),
        "query-memory-size-summary" => {
            Ok(json!({"base-memory": machine.memory, "plugged-memory": 0}))
        }
        "qom-get" => match (arguments["path"].as_str(), arguments["property"].as_str()) {
            (Some("/machine/peripheral/more-memory"), Some("size")) => Ok(json!(0)),
            (Some("/objects/more"), _) => Ok(json!(machine.room)),
            (Some("/machine/peripheral/more-memory"), _) => Ok(json!("")),
            _ => Ok(json!(locked(&machine.disk).top())),
        },
        "query-fdsets" => Ok(locked(&machine.disk).fdsets()),
        "query-block" => Ok(locked(&machine.disk).devices()),
        "query-named-block-nodes" => Ok(locked(&machine.disk).named()),
        "migrate" | "migrate-incoming" => {
            let uri = arguments["uri"].as_str().unwrap_or_default();
            let file = locked(&machine.disk).lent(uri)?;
            match name {
                "migrate" => memory::save(machine, file),
                _ => memory::load(machine, file),
            }
            Ok(done)
        }
        "query-migrate" => Ok(locked(&machine.migration).told()),
        "migrate-continue" => locked(&machine.migration).go_on(),
        "migrate_cancel" => {
            locked(&machine.migration).cancel();
            Ok(done)
        }
        "migrate-set-capabilities" => {
            locked(&machine.migration).set_capabilities(arguments);
            Ok(done)
        }
        "query-cpus-fast" => Ok(json!([])),
        "migrate-set-parameters" | "blockdev-set-active" => Ok(done),
        "qmp_capabilities" | "getfd" | "closefd" | "stop" | "cont" | "system_reset"
        | "system_powerdown" | "quit" => Ok(done),
        _ => Err(format!("The command {name} has not been found")),
    }
}

fn files(
    machine: &Machine,
    name: &str,
    arguments: &Value,
    descriptor: Option<OwnedFd>,
) -> Result<Value, String> {
    let set = arguments["fdset-id"].as_u64();
    let set = set.and_then(|set| u32::try_from(set).ok());
    let mut disk = locked(&machine.disk);
    if name == "remove-fd" {
        disk.remove_fd(set.unwrap_or_default())?;
        return Ok(json!({}));
    }
    let file = descriptor.ok_or("No file descriptor supplied via SCM_RIGHTS")?;
    let set = disk.add_fd(set, file.into());
    Ok(json!({"fdset-id": set, "fd": 99}))
}

/// What a command sets off once it was answered.
fn after(machine: &Arc<Machine>, name: &str) {
    match name {
        "qmp_capabilities" => {
            machine.is_watched.store(true, Ordering::SeqCst);
            machine.changed();
        }
        "stop" => machine.halt(),
        "cont" => machine.go_on(),
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
