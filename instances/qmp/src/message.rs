//! What one line from QEMU can be. Unknown fields and unknown events pass; a line that is no JSON
//! object ends the connection, because then the other side is not what we take it for.

use serde::Deserialize;
use serde_json::Value;

/// Something that happened in QEMU, unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub name: String,
    /// An object; empty if the event carries nothing.
    pub data: Value,
    /// QEMU's wall clock, in microseconds since 1970; 0 if it gave none.
    pub micros: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

#[derive(Debug)]
pub(crate) enum Message {
    Reply {
        id: u64,
        outcome: Result<Value, Refusal>,
    },
    Event(Event),
    /// Something that we don't know and that nobody waits for.
    Other,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct Refusal {
    #[serde(default)]
    pub class: String,
    #[serde(default)]
    pub desc: String,
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    reply: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
    timestamp: Option<Value>,
}

/// Keeps `"return": null` apart from no `return` at all.
fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

pub(crate) fn parse(line: &str) -> Result<Message, String> {
    let line: Line = serde_json::from_str(line).map_err(|err| err.to_string())?;
    if let Some(name) = line.event {
        return Ok(Message::Event(Event {
            name,
            data: line
                .data
                .unwrap_or_else(|| Value::Object(Default::default())),
            micros: line.timestamp.map_or(0, |t| micros(&t)),
        }));
    }
    let outcome = match (line.reply, line.error) {
        (Some(value), _) => Ok(value),
        (None, Some(refusal)) => Err(refusal),
        (None, None) => return Ok(Message::Other),
    };
    match line.id.as_ref().and_then(Value::as_u64) {
        Some(id) => Ok(Message::Reply { id, outcome }),
        None => Ok(Message::Other),
    }
}

/// QEMU says -1 where its clock failed; that counts as unknown.
fn micros(timestamp: &Value) -> u64 {
    let field = |name| timestamp.get(name).and_then(Value::as_u64).unwrap_or(0);
    let seconds = field("seconds").saturating_mul(1_000_000);
    seconds.saturating_add(field("microseconds").min(999_999))
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: Version,
}

pub(crate) fn parse_greeting(line: &str) -> Result<Version, String> {
    serde_json::from_str::<Greeting>(line)
        .map(|greeting| greeting.qmp.version.qemu)
        .map_err(|err| err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_events_fields_and_messages_pass() {
        let event = parse(r#"{"event":"FROM_THE_FUTURE","data":{"x":[1]},"new":true}"#).unwrap();
        assert!(matches!(event, Message::Event(e) if e.name == "FROM_THE_FUTURE" && e.micros == 0));
        assert!(matches!(parse(r#"{"hello":1}"#), Ok(Message::Other)));
        assert!(matches!(parse(r#"{"return":1}"#), Ok(Message::Other)));
        assert!(matches!(
            parse(r#"{"return":{},"id":"text"}"#),
            Ok(Message::Other)
        ));
    }

    #[test]
    fn replies_of_every_shape() {
        let ok = parse(r#"{"return":null,"id":7,"later":0}"#).unwrap();
        assert!(matches!(
            ok,
            Message::Reply {
                id: 7,
                outcome: Ok(Value::Null)
            }
        ));
        let refused = parse(r#"{"error":{"class":"C","desc":"D","x":1},"id":8}"#).unwrap();
        assert!(
            matches!(refused, Message::Reply { id: 8, outcome: Err(r) } if r.class == "C" && r.desc == "D")
        );
    }

    #[test]
    fn times_are_taken_with_care() {
        let at = |s: &str| match parse(s) {
            Ok(Message::Event(e)) => e.micros,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            at(r#"{"event":"E","timestamp":{"seconds":2,"microseconds":3}}"#),
            2_000_003
        );
        assert_eq!(
            at(r#"{"event":"E","timestamp":{"seconds":-1,"microseconds":-1}}"#),
            0
        );
        assert_eq!(
            at(r#"{"event":"E","timestamp":{"seconds":18446744073709551615}}"#),
            u64::MAX
        );
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in ["", "[]", "7", "{", "QEMU 10", "{\"event\":5}"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
