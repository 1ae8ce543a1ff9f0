//! Instance names: letters, digits and hyphens, beginning with a letter and ending with a letter or
//! digit (so that a name is a DNS label and a hostname), 63 bytes at most.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Code, Error};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$")]
pub struct InstanceName(String);

impl InstanceName {
    pub const MAX: usize = 63;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InstanceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bytes = text.as_bytes();
        let ok = bytes.len() <= Self::MAX
            && bytes.first().is_some_and(u8::is_ascii_alphabetic)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || *b == b'-');
        if ok {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::new(
            Code::InvalidName,
            format!("Invalid instance name supplied: {text}"),
        )
        .advise(
            "A name has 1 to 63 letters, digits or hyphens, begins with a letter and does not \
             end with a hyphen.",
        ))
    }
}

impl TryFrom<String> for InstanceName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<InstanceName> for String {
    fn from(name: InstanceName) -> Self {
        name.0
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for InstanceName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A snapshot's name within its instance; the rule is that of instance names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$")]
pub struct SnapshotName(InstanceName);

impl SnapshotName {
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for SnapshotName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let name = text.parse().map_err(|err: Error| {
            Error::new(
                Code::InvalidName,
                format!("Invalid snapshot name supplied: {text}"),
            )
            .advise(err.advice.unwrap_or_default())
        })?;
        Ok(Self(name))
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.0.into()
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_names() {
        let long = "a".repeat(63);
        for name in ["a", "A1", "foo-bar", "x--y", long.as_str()] {
            assert!(name.parse::<InstanceName>().is_ok(), "{name}");
        }
        let too_long = "a".repeat(64);
        for name in [
            "",
            "1a",
            "-a",
            "a-",
            "a_b",
            "a.b",
            "a b",
            "ä",
            "a/b",
            "../x",
            "a\0",
            "a\n",
            too_long.as_str(),
        ] {
            let err = name.parse::<InstanceName>().unwrap_err();
            assert_eq!(err.code, Code::InvalidName, "{name:?}");
            let err = name.parse::<SnapshotName>().unwrap_err();
            assert_eq!(err.code, Code::InvalidName, "{name:?}");
            assert!(err.message.contains("snapshot"), "{err}");
        }
    }
}
