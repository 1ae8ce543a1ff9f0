//! A SHA-256 digest in its text form `sha256:<64 hex digits>`: how images are named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Code, Error};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^sha256:[0-9a-f]{64}$")]
pub struct Digest(String);

impl Digest {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        use fmt::Write;
        let mut hex = String::with_capacity(64);
        for byte in bytes {
            // Writing to a String can't fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    /// The 64 hex digits, which is also the name of the image's folder.
    pub fn hex(&self) -> &str {
        &self.0
    }

    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl FromStr for Digest {
    type Err = Error;

    /// Takes `sha256:HEX` or bare `HEX`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Self(hex.to_ascii_lowercase()));
        }
        Err(Error::new(
            Code::InvalidArgument,
            format!("{text} is not a SHA-256 digest"),
        )
        .advise("Give the checksum as sha256: followed by 64 hexadecimal digits."))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_both_forms_and_nothing_else() {
        let hex = "ab".repeat(32);
        let digest: Digest = hex.parse().unwrap();
        assert_eq!(
            digest,
            format!("sha256:{}", hex.to_uppercase()).parse().unwrap()
        );
        assert_eq!(digest, Digest::from_bytes([0xab; 32]));
        for bad in ["", "sha256:", "sha512:00", &hex[1..], "sha256:zz"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
