//! The hardware address of a network card, `52:54:00:12:34:56`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Code, Error, Result};

/// A hardware address of a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    /// Takes `52:54:00:12:34:56`; a group address is refused.
    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::new(
                Code::InvalidArgument,
                format!("{text} is no hardware address of a NIC"),
            )
            .advise("Give six pairs of hexadecimal digits, the first one even: 52:54:00:12:34:56.")
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses() {
        let mac: Mac = "52:54:00:AB:0c:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:0c:01");
        for bad in [
            "",
            "52:54:00:ab:0c",
            "52:54:00:ab:0c:01:02",
            "53:54:00:ab:0c:01",
            "5254.00ab.0c01",
            "52:54:00:ab:0c:+1",
            "52:54:00:ab:0c:1",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
