//! Making images: of an instance (`POST /v1/instances/{name}/pack`), and by a recipe (`POST /v1/images/build`).
//! Both answer with the bytes of a packed image and name their operation in a header; whoever closes the
//! connection ends the work.
//!
//! ```text
//! body of a build:   BuildRequest as one line of JSON, then the files of its `copy` steps, a tar each, as long
//!                    as `copies` says, in the order of the steps
//! ```
//!
//! A recipe is the same in JSON, where paths are absolute and files of its own were read by the client, and in
//! the YAML file that a person writes (docs/image-build.md).

use std::collections::BTreeMap;
use std::fmt;

use pileus_base::{Digest, Size, SnapshotName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use utoipa::ToSchema;

/// The media type of a build's body.
pub const BUILD_TYPE: &str = "application/vnd.pileus.build";

/// Bytes of a [`BuildRequest`]'s line, its end included.
pub const MOST_REQUEST: usize = 1 << 20;
/// Bytes of all files of a recipe's steps.
pub const MOST_COPIED: u64 = 2 << 30;
pub const MOST_STEPS: usize = 200;

/// What is to be packed, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PackRequest {
    /// One of its snapshots instead of what it is now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub snapshot: Option<SnapshotName>,
    /// The disk as it is, with all that makes the instance itself; nothing is booted.
    pub keep_identity: bool,
    /// Keep the image in the store as well, under this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Write the instance's memory and number of processors to the image.
    pub with_machine: bool,
    /// Seconds that its guest may take to boot, and again to shut down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}

/// A recipe to carry out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    pub recipe: Recipe,
    /// Keep the image in the store as well, under this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// If a step fails, the machine stays for a look; it goes an hour later, or with the daemon.
    #[serde(default)]
    pub keep_on_error: bool,
    /// Bytes of each `copy` step's tar, which follow the request.
    #[serde(default)]
    pub copies: Vec<u64>,
}

/// What an image is made of, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recipe {
    pub from: From,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "size"
    )]
    pub memory: Option<Size>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "size"
    )]
    pub disk: Option<Size>,
    /// For cloud-init, besides what pileus itself tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<Text>,
    /// How long a step takes at most that doesn't say; how long an installation takes at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Seconds>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Whether the result forgets who it was; it does if nothing is said.
    #[serde(default = "yes")]
    pub clean: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `machine.json` of the result, version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub machine: Option<serde_json::Map<String, serde_json::Value>>,
}

fn yes() -> bool {
    true
}

/// Bytes as a number, or as a person writes them: `2G`.
fn size<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Size>, D::Error> {
    struct Read;
    impl de::Visitor<'_> for Read {
        type Value = Size;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bytes, or 512M, 2G")
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
            Ok(Size(bytes))
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
            let bytes = u64::try_from(bytes);
            bytes
                .map(Size)
                .map_err(|_| E::custom("a size is not negative"))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
            text.parse()
                .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    input.deserialize_any(Read).map(Some)
}

/// Where a recipe begins: an image, as text; or an empty disk and what is booted beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum From {
    Image(String),
    Iso(Iso),
    Kernel(Kernel),
}

/// A CD that installs a system on an empty disk and powers the machine off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Iso {
    /// A file of the daemon's host, or an http(s) address.
    pub iso: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Digest>,
}

/// A kernel that does so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// A file of the daemon's host.
    pub kernel: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// Text that stands in the recipe, or a file of the client's that it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Text {
    Inline(String),
    /// Only in a recipe's file: a request has the text itself.
    File(TextFile),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TextFile {
    pub file: String,
}

/// One step: it either runs or copies something.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What it is called in messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A script, run as root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<Copy>,
    /// What runs the script: `sh -eu` if nothing is said. Words, without quotes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Seconds>,
}

/// Files of the client's for the guest; they belong to root there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Copy {
    /// A file or a folder, relative to the recipe.
    pub from: String,
    /// What it becomes: an absolute path. One that ends with `/` is the folder that it gets into.
    pub to: String,
}

/// A span of time: a number of seconds, or `90s`, `20m`, `2h` in a recipe's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ToSchema)]
#[schema(value_type = u64)]
pub struct Seconds(pub u64);

impl Seconds {
    fn parse(text: &str) -> Option<Self> {
        let (number, unit) = match text.char_indices().next_back()? {
            (at, 's') => (&text[..at], 1),
            (at, 'm') => (&text[..at], 60),
            (at, 'h') => (&text[..at], 3600),
            _ => (text, 1),
        };
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let number: u64 = digits.then(|| number.parse().ok())??;
        number.checked_mul(unit).map(Self)
    }
}

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Read;
        impl de::Visitor<'_> for Read {
            type Value = Seconds;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of seconds, or 90s, 20m, 2h")
            }

            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Seconds, E> {
                Ok(Seconds(seconds))
            }

            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Seconds, E> {
                let seconds = u64::try_from(seconds);
                let seconds = seconds.map_err(|_| E::custom("a time is not negative"))?;
                Ok(Seconds(seconds))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Seconds, E> {
                Seconds::parse(text)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        input.deserialize_any(Read)
    }
}

/// By hand, so that an error tells the line and the key that is wrong, which `untagged` does not.
impl<'de> Deserialize<'de> for From {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Keys {
            iso: Option<String>,
            checksum: Option<Digest>,
            kernel: Option<String>,
            initrd: Option<String>,
            cmdline: Option<String>,
        }
        struct Read;
        impl<'de> de::Visitor<'de> for Read {
            type Value = From;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an image, {iso: …} or {kernel: …}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<From, E> {
                Ok(From::Image(text.to_owned()))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<From, A::Error> {
                let keys = Keys::deserialize(de::value::MapAccessDeserializer::new(map))?;
                match keys {
                    Keys {
                        iso: Some(iso),
                        checksum,
                        kernel: None,
                        initrd: None,
                        cmdline: None,
                    } => Ok(From::Iso(Iso { iso, checksum })),
                    Keys {
                        iso: None,
                        checksum: None,
                        kernel: Some(kernel),
                        initrd,
                        cmdline,
                    } => Ok(From::Kernel(Kernel {
                        kernel,
                        initrd,
                        cmdline,
                    })),
                    _ => Err(de::Error::custom(
                        "`from` has an `iso` (and its `checksum`), or a `kernel` (and `initrd`, `cmdline`)",
                    )),
                }
            }
        }
        input.deserialize_any(Read)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> de::Visitor<'de> for Read {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, or {file: PATH}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text::Inline(text.to_owned()))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
                TextFile::deserialize(de::value::MapAccessDeserializer::new(map)).map(Text::File)
            }
        }
        input.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Result<Recipe, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn a_recipe_in_json_and_back() {
        let full = r#"{"from":{"iso":"/a.iso"},"cpus":2,"memory":1073741824,"disk":"10G","user-data":"x","timeout":"20m",
            "steps":[{"run":"true","env":{"A":"b"}},{"copy":{"from":"a","to":"/b"},"timeout":5}],"clean":false,
            "machine":{"version":1}}"#;
        let read = recipe(full).unwrap();
        assert_eq!(read.timeout, Some(Seconds(1200)));
        let again = serde_json::to_string(&read).unwrap();
        assert_eq!(recipe(&again).unwrap(), read);
        assert!(recipe(r#"{"from":"debian-13"}"#).unwrap().clean);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for text in [
            r#"{}"#,
            r#"{"from":7}"#,
            r#"{"from":{}}"#,
            r#"{"from":{"iso":"a","kernel":"b"}}"#,
            r#"{"from":{"iso":"a","initrd":"b"}}"#,
            r#"{"from":{"kernel":"b","more":1}}"#,
            r#"{"from":"a","step":[]}"#,
            r#"{"from":"a","steps":[{"runs":"x"}]}"#,
            r#"{"from":"a","user-data":{"path":"x"}}"#,
            r#"{"from":"a","memory":"2 gigs"}"#,
            r#"{"from":"a","timeout":-1}"#,
            r#"{"from":"a","timeout":"5 minutes"}"#,
            r#"{"from":"a","timeout":"m"}"#,
            r#"{"from":"a","timeout":"99999999999999999999h"}"#,
        ] {
            assert!(recipe(text).is_err(), "{text}");
        }
    }
}
