//! What machine an instance gets: what the launch asks for goes before what the image's machine.json says,
//! and that before what is usual. Decided once, at the launch, and kept with the instance.
//!
//! Next step: `launch.rs` writes it into the row; `instances/src/qemu/hardware.rs` knows what QEMU has.

use pileus_base::{Code, Error, InstanceName, Mac, Reporter, Result, Size};
use pileus_images::packed::Machine;
use pileus_images::packed::machine::{
    Graphics as G, Keyboard, MachineLimits, Mouse, Network, Sound as S, Tablet, Usb,
};
use pileus_instances::driver::Host;
use pileus_instances::qemu::hardware::{
    Graphics, Hardware, NicModel, Sound, Topology, UsbController, UsbInput,
};

use super::Service;
use super::order::{DEFAULT_MEMORY, MAX_CPUS, Wanted};
use super::registry::Instance;
use crate::state;

/// QEMU's firmware needs as much.
const LEAST_MEMORY: Size = Size::mib(16);

/// A machine that was decided on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decided {
    pub cpus: u32,
    pub memory: Size,
    pub hardware: Hardware,
    /// It has the chipset of 1996.
    pub old_chipset: bool,
    pub mac: Option<Mac>,
    /// What the user should know; a sentence each.
    pub notes: Vec<String>,
}

impl Decided {
    /// Why it can't start from a template, which is always a usual machine.
    pub fn obstacle(&self) -> Option<String> {
        let own = self.old_chipset || self.mac.is_some() || !self.hardware.is_usual();
        own.then(|| "the image or the launch asks for hardware of its own".to_owned())
    }
}

/// Decides. `host_memory`: all that the host has, if it can be known.
pub(super) fn decide(
    wanted: &Wanted,
    image: Option<&Machine>,
    host_memory: Option<Size>,
) -> Result<Decided> {
    let nothing = Machine::default();
    let asked = wanted.machine.as_ref();
    let machine = asked.map_or(&nothing, |asked| &asked.machine);
    let machine = machine.with_defaults(image.unwrap_or(&nothing));
    let mut notes = asked.map_or(Vec::new(), |asked| asked.warnings.clone());
    let said = machine.memory.map(|mib| Size::mib(mib.into()));
    let memory = match (wanted.memory, said) {
        (Some(memory), _) => memory,
        (None, None) => DEFAULT_MEMORY,
        (None, Some(said)) if said < LEAST_MEMORY => {
            notes.push(format!(
                "The machine.json asks for {said} of memory; the least that a machine can \
                 have is {LEAST_MEMORY}."
            ));
            LEAST_MEMORY
        }
        (None, Some(said)) => said,
    };
    if let Some(has) = host_memory
        && wanted.memory.is_none()
        && said.is_some_and(|said| said > has)
    {
        return Err(Error::new(
            Code::NoMemory,
            format!("The machine.json asks for {memory} of memory, and this host has {has}"),
        )
        .advise("Give the instance less with --memory."));
    }
    let (cpus, topology) = match (wanted.cpus, machine.cpus()) {
        (Some(cpus), said) if said != Some(cpus) => (cpus, None),
        (None, None) => (1, None),
        _ => processors(&machine)?,
    };
    let old_chipset = machine.chipset.is_some();
    let hardware = Hardware {
        topology,
        uuid: machine.uuid,
        ..devices(&machine)
    };
    Ok(Decided {
        cpus,
        memory,
        hardware,
        old_chipset,
        mac: machine.mac,
        notes,
    })
}

/// The processors that the machine says; what it leaves open is one.
fn processors(machine: &Machine) -> Result<(u32, Option<Topology>)> {
    let limits = MachineLimits {
        max_memory: u32::MAX,
        max_cpus: MAX_CPUS,
        default_threads: 1,
    };
    let all = Machine {
        threads: machine.threads.or(Some(1)),
        cores: machine.cores.or(Some(1)),
        sockets: machine.sockets.or(Some(1)),
        ..Machine::default()
    };
    let all = limits
        .apply(&all)
        .map_err(|err| err.advise("Give the instance another number of CPUs with --cpus."))?;
    let each = |count: Option<u8>| u32::from(count.unwrap_or(1));
    let topology = Topology {
        sockets: each(all.sockets),
        cores: each(all.cores),
        threads: each(all.threads),
    };
    // What every machine has needs no word.
    let own = topology.sockets > 1 || topology.threads > 1;
    Ok((all.cpus().unwrap_or(1), own.then_some(topology)))
}

/// The words of machine.json in those of the hypervisor.
fn devices(machine: &Machine) -> Hardware {
    let inputs = [
        (machine.keyboard == Some(Keyboard::UsbKbd)).then_some(UsbInput::Keyboard),
        (machine.mouse == Some(Mouse::UsbMouse)).then_some(UsbInput::Mouse),
        (machine.tablet == Some(Tablet::UsbTablet)).then_some(UsbInput::Tablet),
    ];
    Hardware {
        nic: match machine.network {
            None => NicModel::default(),
            Some(Network::Rtl8139) => NicModel::Rtl8139,
            Some(Network::E1000) => NicModel::E1000,
        },
        usb: machine.usb.map(|usb| match usb {
            Usb::Piix3 => UsbController::Piix3,
            Usb::Piix4 => UsbController::Piix4,
            Usb::Xhci => UsbController::Xhci,
        }),
        graphics: machine.graphics.map(|graphics| match graphics {
            G::Vga => Graphics::Vga,
            G::VmwareSvga => Graphics::VmwareSvga,
            G::QxlVga => Graphics::Qxl,
            G::VirtioVga => Graphics::VirtioVga,
        }),
        sound: machine.sound.and_then(|sound| match sound {
            S::None => None,
            S::Ac97 => Some(Sound::Ac97),
            S::Es1370 => Some(Sound::Es1370),
            S::HdaDuplexIntel => Some(Sound::DuplexIntel),
            S::HdaMicroIntel => Some(Sound::MicroIntel),
            S::HdaOutputIntel => Some(Sound::OutputIntel),
            S::HdaDuplexIch9 => Some(Sound::DuplexIch9),
            S::HdaMicroIch9 => Some(Sound::MicroIch9),
            S::HdaOutputIch9 => Some(Sound::OutputIch9),
        }),
        inputs: inputs.into_iter().flatten().collect(),
        // Without a display nobody types.
        keyboard_layout: machine
            .graphics
            .and(machine.keyboard_layout)
            .map(|layout| layout.as_str().to_owned()),
        ..Hardware::default()
    }
}

impl Service {
    /// Fits the machine to this host's QEMU, and gives the instance the addresses that the image names if
    /// nobody has them. The machine type comes back.
    pub(super) async fn settle(
        &self,
        instance: &Instance,
        decided: &mut Decided,
        host: &Host,
        report: &Reporter,
    ) -> Result<String> {
        let mut machine_type = host.qemu.machine_type.clone();
        if decided.old_chipset || !decided.hardware.is_usual() {
            let has = host.qemu.abilities().await?;
            decided.notes.extend(decided.hardware.fit(&has));
            match has.i440fx {
                Some(old) if decided.old_chipset => machine_type = old,
                None if decided.old_chipset => decided.notes.push(format!(
                    "This QEMU has no i440fx chipset: the machine is a {machine_type}."
                )),
                _ => {}
            }
        }
        self.claim(instance, decided).await?;
        for note in &decided.notes {
            report.warn(note.clone());
        }
        Ok(machine_type)
    }

    /// The first instance of an image gets the MAC address and the id that the image names; further ones
    /// get their own, or two guests would be one to the network.
    async fn claim(&self, instance: &Instance, decided: &mut Decided) -> Result<()> {
        if decided.mac.is_none() && decided.hardware.uuid.is_none() {
            return Ok(());
        }
        let mut row = instance.row();
        let (mac, mut hardware) = (decided.mac, decided.hardware.clone());
        let (row, notes) = self
            .parts
            .state
            .run(move |tx| {
                let mut notes = Vec::new();
                if let Some(mac) = mac {
                    match state::instances::mac_holder(tx, row.id, mac)? {
                        None => row.mac = mac,
                        Some(other) => notes.push(taken(&format!("MAC address {mac}"), &other)),
                    }
                }
                if let Some(uuid) = hardware.uuid
                    && let Some(other) = state::instances::uuid_holder(tx, row.id, uuid)?
                {
                    hardware.uuid = None;
                    notes.push(taken(&format!("UUID {uuid}"), &other));
                }
                row.spec.hardware = hardware;
                // At once, so that nobody else finds them free.
                state::instances::update(tx, &row)?;
                Ok((row, notes))
            })
            .await?;
        decided.hardware = row.spec.hardware;
        decided.mac = decided.mac.and(Some(row.mac));
        decided.notes.extend(notes);
        let claimed = instance.change(|now| now.mac = row.mac);
        claimed.await.map(drop)
    }
}

fn taken(what: &str, other: &InstanceName) -> String {
    format!("The image's {what} is that of instance '{other}' already: this one gets its own.")
}

#[cfg(test)]
mod tests {
    use pileus_images::packed::machine as words;

    use super::*;

    fn wanted(cpus: Option<u32>, memory: Option<Size>) -> Wanted {
        super::super::order::check_shape(None, cpus, memory).unwrap()
    }

    fn machine(json: &str) -> Machine {
        Machine::parse(json.as_bytes()).unwrap().machine
    }

    fn decided(json: &str) -> Decided {
        decide(&wanted(None, None), Some(&machine(json)), None).unwrap()
    }

    #[test]
    fn without_a_word_it_is_as_ever() {
        for empty in [None, Some(&Machine::default())] {
            let usual = decide(&wanted(None, None), empty, Some(Size::mib(1))).unwrap();
            assert_eq!((usual.cpus, usual.memory), (1, Size::gib(1)));
            assert_eq!(usual.obstacle(), None);
            assert!(usual.hardware.is_usual() && usual.notes.is_empty());
        }
        // A shape alone is nothing special.
        let shape = decided(r#"{"version":1,"cores":3,"memory":700}"#);
        assert_eq!((shape.cpus, shape.memory), (3, Size::mib(700)));
        assert_eq!(shape.obstacle(), None);
    }

    #[test]
    fn who_goes_before_whom() {
        let image = machine(
            r#"{"version":1,"memory":700,"cores":2,"threads":2,"graphics":"VGA","network":"e1000"}"#,
        );
        let asked = |cpus, memory, own: Option<&str>| {
            let mut wanted = wanted(cpus, memory);
            wanted.machine = own.map(|json| Machine::parse(json.as_bytes()).unwrap());
            decide(&wanted, Some(&image), None).unwrap()
        };
        let plain = asked(None, None, None);
        let topology = Some(Topology {
            sockets: 1,
            cores: 2,
            threads: 2,
        });
        assert_eq!((plain.cpus, plain.memory), (4, Size::mib(700)));
        assert_eq!(plain.hardware.topology, topology);
        let flags = asked(Some(3), Some(Size::mib(600)), None);
        assert_eq!((flags.cpus, flags.memory), (3, Size::mib(600)));
        assert_eq!(flags.hardware.topology, None);
        assert_eq!(asked(Some(4), None, None).hardware.topology, topology);
        let own = r#"{"version":1,"memory":650,"graphics":"virtio-vga","sockets":2}"#;
        let own = asked(None, None, Some(own));
        assert_eq!((own.cpus, own.memory), (8, Size::mib(650)));
        assert_eq!(own.hardware.graphics, Some(Graphics::VirtioVga));
        assert_eq!(own.hardware.nic, NicModel::E1000);
        let both = asked(
            Some(1),
            Some(Size::mib(800)),
            Some(r#"{"version":1,"memory":650}"#),
        );
        assert_eq!((both.cpus, both.memory), (1, Size::mib(800)));
    }

    #[test]
    fn whose_fault_too_much_is() {
        let large = machine(r#"{"version":1,"memory":2048}"#);
        let host = Some(Size::gib(1));
        let err = decide(&wanted(None, None), Some(&large), host).unwrap_err();
        assert_eq!(err.code, Code::NoMemory);
        assert!(err.advice.unwrap().contains("--memory"));
        decide(&wanted(None, Some(Size::mib(600))), Some(&large), host).unwrap();
        let many = machine(r#"{"version":1,"cores":255,"threads":2}"#);
        let err = decide(&wanted(None, None), Some(&many), None).unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
        assert!(err.message.contains("510 CPUs"), "{err}");
        assert!(err.advice.unwrap().contains("--cpus"));
        decide(&wanted(Some(2), None), Some(&many), None).unwrap();
        let small = decided(r#"{"version":1,"memory":1}"#);
        assert_eq!((small.memory, small.notes.len()), (LEAST_MEMORY, 1));
    }

    #[test]
    fn hardware_of_its_own_always_boots() {
        for json in [
            r#"{"version":1,"chipset":"pc-i440fx-2.8"}"#,
            r#"{"version":1,"mac":"aa:54:1a:30:5c:de"}"#,
            r#"{"version":1,"uuid":"52bab607-10f1-4049-a0f8-ee4725cb715b"}"#,
            r#"{"version":1,"threads":2}"#,
            r#"{"version":1,"network":"rtl8139"}"#,
            r#"{"version":1,"tablet":"usb-tablet"}"#,
            r#"{"version":1,"sound":"AC97"}"#,
            r#"{"version":1,"usb":"nec-usb-xhci"}"#,
        ] {
            assert!(decided(json).obstacle().is_some(), "{json}");
        }
        // These say what every machine is.
        let usual = r#"{"version":1,"cpu":"host","flags":[],"storage":"virtio-blk-pci",
            "sound":"none","keyboard":"PS/2","mouse":"PS/2","tablet":"none","keyboardLayout":"de"}"#;
        assert_eq!(decided(usual).obstacle(), None);
    }

    /// The words of both crates are the same, one by one.
    #[test]
    fn each_word_becomes_itself() {
        let one = |field: &str, word: &str| {
            let json = format!("{{\"version\":1,\"graphics\":\"VGA\",\"{field}\":\"{word}\"}}");
            decided(&json).hardware
        };
        for graphics in words::Graphics::ALL {
            let word = graphics.as_str();
            assert_eq!(one("graphics", word).graphics.unwrap().as_str(), word);
        }
        for network in words::Network::ALL {
            let word = network.as_str();
            assert_eq!(one("network", word).nic.as_str(), word);
        }
        for usb in words::Usb::ALL {
            let word = usb.as_str();
            assert_eq!(one("usb", word).usb.unwrap().as_str(), word);
        }
        for sound in words::Sound::ALL {
            let word = sound.as_str();
            let found = one("sound", word).sound.map_or("none", Sound::as_str);
            assert_eq!(found, word);
        }
        for layout in words::KeyboardLayout::ALL {
            let word = layout.as_str();
            let found = one("keyboardLayout", word).keyboard_layout;
            assert_eq!(found.as_deref(), Some(word));
        }
        for (field, word) in [
            ("keyboard", "usb-kbd"),
            ("mouse", "usb-mouse"),
            ("tablet", "usb-tablet"),
        ] {
            let inputs = one(field, word).inputs;
            let found: Vec<_> = inputs.iter().map(|input| input.as_str()).collect();
            assert_eq!(found, [word]);
        }
    }
}
