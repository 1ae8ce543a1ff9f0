//! One request to the daemon and its typed answer. All errors of the way (no daemon, no permission,
//! a broken connection, an error reply) become `pileus_base::Error` here and nowhere else.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_api::{ErrorReply, InstanceName, ServerInfo, routes};
use pileus_base::{Code, Error, Result};
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bound on calls that the daemon answers at once (long work answers with an operation).
pub(crate) const ANSWER: Duration = Duration::from_secs(60);

/// A daemon, named by its socket. Making one does no I/O; clones share connections.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) socket: PathBuf,
    http: reqwest::Client,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Result<Self> {
        let socket = socket.into();
        let http = reqwest::Client::builder()
            .unix_socket(socket.clone())
            .no_proxy()
            // The socket is local and never speaks TLS; an empty list spares the 10 ms that loading
            // the host's certificates takes at every start.
            .tls_certs_only([])
            .build()
            .map_err(|err| Error::internal(format!("Making an HTTP client: {err}")))?;
        Ok(Self { socket, http })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the daemon says of itself.
    pub async fn server(&self) -> Result<ServerInfo> {
        self.get(routes::SERVER).await
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        // With a Unix socket the host's name is only a form.
        self.http.request(method, format!("http://pileus{path}"))
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.answer(self.request(Method::GET, path).timeout(ANSWER))
            .await
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        self.answer(self.request(Method::POST, path).json(body).timeout(ANSWER))
            .await
    }

    /// Sends a request whose answer is JSON.
    pub(crate) async fn answer<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let response = self.send(request).await?;
        let bytes = response.bytes().await.map_err(|err| self.broken(&err))?;
        serde_json::from_slice(&bytes).map_err(|err| {
            Error::internal("The daemon's answer could not be understood")
                .detail(err.to_string())
                .advise("Daemon and client may be of different versions: restart the daemon.")
        })
    }

    /// Sends a request and returns the response if its status is a success.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let response = request.send().await.map_err(|err| self.broken(&err))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = response.bytes().await.map_err(|err| self.broken(&err))?;
        Err(error_reply(status.as_u16(), &bytes))
    }

    pub(crate) fn broken(&self, err: &reqwest::Error) -> Error {
        if err.is_timeout() {
            return Error::new(Code::TimedOut, "The daemon did not answer in time");
        }
        match io_cause(err) {
            Some(kind) => self.unreachable(kind, &err.to_string()),
            None => self.unreachable(io::ErrorKind::Other, &err.to_string()),
        }
    }

    /// The error of a socket that can't be used.
    pub(crate) fn unreachable(&self, kind: io::ErrorKind, why: &str) -> Error {
        let path = self.socket.display();
        match kind {
            io::ErrorKind::PermissionDenied => {
                Error::new(Code::PermissionDenied, "pileus socket access denied").detail(format!(
                    "Please check that you have read/write permissions to '{path}'"
                ))
            }
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::InvalidInput => Error::new(
                Code::DaemonUnreachable,
                "cannot connect to the pileus socket",
            )
            .detail(format!(
                "Please ensure pileusd is running and '{path}' is accessible"
            )),
            _ => Error::new(
                Code::DaemonUnreachable,
                "The connection to the daemon broke",
            )
            .detail(why.to_owned())
            .advise("The daemon ended, or was started anew; when it answers again, try again."),
        }
    }
}

/// Turns the body of a reply with an error status into the error that it tells of.
pub(crate) fn error_reply(status: u16, body: &[u8]) -> Error {
    match serde_json::from_slice::<ErrorReply>(body) {
        Ok(reply) => reply.error.into(),
        Err(_) => {
            let text: String = String::from_utf8_lossy(body).chars().take(300).collect();
            Error::internal(format!("The daemon answered with HTTP status {status}")).detail(text)
        }
    }
}

/// A path with an instance's name in it. A name that can't be one is refused here, so that it never
/// becomes another path.
pub(crate) fn instance_path(route: &str, name: &str) -> Result<String> {
    if name.parse::<InstanceName>().is_err() {
        return Err(Error::new(
            Code::InstanceNotFound,
            format!("instance \"{name}\" does not exist"),
        ));
    }
    Ok(routes::fill(route, name))
}

fn io_cause(err: &reqwest::Error) -> Option<io::ErrorKind> {
    let mut cause = std::error::Error::source(err);
    while let Some(err) = cause {
        if let Some(io) = err.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        cause = err.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reply_keeps_code_and_details() {
        let body = br#"{"error":{"code":"boot-timeout","class":"guest","message":"m","advice":"a","details":["d"]}}"#;
        let err = error_reply(502, body);
        assert_eq!(err.code, Code::BootTimeout);
        assert_eq!(err.advice.as_deref(), Some("a"));
        assert_eq!(err.details, ["d"]);
        assert_eq!(error_reply(500, b"oops").code, Code::Internal);
    }

    #[test]
    fn a_name_can_not_become_another_path() {
        for name in ["..", "a/b", "", "a?b"] {
            let err = instance_path(routes::INSTANCE, name).unwrap_err();
            assert_eq!(err.code, Code::InstanceNotFound, "{name}");
        }
    }
}
