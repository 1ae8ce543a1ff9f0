//! What the words become, what is taken where something is missing, and that no two devices share a slot.

use super::*;

const MACHINES: &str = "Supported machines are:\n\
    pc-i440fx-9.2        Standard PC (i440FX + PIIX, 1996)\n\
    pc-i440fx-2.12       Standard PC (i440FX + PIIX, 1996) (deprecated)\n\
    pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n\
    pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)\n\
    q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)\n";

const DEVICES: &str = "Display devices:\n\
    name \"VGA\", bus PCI\n\
    name \"virtio-vga\", bus PCI\n\
    \n\
    Network devices:\n\
    name \"e1000\", bus PCI, alias \"e1000-82540em\", desc \"Intel Gigabit Ethernet\"\n\
    name \"usb-kbd\", bus usb-bus\n\
    name \"usb-mouse\", bus usb-bus\n\
    name \"piix3-usb-uhci\", bus PCI\n\
    name \"hda-duplex\", bus HDA\n\
    name \"ich9-intel-hda\", bus PCI\n\
    name \"AC97\", bus PCI\n";

fn some() -> Abilities {
    Abilities::parse(MACHINES, DEVICES)
}

#[test]
fn what_a_qemu_says_of_itself() {
    let has = some();
    assert_eq!(has.i440fx.as_deref(), Some("pc-i440fx-10.0"));
    assert!(has.has("e1000") && has.has("hda-duplex/ich9-intel-hda"));
    assert!(!has.has("e1000-82540em") && !has.has("hda-duplex/intel-hda"));
    let named = "pc   Standard PC (alias of pc-i440fx-noble)\npc-i440fx-noble  Ubuntu\n";
    let has = Abilities::parse(named, "");
    assert_eq!(has.i440fx.as_deref(), Some("pc-i440fx-noble"));
    let none = Abilities::parse("q35  x (alias of pc-q35-10.0)\npc x (alias of isapc)\n", "");
    assert_eq!(none, Abilities::default());
}

#[test]
fn what_is_there_stays_as_it_is_wanted() {
    let mut usual = Hardware::default();
    assert!(usual.is_usual());
    let mut full = some();
    full.devices.insert("virtio-net-pci".into());
    assert_eq!(usual.fit(&full), Vec::<String>::new());
    assert!(usual.is_usual());
    let wanted = Hardware {
        nic: NicModel::E1000,
        usb: Some(UsbController::Piix3),
        graphics: Some(Graphics::VirtioVga),
        sound: Some(Sound::DuplexIch9),
        inputs: vec![UsbInput::Keyboard, UsbInput::Mouse],
        ..Hardware::default()
    };
    let mut fitted = wanted.clone();
    assert_eq!(fitted.fit(&some()), Vec::<String>::new());
    assert_eq!(fitted, wanted);
    assert!(!wanted.is_usual());
}

#[test]
fn what_is_not_there_is_replaced_by_what_is_nearest_and_told() {
    let mut wanted = Hardware {
        nic: NicModel::Rtl8139,
        graphics: Some(Graphics::Qxl),
        sound: Some(Sound::DuplexIntel),
        inputs: vec![UsbInput::Keyboard, UsbInput::Mouse, UsbInput::Tablet],
        ..Hardware::default()
    };
    let notes = wanted.fit(&some());
    let expected = Hardware {
        nic: NicModel::E1000,
        graphics: Some(Graphics::Vga),
        sound: Some(Sound::DuplexIch9),
        usb: Some(UsbController::Piix3),
        inputs: vec![UsbInput::Keyboard, UsbInput::Mouse],
        ..Hardware::default()
    };
    assert_eq!(wanted, expected);
    assert_eq!(
        notes,
        [
            "This QEMU has no rtl8139: the machine has e1000 instead.",
            "This QEMU has no qxl-vga: the machine has VGA instead.",
            "This QEMU has no hda-duplex/intel-hda: the machine has hda-duplex/ich9-intel-hda instead.",
            "This QEMU has no nec-usb-xhci: the machine has piix3-usb-uhci instead.",
            "This QEMU has no usb-tablet: the machine goes without.",
        ]
    );
    // Told once: what was found is what is kept.
    assert_eq!(wanted.fit(&some()), Vec::<String>::new());
    let mut bare = Hardware {
        graphics: Some(Graphics::Vga),
        sound: Some(Sound::Es1370),
        ..wanted
    };
    assert_eq!(bare.fit(&Abilities::default()).len(), 4);
    assert!(bare.is_usual());
    // A card without a codec has another driver.
    let mut card = Hardware {
        sound: Some(Sound::Es1370),
        ..Hardware::default()
    };
    card.fit(&some());
    assert_eq!(card.sound, Some(Sound::Ac97));
}

#[test]
fn three_inputs_on_two_ports() {
    let ports = |usb, inputs: &[UsbInput]| {
        let hardware = Hardware {
            usb: Some(usb),
            inputs: inputs.to_vec(),
            ..Hardware::default()
        };
        let options = hardware.options(&OLD).into_iter().skip(1);
        let ports = options.map(|(_, text)| text.rsplit_once("port=").unwrap().1.to_owned());
        ports.collect::<Vec<_>>()
    };
    use UsbInput::{Keyboard, Mouse, Tablet};
    let all = [Keyboard, Mouse, Tablet];
    assert_eq!(ports(UsbController::Xhci, &all), ["1", "2", "3"]);
    assert_eq!(ports(UsbController::Piix4, &all), ["2", "1", "2.1", "2.2"]);
    assert_eq!(ports(UsbController::Piix3, &all[1..]), ["1", "2"]);
}

#[test]
fn no_two_devices_share_a_slot() {
    for slots in [&Q35, &OLD] {
        let mut used: Vec<u8> = [
            slots.disk,
            slots.seed,
            slots.ports,
            slots.rng,
            slots.panic,
            slots.video,
            slots.usb,
            slots.sound,
        ]
        .iter()
        .map(|addr| u8::from_str_radix(addr.strip_prefix("0x").unwrap(), 16).unwrap())
        .collect();
        match slots.bus {
            // The bridge, the ISA bridge; and our root ports.
            "pcie.0" => used.extend([0, 0x1f, 0x7, 0x8, 0x10]),
            _ => {
                used.extend([0, 1]);
                let cards = [Port::Nic]
                    .into_iter()
                    .chain((0..Port::SPARE).map(Port::Spare));
                used.extend(cards.map(|port| {
                    let addr = Socket::of("pc-i440fx-10.0", port).addr.unwrap();
                    u8::from_str_radix(addr.strip_prefix("0x").unwrap(), 16).unwrap()
                }));
            }
        }
        assert!(used.iter().all(|slot| *slot < 32));
        let all = used.len();
        used.sort_unstable();
        used.dedup();
        assert_eq!(used.len(), all, "{}", slots.bus);
    }
    let modern = Socket::of("pc-q35-10.0", Port::Nic);
    assert_eq!(modern.option(), "bus=port-nic");
    assert_eq!(
        Socket::of("pc-i440fx-8.2", Port::Nic).option(),
        "bus=pci.0,addr=0x5"
    );
}

#[test]
fn a_row_without_hardware_is_read_and_one_with_it_written_back() {
    assert!(serde_json::from_str::<Hardware>("{}").unwrap().is_usual());
    let hardware = Hardware {
        topology: Some(Topology {
            sockets: 1,
            cores: 2,
            threads: 2,
        }),
        keyboard_layout: Some("nl-be".into()),
        sound: Some(Sound::MicroIch9),
        ..Hardware::default()
    };
    assert_eq!(hardware.keymap(), Some("nl"));
    // No text names a file of the host.
    let hostile: Hardware = serde_json::from_str(r#"{"cdrom": "/etc/shadow"}"#).unwrap();
    assert_eq!(hostile.cdrom, None);
    // Another number of CPUs, and back.
    assert_eq!(hardware.with_cpus(4), hardware);
    assert_eq!(hardware.with_cpus(3).topology, None);
    assert_eq!(hardware.with_cpus(3).sound, hardware.sound);
    let text = serde_json::to_string(&hardware).unwrap();
    assert_eq!(serde_json::from_str::<Hardware>(&text).unwrap(), hardware);
}
