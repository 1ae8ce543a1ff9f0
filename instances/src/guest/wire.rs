//! What the agent says, parsed strictly: the guest is hostile until proven otherwise. A line has a
//! bound, lists and strings have bounds, control characters (which could steer a terminal) are gone,
//! and what is not understood is dropped. Nothing from here may be trusted beyond its shape.
//!
//! Next: `agent.rs` keeps the last of each message.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use serde_json::{Map, Value};

/// Most bytes of a line, without its end.
pub const MAX_LINE: usize = 64 * 1024;
/// The protocol that this host speaks.
pub const PROTO: u32 = 1;

/// One line from the agent.
#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    Hello(Hello),
    CloudInit(CloudInit),
    Report(Report),
    Reply(Reply),
    /// The `sshd` of a connection ended.
    Ssh(SshEnd),
}

/// Parses a line; `None` for everything that is no message of ours.
pub fn parse(line: &[u8]) -> Option<Message> {
    if line.len() > MAX_LINE {
        return None;
    }
    serde_json::from_slice(line).ok()
}

/// Who answers: sent when the agent starts, and whenever the host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, DeriveDeserialize)]
pub struct Hello {
    pub proto: u32,
    /// The agent's own version.
    #[serde(deserialize_with = "text")]
    pub agent: String,
    /// Changes with every boot.
    #[serde(deserialize_with = "text")]
    pub boot_id: String,
    #[serde(deserialize_with = "text")]
    pub hostname: String,
    #[serde(deserialize_with = "text")]
    pub kernel: String,
    #[serde(deserialize_with = "text")]
    pub machine: String,
    #[serde(deserialize_with = "text")]
    pub python: String,
    /// PRETTY_NAME of os-release.
    #[serde(deserialize_with = "text")]
    pub os: String,
    /// The instance-id of the seed that installed this agent.
    #[serde(default, deserialize_with = "text")]
    pub instance: String,
    /// A template's guest at rest, or a clone that is nobody yet: not a sign of life of an instance.
    #[serde(default)]
    pub template: bool,
}

/// How far cloud-init is, by its own files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, DeriveDeserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloudInitState {
    #[default]
    NotStarted,
    Running,
    Done,
    /// Done, with faults that cloud-init calls recoverable.
    Degraded,
    Error,
    /// Turned off in this guest.
    Disabled,
}

impl CloudInitState {
    /// Whether nothing more will come in this boot.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::NotStarted | Self::Running)
    }
}

/// cloud-init's state, result and errors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, DeriveDeserialize)]
pub struct CloudInit {
    pub state: CloudInitState,
    /// The stage at work: `init-local`, `init`, `modules-config` or `modules-final`.
    #[serde(default, deserialize_with = "maybe_text")]
    pub stage: Option<String>,
    #[serde(default, deserialize_with = "stages")]
    pub stages: BTreeMap<String, StageTimes>,
    #[serde(default, deserialize_with = "texts::<_, 20>")]
    pub errors: Vec<String>,
    #[serde(default, deserialize_with = "texts::<_, 20>")]
    pub recoverable: Vec<String>,
    #[serde(default, deserialize_with = "text")]
    pub datasource: String,
}

/// Seconds since 1970 by the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, DeriveDeserialize)]
pub struct StageTimes {
    #[serde(default)]
    pub start: Option<f64>,
    #[serde(default)]
    pub finished: Option<f64>,
}

impl StageTimes {
    /// How long the stage took, in seconds.
    pub fn seconds(&self) -> Option<f64> {
        Some((self.finished? - self.start?).max(0.0))
    }
}

/// The guest's condition at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, DeriveDeserialize)]
pub struct Report {
    #[serde(default, deserialize_with = "list::<_, _, 64>")]
    pub interfaces: Vec<Interface>,
    /// Load averages of 1, 5 and 15 minutes.
    #[serde(default, deserialize_with = "list::<_, _, 3>")]
    pub load: Vec<f64>,
    pub memory: Usage,
    /// The file system of `/`.
    pub disk: Usage,
    #[serde(default)]
    pub cpus: u32,
    /// Seconds since boot.
    #[serde(default)]
    pub uptime: f64,
    pub kernel: Kernel,
    /// The guest's clock, seconds since 1970.
    #[serde(default)]
    pub time: f64,
}

impl Report {
    /// IPv4 addresses that others can reach, in the order of the interfaces.
    pub fn ipv4(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let all = self.interfaces.iter().flat_map(|i| &i.addresses);
        all.map(|a| a.ip)
            .filter(|ip| matches!(ip, IpAddr::V4(v4) if !v4.is_link_local() && !v4.is_loopback()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, DeriveDeserialize)]
pub struct Interface {
    #[serde(deserialize_with = "text")]
    pub name: String,
    #[serde(default, deserialize_with = "text")]
    pub mac: String,
    #[serde(default, deserialize_with = "list::<_, _, 32>")]
    pub addresses: Vec<Address>,
}

/// An IP address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, DeriveDeserialize)]
pub struct Usage {
    pub total: u64,
    pub used: u64,
}

/// Kernel releases: what runs, and what the disk's own boot loader would start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, DeriveDeserialize)]
pub struct Kernel {
    #[serde(deserialize_with = "text")]
    pub running: String,
    #[serde(default, deserialize_with = "text")]
    pub disk: String,
    /// False once the guest installed another kernel: boot by firmware from then on.
    pub current: bool,
}

#[derive(Debug, Clone, DeriveDeserialize)]
pub struct Reply {
    pub id: u64,
    pub ok: bool,
    #[serde(default, deserialize_with = "maybe_text")]
    pub error: Option<String>,
    /// What else the answer holds; its size is bounded by the line.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
pub struct SshEnd {
    #[serde(default, deserialize_with = "text")]
    pub nonce: String,
    #[serde(default)]
    pub exit: i64,
}

/// Text from a guest as it may be shown: bounded, in one line, without what drives a terminal, control characters or
/// the characters that turn the direction of writing.
pub fn clean(text: &str) -> String {
    const MAX_CHARS: usize = 1024;
    let hidden = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    without_sequences(text)
        .map(|c| if c == '\n' || c == '\t' { ' ' } else { c })
        .filter(|c| !c.is_control() && !hidden(*c))
        .take(MAX_CHARS)
        .collect()
}

/// Leaves out colours and movements (`ESC [ … letter`), so that nothing of them is left when their first character goes.
fn without_sequences(text: &str) -> impl Iterator<Item = char> {
    let mut chars = text.chars().peekable();
    std::iter::from_fn(move || {
        loop {
            let c = chars.next()?;
            if c != '\u{1b}' || chars.next_if_eq(&'[').is_none() {
                return Some(c);
            }
            while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
            chars.next_if(|c| matches!(c, '@'..='~'));
        }
    })
}

fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    String::deserialize(from).map(|text| clean(&text))
}

fn maybe_text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map(|text| clean(&text)))
}

fn texts<'de, D: Deserializer<'de>, const N: usize>(from: D) -> Result<Vec<String>, D::Error> {
    let all: Vec<String> = list::<_, _, N>(from)?;
    Ok(all.iter().map(|text| clean(text)).collect())
}

/// The first `N` elements; the rest is read over.
fn list<'de, D, T, const N: usize>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Bounded<T, const N: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Bounded<T, N> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut kept = Vec::new();
            while kept.len() < N {
                match seq.next_element()? {
                    Some(element) => kept.push(element),
                    None => return Ok(kept),
                }
            }
            while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
            Ok(kept)
        }
    }
    from.deserialize_seq(Bounded::<T, N>(PhantomData))
}

fn stages<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, StageTimes>, D::Error> {
    let all = BTreeMap::<String, StageTimes>::deserialize(from)?;
    Ok(all
        .into_iter()
        .take(8)
        .map(|(k, v)| (clean(&k), v))
        .collect())
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let parse = || {
            let (ip, prefix) = text.split_once('/')?;
            let ip: IpAddr = ip.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let most = if ip.is_ipv4() { 32 } else { 128 };
            (prefix <= most).then_some(Address { ip, prefix })
        };
        parse().ok_or_else(|| serde::de::Error::custom("not an address"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = r#"{"type":"hello","proto":1,"agent":"1","boot_id":"b","hostname":"h","kernel":"k","machine":"x86_64","python":"3","os":"Debian","pid":7}"#;

    #[test]
    fn good_lines() {
        assert!(matches!(parse(HELLO.as_bytes()), Some(Message::Hello(h)) if h.hostname == "h"));
        let line = r#"{"type":"cloud-init","state":"error","stage":null,"stages":{"init":{"start":1.5,"finished":3}},
            "errors":["modules-final: boom"],"recoverable":[],"datasource":"NoCloud"}"#;
        let Some(Message::CloudInit(c)) = parse(line.as_bytes()) else {
            panic!("no cloud-init message");
        };
        assert_eq!(c.state, CloudInitState::Error);
        assert_eq!(c.stages["init"].seconds(), Some(1.5));
        let line = r#"{"type":"report","interfaces":[{"name":"eth0","mac":"m","addresses":["10.0.2.15/24","fe80::1/64","169.254.1.1/16"]}],
            "load":[0.5,0,0],"memory":{"total":2,"used":1},"disk":{"total":4,"used":3},"cpus":2,"uptime":1.0,
            "kernel":{"running":"a","disk":"b","current":false},"time":9}"#;
        let Some(Message::Report(r)) = parse(line.as_bytes()) else {
            panic!("no report");
        };
        assert_eq!(
            r.ipv4().collect::<Vec<_>>(),
            ["10.0.2.15".parse::<IpAddr>().unwrap()]
        );
        assert!(!r.kernel.current);
        let line = r#"{"type":"reply","id":3,"ok":false,"error":"no\u001b[31m","x":1}"#;
        let Some(Message::Reply(r)) = parse(line.as_bytes()) else {
            panic!("no reply");
        };
        assert_eq!((r.id, r.ok, r.error.as_deref()), (3, false, Some("no")));
        assert_eq!(r.rest["x"], 1);
    }

    #[test]
    fn hostile_lines_are_dropped() {
        let long = format!(r#"{{"type":"hello","x":"{}"}}"#, "a".repeat(MAX_LINE));
        let deep = format!(
            r#"{{"type":"reply","id":1,"ok":true,"x":{}"#,
            "[".repeat(60_000)
        );
        for line in [
            "",
            "{}",
            "[]",
            "null",
            "nonsense",
            r#"{"type":"hello"}"#,
            r#"{"type":"unknown"}"#,
            r#"{"type":"reply","id":-1,"ok":true}"#,
            r#"{"type":"reply","id":1e99,"ok":true}"#,
            r#"{"type":"cloud-init","state":"fine"}"#,
            r#"{"type":"cloud-init","state":"done","errors":"x"}"#,
            r#"{"type":"report","memory":{"total":-1,"used":0}}"#,
            &long,
            &deep,
        ] {
            assert!(
                parse(line.as_bytes()).is_none(),
                "{}",
                &line[..line.len().min(80)]
            );
        }
        assert!(parse(b"{\"type\":\"hello\xff\"}").is_none());
    }

    #[test]
    fn lists_and_texts_are_cut() {
        let errors: Vec<String> = (0..500)
            .map(|n| format!("\u{1b}]0;x\u{7}{n}\u{202e}"))
            .collect();
        let line = serde_json::json!({"type": "cloud-init", "state": "error", "errors": errors,
            "datasource": "d".repeat(5000)});
        let Some(Message::CloudInit(c)) = parse(line.to_string().as_bytes()) else {
            panic!("no message");
        };
        assert_eq!(c.errors.len(), 20);
        assert_eq!(c.errors[7], "]0;x7");
        assert_eq!(c.datasource.len(), 1024);
    }

    #[test]
    fn clean_keeps_what_people_write() {
        assert_eq!(clean("Grüße\n\tan α"), "Grüße  an α");
        assert_eq!(clean("\u{1b}[2J\r\u{9b}x\0"), "x");
        assert_eq!(
            clean("Starting \u{1b}[0;1;39ma.service\u{1b}[0m\u{1b}7[ok]\u{1b}["),
            "Starting a.service7[ok]"
        );
        assert_eq!(clean("\u{1b}[1;\u{1b}[1mα\u{1b}[é"), "αé");
    }

    proptest::proptest! {
        #[test]
        fn no_line_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
