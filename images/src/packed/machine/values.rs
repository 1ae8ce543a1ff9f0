//! The words of machine.json, version 1. What is listed here is accepted for ever; what today's QEMU makes
//! of it is decided in `instances/src/qemu/hardware.rs`.

use serde::Serialize;

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
        pub enum $name { $(#[serde(rename = $text)] $variant,)* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// As it stands in machine.json.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl Word for $name {
            const WORDS: &'static [&'static str] = &[$($text,)*];

            fn of(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
        }
    )*};
}

/// A value that is one of a few words.
pub(super) trait Word: Sized {
    const WORDS: &'static [&'static str];

    fn of(text: &str) -> Option<Self>;
}

words! {
    Chipset {
        PcI440fx28 = "pc-i440fx-2.8",
    }
    Cpu {
        Host = "host",
    }
    /// The USB controller.
    Usb {
        Piix3 = "piix3-usb-uhci",
        Piix4 = "piix4-usb-uhci",
        Xhci = "nec-usb-xhci",
    }
    /// The model of the first network card.
    Network {
        Rtl8139 = "rtl8139",
        E1000 = "e1000",
    }
    Storage {
        VirtioBlkPci = "virtio-blk-pci",
    }
    Graphics {
        Vga = "VGA",
        VmwareSvga = "vmware-svga",
        QxlVga = "qxl-vga",
        VirtioVga = "virtio-vga",
    }
    Sound {
        None = "none",
        Ac97 = "AC97",
        Es1370 = "ES1370",
        HdaDuplexIntel = "hda-duplex/intel-hda",
        HdaMicroIntel = "hda-micro/intel-hda",
        HdaOutputIntel = "hda-output/intel-hda",
        HdaDuplexIch9 = "hda-duplex/ich9-intel-hda",
        HdaMicroIch9 = "hda-micro/ich9-intel-hda",
        HdaOutputIch9 = "hda-output/ich9-intel-hda",
    }
    Keyboard {
        UsbKbd = "usb-kbd",
        Ps2 = "PS/2",
    }
    KeyboardLayout {
        Ar = "ar",
        Da = "da",
        De = "de",
        DeCh = "de-ch",
        EnGb = "en-gb",
        EnUs = "en-us",
        Es = "es",
        Et = "et",
        Fi = "fi",
        Fo = "fo",
        Fr = "fr",
        FrBe = "fr-be",
        FrCa = "fr-ca",
        FrCh = "fr-ch",
        Hr = "hr",
        Hu = "hu",
        Is = "is",
        It = "it",
        Ja = "ja",
        Lt = "lt",
        Lv = "lv",
        Mk = "mk",
        Nl = "nl",
        NlBe = "nl-be",
        No = "no",
        Pl = "pl",
        Pt = "pt",
        PtBr = "pt-br",
        Ru = "ru",
        Sl = "sl",
        Sv = "sv",
        Th = "th",
        Tr = "tr",
    }
    Mouse {
        UsbMouse = "usb-mouse",
        Ps2 = "PS/2",
    }
    Tablet {
        UsbTablet = "usb-tablet",
        None = "none",
    }
}
