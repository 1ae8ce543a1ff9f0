//! Sizes of memory and disks, in bytes. The grammar is the one that Multipass users know:
//! a whole number, or a decimal followed by K, M, G or T (each with an optional `B` or `iB`),
//! in any case, always in powers of 1024.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Code, Error};

/// A number of bytes. In JSON a plain integer; as text `1.0GiB`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct Size(pub u64);

impl Size {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Rounds up to a multiple of `unit` (a power of two).
    pub fn round_up(self, unit: u64) -> Self {
        Self(self.0.div_ceil(unit).saturating_mul(unit))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 >= 1 << shift {
                // Rounded down in tenths, so that a size never looks larger than it is.
                let tenths = u128::from(self.0) * 10 / (1 << shift);
                return write!(f, "{}.{}{unit}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text.trim()).ok_or_else(|| {
            Error::new(
                Code::InvalidSize,
                format!(
                    "{text} is not a valid memory size - need a non-negative integer (in base 10) \
                     or a decimal followed by K, M, or G (e.g. 1234B, 42MiB, 0.5G)"
                ),
            )
        })
    }
}

fn parse(text: &str) -> Option<Size> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if shift > 0 && !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 30 || fraction.contains('.') {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let bytes = whole.checked_mul(1 << shift)?;
    // Eighteen decimal places are far below one byte of a tebibyte; what follows can't matter.
    let fraction = &fraction[..fraction.len().min(18)];
    let part = if fraction.is_empty() {
        0
    } else {
        let scale = 10_u128.pow(fraction.len() as u32);
        (fraction.parse::<u128>().ok()? << shift) / scale
    };
    bytes.checked_add(u64::try_from(part).ok()?).map(Size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_spelling_of_the_reference() {
        for (text, bytes) in [
            ("0", 0),
            ("1073741824", 1 << 30),
            ("1234B", 1234),
            ("42MiB", 42 << 20),
            ("0.5G", 1 << 29),
            ("1.5G", 3 << 29),
            ("1G", 1 << 30),
            ("1g", 1 << 30),
            ("1GB", 1 << 30),
            ("2Gb", 2 << 30),
            ("20GB", 20 << 30),
            ("1GiB", 1 << 30),
            ("512MB", 512 << 20),
            ("2048M", 2 << 30),
            ("3k", 3 << 10),
            ("  7K  ", 7 << 10),
            ("1T", 1 << 40),
            ("0.1K", 102),
        ] {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size() {
        for text in [
            "",
            " ",
            "-1",
            "-1G",
            "1CiG",
            "1.5",
            "1.5B",
            "1.G",
            ".5G",
            "1e3",
            "0x10",
            "G",
            "1 G",
            "1GG",
            "1..5G",
            "1.5.5G",
            "99999999999999999999",
            "17179869184G",
            "+1G",
            "1,5G",
        ] {
            let err = text.parse::<Size>().unwrap_err();
            assert_eq!(err.code, Code::InvalidSize, "{text}");
        }
    }

    #[test]
    fn shown_in_tenths() {
        assert_eq!(Size::gib(1).to_string(), "1.0GiB");
        assert_eq!(Size(5_153_960_756).to_string(), "4.8GiB");
        assert_eq!(Size(1023).to_string(), "1023B");
        assert_eq!(Size::mib(1536).to_string(), "1.5GiB");
    }

    proptest! {
        #[test]
        fn plain_bytes_round_trip(n: u64) {
            prop_assert_eq!(n.to_string().parse::<Size>().unwrap(), Size(n));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = text.parse::<Size>();
        }
    }
}
