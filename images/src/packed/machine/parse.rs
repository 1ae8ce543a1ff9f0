//! Bytes → [`Machine`]. Strict: what version 1 doesn't know is refused, and every issue is told, each with
//! the place where it is. Bounded: the bytes are counted before they are looked at, and so is what an
//! error repeats of them.

use pileus_base::{Code, Error, Mac, Result};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::super::rule::Rule;
use super::values::Word;
use super::{FIELDS, Machine, VERSION, migrate};

/// A longer machine.json is refused unread.
pub const MAX_BYTES: usize = 1 << 20;
/// So many issues are told; of the rest the number.
const MAX_ISSUES: usize = 64;
/// So many characters of a foreign text are repeated.
const MAX_REPEATED: usize = 64;

/// A machine that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    pub machine: Machine,
    /// What the file says and nobody heeds; a sentence each.
    pub warnings: Vec<String>,
}

impl Machine {
    /// Reads a machine.json of version 1, or of version 0, which is migrated. It is read as the
    /// ancestor did: of a key that is there twice the last one counts, `2.0` is a whole number, and
    /// nothing may follow the object.
    pub fn parse(bytes: &[u8]) -> Result<Parsed> {
        if bytes.len() > MAX_BYTES {
            let what = format!("machine is larger than {MAX_BYTES} bytes");
            return Err(invalid(vec![what]));
        }
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|err| invalid(vec![format!("machine is not JSON: {err}")]))?;
        let read = match version_of(&value) {
            Ok(0) => migrate::version_0(&value),
            Ok(_) => version_1(&value).map(|machine| Parsed {
                machine,
                warnings: Vec::new(),
            }),
            Err(issue) => Err(vec![issue]),
        };
        read.map_err(invalid)
    }
}

fn invalid(mut issues: Vec<String>) -> Error {
    let more = issues.len().saturating_sub(MAX_ISSUES);
    issues.truncate(MAX_ISSUES);
    if more > 0 {
        issues.push(format!("and {more} more"));
    }
    let mut err = Error::new(
        Code::BadImage,
        "Invalid machine definition in 'machine.json'",
    )
    .with_source(Rule::Machine);
    err.details = issues;
    err
}

/// No version is version 0. What is no version at all is an issue, whatever number it is.
fn version_of(value: &Value) -> std::result::Result<u64, String> {
    let Value::Object(object) = value else {
        return Err(format!("machine must be an object, not {}", kind(value)));
    };
    let Some(version) = object.get("version") else {
        return Ok(0);
    };
    match whole(version) {
        Some(known) if known <= u64::from(VERSION) => Ok(known),
        _ => Err(format!(
            "machine.version must be {VERSION}, not {}",
            shown(version)
        )),
    }
}

/// Reads version 1; the error is every issue that there is.
pub(super) fn version_1(value: &Value) -> std::result::Result<Machine, Vec<String>> {
    let version = version_of(value).and_then(|version| match version {
        0 => Err(format!("machine.version must be {VERSION}")),
        _ => Ok(()),
    });
    let (Value::Object(object), path) = (value, "machine") else {
        return Err(version.err().into_iter().collect());
    };
    let mut read = Reader::new(object, path);
    read.issues.extend(version.err());
    let machine = Machine {
        uuid: read.text("uuid", "an RFC 4122 UUID in lower case", uuid),
        chipset: read.word("chipset"),
        cpu: read.word("cpu"),
        flags: read.no_flags("flags"),
        threads: read.number("threads", 255),
        cores: read.number("cores", 255),
        sockets: read.number("sockets", 255),
        memory: read.number("memory", 1 << 20),
        usb: read.word("usb"),
        network: read.word("network"),
        mac: read.text("mac", "a local unicast MAC address in lower case", mac),
        storage: read.word("storage"),
        graphics: read.word("graphics"),
        sound: read.word("sound"),
        keyboard: read.word("keyboard"),
        keyboard_layout: read.word("keyboardLayout"),
        mouse: read.word("mouse"),
        tablet: read.word("tablet"),
    };
    let known = |key: &str| key == "version" || FIELDS.contains(&key);
    let others = read
        .others(known)
        .map(|key| format!("{key} is not allowed"));
    let others: Vec<_> = others.collect();
    read.issues.extend(others);
    match read.issues.is_empty() {
        true => Ok(machine),
        false => Err(read.issues),
    }
}

/// Reads fields of an object, and notes what is wrong with them.
pub(super) struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
    pub issues: Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn new(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self {
            object,
            path,
            issues: Vec::new(),
        }
    }

    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key)
    }

    /// The paths of the keys that `known` doesn't know.
    pub fn others(&self, known: impl Fn(&str) -> bool) -> impl Iterator<Item = String> {
        let keys = self.object.keys().map(String::as_str);
        let others = keys.filter(move |key| !known(key));
        others.map(|key| join(self.path, key))
    }

    pub fn issue(&mut self, key: &str, must: impl std::fmt::Display) {
        let found = self.object.get(key).map_or("missing".into(), shown);
        let path = join(self.path, key);
        self.issues
            .push(format!("{path} must be {must}, not {found}"));
    }

    /// A text that `read` understands.
    pub fn text<T>(&mut self, key: &str, must: &str, read: fn(&str) -> Option<T>) -> Option<T> {
        let value = self.object.get(key)?;
        let found = value.as_str().and_then(read);
        if found.is_none() {
            self.issue(key, must);
        }
        found
    }

    pub fn word<T: Word>(&mut self, key: &str) -> Option<T> {
        let found = self.object.get(key)?.as_str().and_then(T::of);
        if found.is_none() {
            self.issue(key, words(T::WORDS));
        }
        found
    }

    /// A whole number from 1 to `most`.
    pub fn number<T: TryFrom<u64>>(&mut self, key: &str, most: u64) -> Option<T> {
        let number = whole(self.object.get(key)?).filter(|n| (1..=most).contains(n));
        let found = number.and_then(|n| n.try_into().ok());
        if found.is_none() {
            self.issue(key, format_args!("a whole number from 1 to {most}"));
        }
        found
    }

    fn no_flags<T>(&mut self, key: &str) -> Option<[T; 0]> {
        match self.object.get(key)? {
            Value::Array(flags) if flags.is_empty() => Some([]),
            _ => {
                self.issue(key, "[] (version 1 knows no flags)");
                None
            }
        }
    }
}

/// `"a", "b" or "c"`.
fn words(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

/// The number, if it is whole and not negative: `2`, `2.0`, `2e0`.
pub(super) fn whole(value: &Value) -> Option<u64> {
    /// From here on not every whole number is a float.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        let fits = (0.0..EXACT).contains(&float) && float.fract() == 0.0;
        // Both ends were just checked.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        fits.then_some(float as u64)
    })
}

pub(super) fn uuid(text: &str) -> Option<Uuid> {
    let uuid: Uuid = text.parse().ok()?;
    // Other forms of a UUID are none here.
    let same = uuid.hyphenated().to_string() == text;
    let bytes = text.as_bytes();
    (same && matches!(bytes[14], b'1'..=b'5') && matches!(bytes[19], b'8' | b'9' | b'a' | b'b'))
        .then_some(uuid)
}

pub(super) fn mac(text: &str) -> Option<Mac> {
    let mac: Mac = text.parse().ok()?;
    let local = matches!(mac.0[0] & 0xf, 0x2 | 0x6 | 0xa | 0xe);
    (local && mac.to_string() == text).then_some(mac)
}

/// The path of a key, safe to print.
pub(super) fn join(path: &str, key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    match !key.is_empty() && key.len() <= MAX_REPEATED && key.chars().all(plain) {
        true => format!("{path}.{key}"),
        false => format!("{path}[{}]", quoted(key)),
    }
}

fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_REPEATED).collect();
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{more}")
}

/// A value as an issue repeats it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Number(_) | Value::Bool(_) | Value::Null => value.to_string(),
        Value::Array(_) | Value::Object(_) => kind(value).to_owned(),
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
