//! Checks the user's cloud-init text before an instance is made with it, because cloud-init itself
//! would find the fault minutes later and mostly in silence. Not one byte is changed: comments, scripts,
//! templates and MIME arrive as they were written. One exception: a YAML mapping without any header,
//! which cloud-init would ignore, gets the `#cloud-config` line that it lacks.
//!
//! Next: `seed.rs` puts the bytes on the seed disk.

use std::io::Read;

use pileus_base::{Code, Error, Result};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

#[path = "cloud_init_warm.rs"]
mod warm;
pub use warm::warm_obstacle;

/// Most bytes of user data, packed and unpacked.
pub const MAX_USER_DATA: usize = 16 << 20;
const MAX_NETWORK: usize = 64 << 10;
const ADVICE: &str = "User data begins with #cloud-config and YAML, or is a script (#!), an \
                      #include list, a #cloud-boothook, a jinja template, a MIME message, or one \
                      of these packed with gzip.";
/// cloud-init looks for `MIME-Version:` this far.
const MIME_HEAD: usize = 4096;

/// What kind of text cloud-init takes it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    CloudConfig,
    CloudConfigArchive,
    JsonPatch,
    Script,
    Include,
    Boothook,
    PartHandler,
    Jinja,
    Mime,
    Empty,
}

/// Checked user data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserData {
    pub kind: Kind,
    /// Whether it is packed with gzip (it stays so).
    pub packed: bool,
    /// The bytes for the seed disk.
    pub bytes: Vec<u8>,
}

/// Checks `bytes` and returns them for the seed, or says where and why cloud-init would refuse them.
pub fn check(bytes: Vec<u8>) -> Result<UserData> {
    if bytes.len() > MAX_USER_DATA {
        return Err(too_large());
    }
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let plain = unpack(&bytes)?;
        let (kind, header) = check_text(&plain)?;
        if header {
            return Err(bad("packed YAML has no #cloud-config line"));
        }
        return Ok(UserData {
            kind,
            packed: true,
            bytes,
        });
    }
    let (kind, header) = check_text(&bytes)?;
    let bytes = match header {
        true => [b"#cloud-config\n".as_slice(), &bytes].concat(),
        false => bytes,
    };
    Ok(UserData {
        kind,
        packed: false,
        bytes,
    })
}

/// What a network configuration must say.
#[derive(serde::Deserialize)]
struct NetworkConfig {
    version: Option<u32>,
    /// netplan's own files have everything below this key.
    network: Option<Box<NetworkConfig>>,
}

/// Checks a network configuration: YAML that says of which version it is. It is passed on unchanged.
pub fn check_network(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let refuse = |why: &str| {
        let what = format!("The network configuration is not valid: {why}");
        Error::new(Code::InvalidCloudInit, what).advise(
            "It is YAML with `version: 1` or `version: 2`, as cloud-init and netplan know it.",
        )
    };
    if bytes.len() > MAX_NETWORK {
        return Err(refuse("it is larger than 64 KiB"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| refuse("it is not UTF-8 text"))?;
    if let Top::Scalar | Top::List | Top::Nothing = yaml(text, 0)? {
        return Err(refuse("it is not a mapping"));
    }
    let config: NetworkConfig =
        serde_saphyr::from_str(text).map_err(|err| refuse(&err.without_snippet().to_string()))?;
    let version = config.network.map_or(config.version, |below| below.version);
    match version {
        Some(1 | 2) => Ok(bytes),
        _ => Err(refuse("it says of no version that is known")),
    }
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::new(
        Code::InvalidCloudInit,
        format!("The cloud-init user data is not valid: {what}"),
    )
    .advise(ADVICE)
}

fn too_large() -> Error {
    let limit = MAX_USER_DATA >> 20;
    bad(format!("it is larger than {limit} MiB")).advise("Fetch large files with runcmd instead.")
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(bytes)
        .take(MAX_USER_DATA as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(|err| bad(format!("it is not whole gzip data: {err}")))?;
    if plain.len() > MAX_USER_DATA {
        return Err(too_large());
    }
    Ok(plain)
}

/// The kind, and whether the `#cloud-config` line is to be added.
fn check_text(bytes: &[u8]) -> Result<(Kind, bool)> {
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        let line = 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
        return Err(bad(format!("line {line} holds a NUL byte")));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(bad(
            "it begins with a byte order mark, which hides the first line from cloud-init",
        )
        .advise("Save the file as UTF-8 without a byte order mark."));
    }
    let text = std::str::from_utf8(bytes).map_err(|err| {
        let before = &bytes[..err.valid_up_to()];
        let line = 1 + before.iter().filter(|b| **b == b'\n').count();
        bad(format!("line {line} is not UTF-8"))
    })?;
    if is_mime(bytes) {
        check_mime(text)?;
        return Ok((Kind::Mime, false));
    }
    let Some(kind) = kind_of(text) else {
        return headerless(text);
    };
    check_kind(kind, text, 0)?;
    Ok((kind, false))
}

fn is_mime(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(MIME_HEAD)];
    let lower = head.to_ascii_lowercase();
    lower.windows(13).any(|w| w == b"mime-version:") && !lower.trim_ascii_start().starts_with(b"#")
}

/// By its beginning, as cloud-init does it: without regard to case and leading space.
fn kind_of(text: &str) -> Option<Kind> {
    // Longer ones first: `#cloud-config-archive` begins with `#cloud-config`.
    const STARTS: [(&str, Kind); 9] = [
        ("#cloud-config-archive", Kind::CloudConfigArchive),
        ("#cloud-config-jsonp", Kind::JsonPatch),
        ("#cloud-boothook", Kind::Boothook),
        ("#cloud-config", Kind::CloudConfig),
        ("## template: jinja", Kind::Jinja),
        ("#part-handler", Kind::PartHandler),
        ("#include-once", Kind::Include),
        ("#include", Kind::Include),
        ("#!", Kind::Script),
    ];
    let start = text.trim_start();
    let is = |prefix: &str| {
        let head = start.as_bytes().get(..prefix.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()))
    };
    STARTS
        .into_iter()
        .find(|(prefix, _)| is(prefix))
        .map(|(_, kind)| kind)
}

/// Checks `text`, which begins `lines_before` lines into the user's file.
fn check_kind(kind: Kind, text: &str, lines_before: u64) -> Result<()> {
    let wants = |top: Top, wanted: Top, what: &str| match top {
        Top::Nothing => Ok(()),
        top if top == wanted => Ok(()),
        top => Err(bad(format!(
            "{what} is {}, not {}",
            top.name(),
            wanted.name()
        ))),
    };
    match kind {
        Kind::CloudConfig => wants(yaml(text, lines_before)?, Top::Mapping, "the cloud-config"),
        Kind::CloudConfigArchive | Kind::JsonPatch => {
            wants(yaml(text, lines_before)?, Top::List, "the archive or patch")
        }
        Kind::Script => {
            let first = text.trim_start().lines().next().unwrap_or("");
            if first[2..].trim().is_empty() {
                return Err(bad("the script's first line names no interpreter after #!"));
            }
            Ok(())
        }
        Kind::Include => check_include(text, lines_before),
        Kind::Jinja => {
            // Before it is rendered nothing can be said about the rest but what it will be.
            let rest = text.trim_start().split_once('\n').map_or("", |(_, r)| r);
            match kind_of(rest) {
                Some(_) => Ok(()),
                None => Err(bad(
                    "the line after ## template: jinja must say what it is a template of, \
                     as #cloud-config does",
                )),
            }
        }
        Kind::Boothook | Kind::PartHandler | Kind::Mime | Kind::Empty => Ok(()),
    }
}

fn check_include(text: &str, lines_before: u64) -> Result<()> {
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let known = ["http://", "https://", "file://", "ftp://"];
        if !known.iter().any(|scheme| line.starts_with(scheme)) {
            let number = index as u64 + 1 + lines_before;
            return Err(bad(format!(
                "line {number} of the include list is not a URL"
            )));
        }
    }
    Ok(())
}

/// Text that says nothing about itself: YAML with one line missing, or a mistake.
fn headerless(text: &str) -> Result<(Kind, bool)> {
    if text.trim().is_empty() {
        return Ok((Kind::Empty, !text.is_empty()));
    }
    match yaml(text, 0) {
        Ok(Top::Mapping) => Ok((Kind::CloudConfig, true)),
        // Only comments.
        Ok(Top::Nothing) => Ok((Kind::Empty, true)),
        Ok(top) => Err(bad(format!(
            "it has no header line, and is {}, not a YAML mapping",
            top.name()
        ))),
        Err(err) => Err(err),
    }
}

/// What the outermost value of a YAML document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Top {
    Nothing,
    Scalar,
    List,
    Mapping,
}

impl Top {
    fn name(self) -> &'static str {
        match self {
            Top::Nothing => "empty",
            Top::Scalar => "plain text",
            Top::List => "a list",
            Top::Mapping => "a mapping",
        }
    }
}

/// Reads a whole document and keeps only what is outermost in it.
fn yaml(text: &str, lines_before: u64) -> Result<Top> {
    let mut options = serde_saphyr::Options::default();
    // cloud-init's own reader lets the last of two equal keys win.
    options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::LastWins;
    options.with_snippet = false;
    serde_saphyr::from_str_with_options::<Option<Top>>(text, options)
        .map(|top| top.unwrap_or(Top::Nothing))
        .map_err(|err| {
            let place = err.location().map_or_else(String::new, |at| {
                format!(
                    "line {}, column {}: ",
                    at.line() + lines_before,
                    at.column()
                )
            });
            // Some messages end with their place, which is said already.
            let message = err.without_snippet().to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            let message: String = message
                .chars()
                .filter(|c| !c.is_control())
                .take(300)
                .collect();
            bad(format!("{place}{message}"))
        })
}

impl<'de> Deserialize<'de> for Top {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        from.deserialize_any(TopVisitor)
    }
}

struct TopVisitor;

macro_rules! scalars {
    ($($name:ident: $type:ty),*) => {
        $(fn $name<E>(self, _: $type) -> std::result::Result<Top, E> { Ok(Top::Scalar) })*
    };
}

impl<'de> Visitor<'de> for TopVisitor {
    type Value = Top;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a YAML value")
    }

    scalars!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_i128: i128, visit_u128: u128,
             visit_f64: f64, visit_str: &str, visit_bytes: &[u8]);

    fn visit_unit<E>(self) -> std::result::Result<Top, E> {
        Ok(Top::Nothing)
    }

    fn visit_none<E>(self) -> std::result::Result<Top, E> {
        Ok(Top::Nothing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Top, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Top::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Top, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Top::Mapping)
    }
}

/// The structure of a multipart message, and the YAML of its plainly written parts.
fn check_mime(text: &str) -> Result<()> {
    let (head, body, body_line) = split_head(text, 1)?;
    let kind =
        header(&head, "content-type").ok_or_else(|| bad("the MIME head has no Content-Type"))?;
    if !kind.to_ascii_lowercase().starts_with("multipart/") {
        return check_part(&head, body, body_line);
    }
    let boundary = parameter(&kind, "boundary")
        .filter(|b| !b.is_empty())
        .ok_or_else(|| bad("the MIME head names no boundary"))?;
    let mark = format!("--{boundary}");
    let mut parts = 0;
    let mut start: Option<(usize, u64)> = None;
    let mut at = 0;
    for (line_number, line) in (body_line..).zip(body.split_inclusive('\n')) {
        let next = at + line.len();
        let plain = line.trim_end();
        let last = plain.strip_prefix(&mark).is_some_and(|rest| rest == "--");
        if plain == mark || last {
            if let Some((from, from_line)) = start.take() {
                let (head, content, content_line) = split_head(&body[from..at], from_line)?;
                check_part(&head, content, content_line)?;
                parts += 1;
            }
            if last {
                break;
            }
            start = Some((next, line_number + 1));
        }
        at = next;
    }
    if start.is_some() {
        return Err(bad(format!("the MIME message does not end with {mark}--")));
    }
    match parts {
        0 => Err(bad("the MIME message has no parts")),
        _ => Ok(()),
    }
}

type Head = Vec<(String, String)>;

/// Header lines (names in lower case), the body and the number of the body's first line.
fn split_head(text: &str, first_line: u64) -> Result<(Head, &str, u64)> {
    let mut head: Head = Vec::new();
    let mut at = 0;
    for (number, line) in (first_line..).zip(text.split_inclusive('\n')) {
        at += line.len();
        let plain = line.trim_end();
        if plain.is_empty() {
            return Ok((head, &text[at..], number + 1));
        }
        if line.starts_with([' ', '\t'])
            && let Some((_, value)) = head.last_mut()
        {
            *value += plain;
            continue;
        }
        // An mbox line that `write-mime-multipart` of old wrote first.
        if number == 1 && plain.starts_with("From ") {
            continue;
        }
        match plain.split_once(':') {
            Some((name, value)) if !name.contains(' ') => {
                head.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
            _ => return Err(bad(format!("line {number} is not a MIME header line"))),
        }
    }
    Ok((head, "", first_line))
}

fn header(head: &Head, name: &str) -> Option<String> {
    head.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone())
}

fn parameter(value: &str, name: &str) -> Option<String> {
    value.split(';').skip(1).find_map(|part| {
        let (key, value) = part.split_once('=')?;
        let value = value.trim().trim_matches('"').to_owned();
        key.trim().eq_ignore_ascii_case(name).then_some(value)
    })
}

fn check_part(head: &Head, body: &str, body_line: u64) -> Result<()> {
    let encoding = header(head, "content-transfer-encoding").unwrap_or_default();
    let plain = ["", "7bit", "8bit", "binary"];
    let kind = header(head, "content-type").unwrap_or_default();
    let kind = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    // What is encoded, and what says it only by its own first line, is cloud-init's to judge.
    if kind == "text/cloud-config" && plain.contains(&encoding.to_ascii_lowercase().as_str()) {
        return check_kind(Kind::CloudConfig, body, body_line - 1);
    }
    Ok(())
}

#[cfg(test)]
#[path = "cloud_init_tests.rs"]
mod tests;
