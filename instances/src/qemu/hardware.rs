//! The hardware that an image may choose, beside what every machine of ours has; and where things are
//! plugged in on each chipset. Its words are those of machine.json (`images/src/packed/machine/`), which
//! stay for ever; here they become what the QEMU of today has.
//!
//! Next step: `argv.rs` puts the devices on the command line.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::spec::Port;

macro_rules! devices {
    ($($(#[$doc:meta])* $name:ident { $($(#[$kind:meta])* $variant:ident = $text:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$kind])* #[serde(rename = $text)] $variant,)* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// QEMU's name of the device; of a sound card with a codec, codec and controller.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    )*};
}

devices! {
    /// The first network card, and those after it.
    #[derive(Default)]
    NicModel {
        #[default]
        Virtio = "virtio-net-pci",
        E1000 = "e1000",
        Rtl8139 = "rtl8139",
    }
    UsbController {
        Xhci = "nec-usb-xhci",
        Piix3 = "piix3-usb-uhci",
        Piix4 = "piix4-usb-uhci",
    }
    Graphics {
        Vga = "VGA",
        VirtioVga = "virtio-vga",
        VmwareSvga = "vmware-svga",
        Qxl = "qxl-vga",
    }
    Sound {
        Ac97 = "AC97",
        Es1370 = "ES1370",
        DuplexIntel = "hda-duplex/intel-hda",
        MicroIntel = "hda-micro/intel-hda",
        OutputIntel = "hda-output/intel-hda",
        DuplexIch9 = "hda-duplex/ich9-intel-hda",
        MicroIch9 = "hda-micro/ich9-intel-hda",
        OutputIch9 = "hda-output/ich9-intel-hda",
    }
    /// What is plugged into the USB controller.
    UsbInput {
        Keyboard = "usb-kbd",
        Mouse = "usb-mouse",
        Tablet = "usb-tablet",
    }
}

/// Processors; their product is the machine's number of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

/// What a machine has besides the usual; the default is a machine as any other. Kept with the instance,
/// so that it sees the same at each start. The chipset is the machine type's (`pc-i440fx-…`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hardware {
    /// None: one socket, and as many cores as CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    pub nic: NicModel,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usb: Option<UsbController>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graphics: Option<Graphics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sound: Option<Sound>,
    /// Each at most once. A PS/2 keyboard and mouse are always there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<UsbInput>,
    /// The layout of the keyboard of whoever looks at the display.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keyboard_layout: Option<String>,
    /// What the firmware says that the machine's id is; the instance's own if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// A CD, from which the firmware boots if it can't from the disk. Never kept, and never read: a file
    /// from outside (an archive's manifest) could name any file of the host.
    #[serde(skip)]
    pub cdrom: Option<PathBuf>,
}

/// What a QEMU can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    /// The newest versioned machine with the old chipset.
    pub i440fx: Option<String>,
    /// Names of all devices.
    pub devices: HashSet<String>,
}

impl Abilities {
    /// From what `-machine help` and `-device help` print.
    pub(super) fn parse(machines: &str, devices: &str) -> Self {
        let first_words = machines.lines().filter_map(|l| l.split_whitespace().next());
        let newest = first_words.filter_map(|name| {
            let (major, minor) = name.strip_prefix("pc-i440fx-")?.split_once('.')?;
            let version: (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
            Some((version, name.to_owned()))
        });
        let named = |line: &str| {
            let rest = line.split("name \"").nth(1)?;
            Some(rest.split('"').next()?.to_owned())
        };
        Self {
            // Some builds have names without a number.
            i440fx: newest.max().map(|(_, name)| name).or_else(|| {
                let alias = alias(machines, "pc")?;
                alias.starts_with(I440FX).then_some(alias)
            }),
            devices: devices.lines().filter_map(named).collect(),
        }
    }

    fn has(&self, device: &str) -> bool {
        device.split('/').all(|part| self.devices.contains(part))
    }

    /// The first that is there: the wanted one, or what is nearest to it.
    fn nearest<T: Copy>(
        &self,
        wanted: Option<T>,
        others: &[T],
        name: fn(T) -> &'static str,
        notes: &mut Vec<String>,
    ) -> Option<T> {
        let wanted = wanted?;
        if self.has(name(wanted)) {
            return Some(wanted);
        }
        let found = others.iter().copied().find(|other| self.has(name(*other)));
        let instead = match found {
            Some(other) => format!("the machine has {} instead", name(other)),
            None => "the machine goes without".to_owned(),
        };
        notes.push(format!("This QEMU has no {}: {instead}.", name(wanted)));
        found
    }
}

/// From the line `q35   Standard PC (…) (alias of pc-q35-10.0)`.
pub(super) fn alias(help: &str, of: &str) -> Option<String> {
    let line = help
        .lines()
        .find(|line| line.split_whitespace().next() == Some(of))?;
    let (_, rest) = line.rsplit_once("(alias of ")?;
    let name = rest.split(')').next()?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

impl Hardware {
    /// Whether what is no word of ours can stand in an option, and nothing is there twice.
    pub fn is_sound(&self) -> bool {
        let layout = self.keyboard_layout.as_deref().unwrap_or("en-us");
        let plain = layout.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        let twice = |n: usize| self.inputs[..n].contains(&self.inputs[n]);
        plain && (1..=16).contains(&layout.len()) && !(0..self.inputs.len()).any(twice)
    }

    /// Whether the machine is one as any other.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// The same for a machine with so many CPUs: a topology that makes another number is given up.
    #[must_use]
    pub fn with_cpus(&self, cpus: u32) -> Self {
        let product = |each: &Topology| {
            let cores = each.sockets.checked_mul(each.cores)?;
            cores.checked_mul(each.threads)
        };
        Self {
            topology: self.topology.filter(|each| product(each) == Some(cpus)),
            ..self.clone()
        }
    }

    /// Replaces what this QEMU doesn't have by what is nearest to it; a sentence for each.
    pub fn fit(&mut self, has: &Abilities) -> Vec<String> {
        let mut notes = Vec::new();
        let nics = [NicModel::E1000, NicModel::Rtl8139];
        let nic = has.nearest(Some(self.nic), &nics, NicModel::as_str, &mut notes);
        self.nic = nic.unwrap_or_default();
        self.graphics = has.nearest(self.graphics, Graphics::ALL, Graphics::as_str, &mut notes);
        let sounds: Vec<_> = self.sound.iter().flat_map(|sound| sound.like()).collect();
        self.sound = has.nearest(self.sound, &sounds, Sound::as_str, &mut notes);
        if !self.inputs.is_empty() && self.usb.is_none() {
            self.usb = Some(UsbController::Xhci);
        }
        self.usb = has.nearest(
            self.usb,
            UsbController::ALL,
            UsbController::as_str,
            &mut notes,
        );
        if self.usb.is_none() {
            self.inputs.clear();
        }
        self.inputs = std::mem::take(&mut self.inputs)
            .into_iter()
            .filter_map(|input| has.nearest(Some(input), &[], UsbInput::as_str, &mut notes))
            .collect();
        notes
    }

    /// The options of what is beside the usual, but for the display, in the order in which QEMU needs them.
    pub(super) fn options(&self, slots: &Slots) -> Vec<(&'static str, String)> {
        let bus = slots.bus;
        let mut options = Vec::new();
        let mut device = |text: String| options.push(("-device", text));
        if let Some(graphics) = self.graphics {
            let (name, addr) = (graphics.as_str(), slots.video);
            device(format!("{name},id=video,bus={bus},addr={addr}"));
        }
        if let Some(usb) = self.usb {
            let (name, addr) = (usb.as_str(), slots.usb);
            device(format!("{name},id=usb,bus={bus},addr={addr}"));
            // An UHCI controller has two ports only.
            let hub = usb != UsbController::Xhci && self.inputs.len() > 2;
            if hub {
                device("usb-hub,id=hub,bus=usb.0,port=2".to_owned());
            }
            for (number, input) in (1..).zip(&self.inputs) {
                let port = match (hub, number) {
                    (true, 2..) => format!("2.{}", number - 1),
                    _ => number.to_string(),
                };
                let name = input.as_str();
                device(format!("{name},id={name},bus=usb.0,port={port}"));
            }
        }
        if let Some(sound) = self.sound {
            let addr = slots.sound;
            let (codec, card) = sound.parts();
            options.push(("-audiodev", "none,id=audio".to_owned()));
            let audio = if codec.is_none() {
                ",audiodev=audio"
            } else {
                ""
            };
            let card = format!("{card},id=sound,bus={bus},addr={addr}{audio}");
            options.push(("-device", card));
            if let Some(codec) = codec {
                let codec = format!("{codec},id=codec,bus=sound.0,cad=0,audiodev=audio");
                options.push(("-device", codec));
            }
        }
        options
    }

    /// The name of the keyboard's layout in QEMU's words, if it is not the one that QEMU takes anyway.
    pub(super) fn keymap(&self) -> Option<&str> {
        match self.keyboard_layout.as_deref()? {
            "en-us" => None,
            // QEMU knew it once.
            "nl-be" => Some("nl"),
            layout => Some(layout),
        }
    }
}

impl Sound {
    /// Codec, if it has one, and card.
    fn parts(self) -> (Option<&'static str>, &'static str) {
        match self.as_str().split_once('/') {
            Some((codec, card)) => (Some(codec), card),
            None => (None, self.as_str()),
        }
    }

    /// Others that a guest's driver may take: the same codec, or the same kind.
    fn like(self) -> Vec<Self> {
        let (codec, _) = self.parts();
        let (same, kind): (Vec<_>, Vec<_>) = Self::ALL
            .iter()
            .copied()
            .filter(|other| other.parts().0.is_some() == codec.is_some())
            .partition(|other| codec.is_some() && other.parts().0 == codec);
        [same, kind].concat()
    }
}

const I440FX: &str = "pc-i440fx-";

/// Where the devices of a machine are plugged in. It never changes: a guest finds its devices where they
/// were, and a saved machine goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slots {
    pub bus: &'static str,
    /// A guest on the old chipset may know virtio's old form only.
    pub virtio: &'static str,
    pub disk: &'static str,
    pub seed: &'static str,
    pub ports: &'static str,
    pub rng: &'static str,
    pub panic: &'static str,
    pub video: &'static str,
    pub usb: &'static str,
    pub sound: &'static str,
    /// The device of power management.
    pub power: &'static str,
}

const Q35: Slots = Slots {
    bus: "pcie.0",
    virtio: ",disable-legacy=on",
    disk: "0x2",
    seed: "0x3",
    ports: "0x4",
    rng: "0x5",
    panic: "0x6",
    video: "0x1",
    usb: "0x1d",
    sound: "0x1b",
    power: "ICH9-LPC",
};

/// Video, USB, NIC, sound and disk are where the ancestor had them.
const OLD: Slots = Slots {
    bus: "pci.0",
    virtio: "",
    disk: "0x8",
    seed: "0x9",
    ports: "0xa",
    rng: "0xb",
    panic: "0xc",
    video: "0x2",
    usb: "0x3",
    sound: "0x6",
    power: "PIIX4_PM",
};

/// Whether the machine has PCI only, and no ports of PCI Express.
pub fn is_old(machine_type: &str) -> bool {
    machine_type.starts_with(I440FX)
}

pub(super) fn slots(machine_type: &str) -> &'static Slots {
    match is_old(machine_type) {
        true => &OLD,
        false => &Q35,
    }
}

/// Where a card is plugged in, while the machine runs or before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    pub bus: String,
    /// The slot, where the bus has more than one.
    pub addr: Option<String>,
}

impl Socket {
    pub fn of(machine_type: &str, port: Port) -> Self {
        match is_old(machine_type) {
            true => Self {
                bus: OLD.bus.to_owned(),
                addr: Some(match port {
                    Port::Nic => "0x5".to_owned(),
                    Port::Spare(n) => format!("{:#x}", 0x10 + n),
                }),
            },
            false => Self {
                bus: port.to_string(),
                addr: None,
            },
        }
    }

    pub(super) fn option(&self) -> String {
        match &self.addr {
            Some(addr) => format!("bus={},addr={addr}", self.bus),
            None => format!("bus={}", self.bus),
        }
    }
}

#[cfg(test)]
#[path = "hardware_tests.rs"]
mod tests;
