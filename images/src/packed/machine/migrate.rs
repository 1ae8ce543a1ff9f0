//! Version 0 → version 1. Version 0 said less, in another form; what it left open had fixed values. The
//! ancestor dropped silently what it didn't take over; here a warning tells of it.

use serde_json::{Map, Value};

use super::parse::{Parsed, Reader, join, mac, uuid, whole};
use super::values::Word;
use super::{
    Chipset, Cpu, Graphics, Keyboard, Machine, Mouse, Network, Sound, Storage, Tablet, Usb,
};

/// Of so many unknown keys a warning is given.
const MAX_WARNINGS: usize = 16;

/// Reads version 0; the error is every issue that there is.
pub(super) fn version_0(value: &Value) -> Result<Parsed, Vec<String>> {
    let empty = Map::new();
    let object = value.as_object().unwrap_or(&empty);
    let mut top = Reader::new(object, "machine");
    if !object.contains_key("version") {
        // Told only if something else is wrong: then it may be that it should have been version 1.
        top.issues
            .push("machine.version is missing, so it was read as version 0".into());
    }
    let told = top.issues.len();
    let mut warnings = Warnings::default();
    warnings.of(
        &top,
        &[
            "version", "uuid", "memory", "cpu", "network", "keyboard", "sound",
        ],
    );

    let mut machine = Machine {
        uuid: required(&mut top, "uuid", "an RFC 4122 UUID in lower case", uuid),
        memory: or_zero(&mut top, "memory", 1 << 20),
        ..constants()
    };
    within(
        &mut top,
        &mut warnings,
        "cpu",
        &["threads", "cores", "sockets"],
        |cpu| {
            machine.threads = or_zero(cpu, "threads", 255).or(machine.threads);
            machine.cores = or_zero(cpu, "cores", 255);
            machine.sockets = or_zero(cpu, "sockets", 255);
        },
    );
    let mut rtl8139 = false;
    let there = within(
        &mut top,
        &mut warnings,
        "network",
        &["device", "mac"],
        |network| {
            let must = "a local unicast MAC address in lower case";
            machine.mac = required(network, "mac", must, mac);
            let device = required(network, "device", "\"rtl8139\" or \"e1000\"", Network::of);
            rtl8139 = device == Some(Network::Rtl8139);
        },
    );
    if !there {
        top.issue("network", "an object");
    }
    if rtl8139 {
        warnings.push("machine.network.device is ignored: version 0 always got an e1000".into());
    }
    let there = within(
        &mut top,
        &mut warnings,
        "keyboard",
        &["layout"],
        |keyboard| {
            machine.keyboard_layout = keyboard.word("layout");
            if machine.keyboard_layout.is_none() && keyboard.issues.is_empty() {
                keyboard.issue("layout", "a keyboard layout");
            }
        },
    );
    if !there {
        top.issue("keyboard", "an object");
    }
    within(
        &mut top,
        &mut warnings,
        "sound",
        &["device", "controller"],
        |sound| {
            machine.sound = read_sound(sound);
        },
    );
    if top.issues.len() > told {
        return Err(top.issues);
    }
    Ok(Parsed {
        machine,
        warnings: warnings.done(),
    })
}

/// What version 0 could not say.
fn constants() -> Machine {
    Machine {
        chipset: Some(Chipset::PcI440fx28),
        cpu: Some(Cpu::Host),
        flags: Some([]),
        threads: Some(1),
        usb: Some(Usb::Xhci),
        network: Some(Network::E1000),
        storage: Some(Storage::VirtioBlkPci),
        graphics: Some(Graphics::VmwareSvga),
        sound: Some(Sound::None),
        keyboard: Some(Keyboard::UsbKbd),
        mouse: Some(Mouse::UsbMouse),
        tablet: Some(Tablet::None),
        ..Machine::default()
    }
}

fn read_sound(sound: &mut Reader<'_>) -> Option<Sound> {
    let any = |text: &str| Some(text.to_owned());
    let device = required(sound, "device", "the name of a sound device", any)?;
    let must = "\"pci\", or the controller of an HDA codec";
    let controller = required(sound, "controller", must, any)?;
    let word = match controller.as_str() {
        "pci" => device,
        _ => format!("{device}/{controller}"),
    };
    let found = Sound::of(&word);
    if found.is_none() {
        sound.issue("device", "a sound device that goes with its controller");
    }
    found
}

fn required<T>(
    read: &mut Reader<'_>,
    key: &str,
    must: &str,
    of: fn(&str) -> Option<T>,
) -> Option<T> {
    let before = read.issues.len();
    let found = read.text(key, must, of);
    if found.is_none() && read.issues.len() == before {
        read.issue(key, must);
    }
    found
}

/// A number, where 0 and null are as if it weren't there.
fn or_zero<T: TryFrom<u64>>(read: &mut Reader<'_>, key: &str, most: u64) -> Option<T> {
    let nothing = |value: &Value| value.is_null() || whole(value) == Some(0);
    match read.value(key).is_some_and(nothing) {
        true => None,
        false => read.number(key, most),
    }
}

/// Reads an object within, if it is there; says whether it is.
fn within(
    top: &mut Reader<'_>,
    warnings: &mut Warnings,
    key: &str,
    known: &[&str],
    read: impl FnOnce(&mut Reader<'_>),
) -> bool {
    let path = join("machine", key);
    match top.value(key) {
        None | Some(Value::Null) => false,
        Some(Value::Object(object)) => {
            let mut inner = Reader::new(object, &path);
            warnings.of(&inner, known);
            read(&mut inner);
            top.issues.append(&mut inner.issues);
            true
        }
        Some(_) => {
            top.issue(key, "an object");
            true
        }
    }
}

#[derive(Default)]
struct Warnings {
    texts: Vec<String>,
    more: usize,
}

impl Warnings {
    fn push(&mut self, text: String) {
        match self.texts.len() < MAX_WARNINGS {
            true => self.texts.push(text),
            false => self.more += 1,
        }
    }

    /// One for each key that isn't known.
    fn of(&mut self, read: &Reader<'_>, known: &[&str]) {
        for path in read.others(|key| known.contains(&key)) {
            self.push(format!("{path} is ignored: version 0 doesn't know it"));
        }
    }

    fn done(mut self) -> Vec<String> {
        if self.more > 0 {
            self.texts
                .push(format!("and {} more are ignored", self.more));
        }
        self.texts
    }
}
