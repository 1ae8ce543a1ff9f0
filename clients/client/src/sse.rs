//! Server-sent events: the bytes of a response → typed events. Comments and unknown fields are
//! skipped, as the standard asks; an event's size is bounded.

use bytes::BytesMut;
use futures_util::{Stream, StreamExt, stream};
use pileus_base::{Error, Result};
use serde::de::DeserializeOwned;

use crate::Client;

/// Far above any event of the daemon (an operation's error with a console's tail).
const MAX_EVENT: usize = 4 << 20;

/// Reads events until the response ends.
pub(crate) fn events<T: DeserializeOwned>(
    client: Client,
    response: reqwest::Response,
) -> impl Stream<Item = Result<T>> {
    let body = Box::pin(response.bytes_stream());
    stream::try_unfold(
        (client, body, Parser::default()),
        |(client, mut body, mut parser)| async move {
            loop {
                if let Some(data) = parser.next_event()? {
                    let event = serde_json::from_slice(&data).map_err(|err| {
                        Error::internal(format!("An event could not be understood: {err}"))
                    })?;
                    return Ok(Some((event, (client, body, parser))));
                }
                match body.next().await {
                    Some(Ok(part)) => parser.buffer.extend_from_slice(&part),
                    Some(Err(err)) => return Err(client.broken(&err)),
                    None => return Ok(None),
                }
            }
        },
    )
}

#[derive(Default)]
struct Parser {
    buffer: BytesMut,
    data: Vec<u8>,
}

impl Parser {
    /// The data of the next whole event in the buffer.
    fn next_event(&mut self) -> Result<Option<Vec<u8>>> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line = self.buffer.split_to(end + 1);
            let line = line.trim_ascii_end();
            if line.is_empty() {
                if !self.data.is_empty() {
                    return Ok(Some(std::mem::take(&mut self.data)));
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data.trim_ascii_start());
            }
            if self.data.len() > MAX_EVENT {
                return Err(Error::internal(
                    "The daemon sent an event that is too large",
                ));
            }
        }
        if self.buffer.len() > MAX_EVENT {
            return Err(Error::internal(
                "The daemon sent an event that is too large",
            ));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(parts: &[&str]) -> Vec<String> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        for part in parts {
            parser.buffer.extend_from_slice(part.as_bytes());
            while let Some(data) = parser.next_event().unwrap() {
                events.push(String::from_utf8(data).unwrap());
            }
        }
        events
    }

    #[test]
    fn events_in_any_cutting() {
        let text = ": hello\n\nevent: x\ndata: {\"a\":\ndata: 1}\n\nid: 3\r\ndata:two\r\n\r\n";
        let whole = ["{\"a\":\n1}", "two"];
        assert_eq!(parse(&[text]), whole);
        for cut in 1..text.len() {
            let (a, b) = text.split_at(cut);
            assert_eq!(parse(&[a, b]), whole, "{cut}");
        }
        assert!(parse(&["data: unfinished\n"]).is_empty());
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut parser = Parser::default();
        parser.buffer.extend_from_slice(&vec![b'x'; MAX_EVENT + 1]);
        assert!(parser.next_event().is_err());
    }
}
