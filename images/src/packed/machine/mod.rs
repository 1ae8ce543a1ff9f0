//! machine.json: the hardware that an image wants, in the words of version 1, which are kept for ever
//! (docs/packed-images.md).
//!
//! ```text
//! values   the words that a field may have
//! parse    bytes → Machine         strict and bounded; every issue is told
//! migrate  version 0 → version 1
//! limits   what is not said is filled up to what the host allows
//! ```
//!
//! Next step: the daemon merges it with what the launch asks for, and
//! `instances/src/qemu/hardware.rs` says it in QEMU's words.

mod limits;
mod migrate;
mod parse;
#[cfg(test)]
mod tests;
mod values;

use pileus_base::Mac;
use serde::de::Error as _;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

pub use limits::MachineLimits;
pub use parse::{MAX_BYTES, Parsed};
pub use values::{
    Chipset, Cpu, Graphics, Keyboard, KeyboardLayout, Mouse, Network, Sound, Storage, Tablet, Usb,
};

/// The version that is written.
const VERSION: u32 = 1;

macro_rules! machine {
    ($($(#[$doc:meta])* $field:ident = $name:literal : $type:ty,)*) => {
        /// A machine; what is not set is left to whoever makes one of it. Its serde form is that of
        /// machine.json, version 1.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
        pub struct Machine { $($(#[$doc])* pub $field: Option<$type>,)* }

        /// The names of the fields in machine.json, besides `version`.
        const FIELDS: &[&str] = &[$($name,)*];

        impl Machine {
            /// This one, and `defaults` for what it leaves open.
            #[must_use]
            pub fn with_defaults(&self, defaults: &Self) -> Self {
                Self { $($field: self.$field.clone().or_else(|| defaults.$field.clone()),)* }
            }
        }

        impl Serialize for Machine {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let set = 1 $(+ usize::from(self.$field.is_some()))*;
                let mut out = serializer.serialize_struct("Machine", set)?;
                out.serialize_field("version", &VERSION)?;
                $(match &self.$field {
                    Some(value) => out.serialize_field($name, value)?,
                    None => out.skip_field($name)?,
                })*
                out.end()
            }
        }
    };
}

machine! {
    uuid = "uuid": Uuid,
    chipset = "chipset": Chipset,
    cpu = "cpu": Cpu,
    /// Flags of the processor: version 1 knows none.
    flags = "flags": [Cpu; 0],
    /// 1 to 255, as the next two.
    threads = "threads": u8,
    cores = "cores": u8,
    sockets = "sockets": u8,
    /// MiB, 1 to 1048576.
    memory = "memory": u32,
    usb = "usb": Usb,
    network = "network": Network,
    /// Local and unicast.
    mac = "mac": Mac,
    storage = "storage": Storage,
    graphics = "graphics": Graphics,
    sound = "sound": Sound,
    keyboard = "keyboard": Keyboard,
    keyboard_layout = "keyboardLayout": KeyboardLayout,
    mouse = "mouse": Mouse,
    tablet = "tablet": Tablet,
}

impl Machine {
    /// The file's bytes: only what is set, and the version. The same machine gives the same bytes.
    pub fn to_json(&self) -> Vec<u8> {
        // It has only numbers and plain text: it can always be written.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Whether it leaves everything open.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl<'de> Deserialize<'de> for Machine {
    /// As strict as [`Machine::parse`], but version 1 only.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        parse::version_1(&value).map_err(|issues| D::Error::custom(issues.join("; ")))
    }
}
