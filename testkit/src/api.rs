//! The daemon's API called directly: a test that makes thousands of steps can't start the CLI for each.
//! One connection a call, so that many threads can call at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// Longer than any call of a test may take.
const BOUND: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

/// An error as the API tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `daemon-unreachable` if nobody answered.
    pub code: String,
    pub message: String,
    pub details: String,
}

impl Refusal {
    /// Nobody answered, or the daemon ended meanwhile: nothing is known of what came of it.
    pub fn is_broken_off(&self) -> bool {
        matches!(self.code.as_str(), "daemon-unreachable" | "interrupted")
    }

    fn of(error: &Value) -> Self {
        let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        Self {
            code: text("code"),
            message: text("message"),
            details: error["details"].to_string(),
        }
    }
}

impl Api {
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    pub fn get(&self, path: &str) -> Result<Value, Refusal> {
        self.call("GET", path, None)
    }

    /// One request; what it answers.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Refusal> {
        let broken = |why: String| Refusal {
            code: "daemon-unreachable".into(),
            message: format!("{method} {path}: {why}"),
            details: String::new(),
        };
        let answer = self
            .exchange(method, path, body)
            .map_err(|err| broken(err.to_string()))?;
        let Some((head, body)) = answer.split_once("\r\n\r\n") else {
            return Err(broken(format!("no answer: {answer:?}")));
        };
        let good = head
            .split(' ')
            .nth(1)
            .is_some_and(|status| status.starts_with('2'));
        let value: Value = match body.is_empty() {
            true => Value::Null,
            false => serde_json::from_str(body).map_err(|err| broken(format!("{err}: {body}")))?,
        };
        match good {
            true => Ok(value),
            false => Err(Refusal::of(&value["error"])),
        }
    }

    fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> std::io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(BOUND))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let kind = match body.is_empty() {
            true => "",
            false => "Content-Type: application/json\r\n",
        };
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: pileus\r\n{kind}Content-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Begins long work and waits for its end; an operation that failed is an error.
    pub fn run(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Refusal> {
        let begun = self.call(method, path, body)?;
        self.wait(&begun)
    }

    /// Begins long work; what it answers, with the operation somewhere inside.
    pub fn begin(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Refusal> {
        self.call(method, path, body)
    }

    /// Waits for the end of what was begun.
    pub fn wait(&self, begun: &Value) -> Result<Value, Refusal> {
        let operation = begun.get("operation").unwrap_or(begun);
        let id = operation["id"].as_str().unwrap_or_default();
        loop {
            let path = format!("/v1/operations/{id}/wait?seconds=30");
            let now = self.get(&path)?;
            match now["state"].as_str() {
                Some("running") => {}
                Some("succeeded") => return Ok(now),
                _ => return Err(Refusal::of(&now["error"])),
            }
        }
    }

    /// A POST to `/v1/instances/NAME/WHAT` that is an operation, run to its end.
    pub fn act(&self, name: &str, what: &str, body: &Value) -> Result<Value, Refusal> {
        self.run("POST", &format!("/v1/instances/{name}/{what}"), Some(body))
    }

    pub fn instances(&self) -> Result<Vec<Value>, Refusal> {
        let all = self.get("/v1/instances")?;
        Ok(all.as_array().cloned().unwrap_or_default())
    }

    pub fn instance(&self, name: &str) -> Result<Value, Refusal> {
        self.get(&format!("/v1/instances/{name}"))
    }

    pub fn snapshots(&self, name: &str) -> Result<Vec<Value>, Refusal> {
        let all = self.get(&format!("/v1/instances/{name}/snapshots"))?;
        Ok(all.as_array().cloned().unwrap_or_default())
    }

    pub fn set(&self, key: &str, value: &str) -> Result<Value, Refusal> {
        let body = json!({ "value": value });
        self.call("PUT", &format!("/v1/settings/{key}"), Some(&body))
    }

    /// What a running guest says of itself: `hostname`, `machine-id`, `boot-id`, `disk` (see `bin/fake-qemu`).
    pub fn told_by(&self, name: &str, what: &str) -> Result<Vec<String>, Refusal> {
        let identity = self.get(&format!("/v1/instances/{name}/identity"))?;
        let items = identity["items"].as_array();
        let item = items.and_then(|all| all.iter().find(|item| item["name"] == what));
        let values = item.map_or(&Value::Null, |item| &item["values"]);
        Ok(values
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|value| value.as_str().map(str::to_owned))
            .collect())
    }
}
