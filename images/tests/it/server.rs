//! A fake image host on loopback: one artifact (or a whole tree of files), answers that can go wrong in
//! order, and a record of what was asked.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, Uri, header};
use axum::routing::get;
use bytes::Bytes;
use futures_util::StreamExt;
use pileus_images::ImageRef;

/// What answers that are no success say: nobody who asks pileus may see it.
pub const SECRET: &str = "the password of the inside is swordfish";

/// How one request is answered; once the list is used up, all are answered well.
#[derive(Debug, Clone)]
pub enum Answer {
    Status(u16),
    /// 429 with Retry-After in seconds.
    Later(u64),
    /// As it should be, but the connection is cut after so many bytes of the body.
    CutAfter(usize),
    /// The whole, whatever range was asked for.
    NoRange,
    /// The body never comes.
    Hang,
    /// Nothing comes.
    Silent,
    /// A redirect to the same artifact.
    Redirect,
    /// A redirect to anywhere.
    RedirectTo(String),
    /// 503 with Retry-After as a date, so many seconds after the answer's own.
    LaterAt(i64),
    /// Cut after so many bytes; from then on there is another content with another tag.
    Becomes(usize, Bytes, Option<String>),
    /// The whole, so many bytes at a time with a pause before each.
    Trickle(usize, Duration),
    /// The artifact's bytes again and again, without a length.
    Endless,
    /// A part with this Content-Range in place of the true one.
    Range(String),
}

#[derive(Debug, Default)]
pub struct Script {
    pub bytes: Bytes,
    /// By path; if there are any, nothing else is served.
    pub files: BTreeMap<String, Bytes>,
    pub etag: Option<String>,
    pub answers: VecDeque<Answer>,
    /// The headers of each request.
    pub requests: Vec<HeaderMap>,
    /// The path of each request.
    pub paths: Vec<String>,
    /// The status of each answer.
    pub served: Vec<u16>,
    /// Headers that each answer has besides.
    pub extra: Vec<(&'static str, String)>,
}

pub struct Server {
    pub script: Arc<Mutex<Script>>,
    address: std::net::SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub async fn start(bytes: Vec<u8>, answers: impl IntoIterator<Item = Answer>) -> Self {
        let script = Arc::new(Mutex::new(Script {
            bytes: bytes.into(),
            etag: Some("\"one\"".into()),
            answers: answers.into_iter().collect(),
            ..Script::default()
        }));
        let app = axum::Router::new()
            .route("/{*path}", get(answer))
            .with_state(script.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            script,
            address,
            task,
        }
    }

    /// Serves a tree of files.
    pub async fn of_files(files: BTreeMap<String, Bytes>) -> Self {
        let server = Self::start(Vec::new(), []).await;
        {
            let mut script = server.script.lock().unwrap();
            script.files = files;
            script.etag = None;
        }
        server
    }

    /// The address of the tree.
    pub fn base(&self) -> url::Url {
        format!("http://{}/", self.address).parse().unwrap()
    }

    /// The paths that were asked for since the last call.
    pub fn paths(&self) -> Vec<String> {
        std::mem::take(&mut self.script.lock().unwrap().paths)
    }

    pub fn reference(&self) -> ImageRef {
        self.url().parse().unwrap()
    }

    pub fn url(&self) -> String {
        format!("http://{}/disk.img", self.address)
    }

    /// How often a body was begun from its first byte.
    pub fn downloads(&self) -> usize {
        let script = self.script.lock().unwrap();
        script
            .served
            .iter()
            .filter(|status| **status == 200)
            .count()
    }

    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    pub fn requests(&self) -> usize {
        self.script.lock().unwrap().requests.len()
    }

    /// The header of each request, `-` where it is missing.
    pub fn header(&self, name: &str) -> Vec<String> {
        let script = self.script.lock().unwrap();
        let value = |headers: &HeaderMap| {
            headers
                .get(name)
                .map_or("-".into(), |v| v.to_str().unwrap().to_owned())
        };
        script.requests.iter().map(value).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    State(script): State<Arc<Mutex<Script>>>,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let mut response = respond(&script, &uri, &headers).await;
    let mut script = script.lock().unwrap();
    script.served.push(response.status().as_u16());
    for (name, value) in &script.extra {
        response.headers_mut().insert(*name, value.parse().unwrap());
    }
    response
}

async fn respond(script: &Mutex<Script>, uri: &Uri, headers: &HeaderMap) -> Response<Body> {
    let (bytes, etag, answer) = {
        let mut script = script.lock().unwrap();
        script.requests.push(headers.clone());
        script.paths.push(uri.path().to_owned());
        let answer = script.answers.pop_front();
        let bytes = match script.files.is_empty() {
            true => Some(script.bytes.clone()),
            false => script.files.get(uri.path()).cloned(),
        };
        (bytes, script.etag.clone(), answer)
    };
    let mut response = Response::builder();
    let missing = bytes.is_none();
    let bytes = bytes.unwrap_or_default();
    if let Some(etag) = &etag {
        response = response.header(header::ETAG, etag);
    }
    let current =
        |name| etag.is_some() && headers.get(name).and_then(|v| v.to_str().ok()) == etag.as_deref();
    let mut cut = None;
    let mut ranged = true;
    let mut claimed = None;
    let mut trickle = None;
    match answer {
        Some(Answer::Status(status)) => {
            return response.status(status).body(Body::from(SECRET)).unwrap();
        }
        Some(Answer::Later(seconds)) => {
            return response
                .status(429)
                .header(header::RETRY_AFTER, seconds)
                .body(Body::empty())
                .unwrap();
        }
        Some(Answer::Redirect) => {
            // To the same file of a tree, to another name of the one artifact.
            let path = match missing || uri.path() == "/disk.img" {
                true => "/other/disk.img",
                false => uri.path(),
            };
            return response
                .status(302)
                .header(header::LOCATION, path)
                .body(Body::empty())
                .unwrap();
        }
        Some(Answer::Hang) => {
            return response
                .header(header::CONTENT_LENGTH, bytes.len())
                .body(Body::from_stream(futures_util::stream::pending::<
                    Result<Bytes, std::io::Error>,
                >()))
                .unwrap();
        }
        Some(Answer::Silent) => return std::future::pending().await,
        Some(Answer::RedirectTo(location)) => {
            return response
                .status(302)
                .header(header::LOCATION, location)
                .body(Body::from(SECRET))
                .unwrap();
        }
        Some(Answer::LaterAt(seconds)) => {
            // This server's clock is far from ours.
            let now = jiff::Timestamp::from_second(784_111_777).unwrap();
            let date = |at: jiff::Timestamp| at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            return response
                .status(503)
                .header(header::DATE, date(now))
                .header(
                    header::RETRY_AFTER,
                    date(now + jiff::SignedDuration::from_secs(seconds)),
                )
                .body(Body::empty())
                .unwrap();
        }
        Some(Answer::Endless) => {
            let again = futures_util::stream::repeat(bytes).map(Ok::<_, std::io::Error>);
            return response.body(Body::from_stream(again)).unwrap();
        }
        Some(Answer::Becomes(after, bytes, etag)) => {
            let mut script = script.lock().unwrap();
            (script.bytes, script.etag) = (bytes, etag);
            cut = Some(after);
        }
        Some(Answer::Trickle(size, pause)) => trickle = Some((size, pause)),
        Some(Answer::Range(text)) => claimed = Some(text),
        Some(Answer::CutAfter(n)) => cut = Some(n),
        Some(Answer::NoRange) => ranged = false,
        None if missing => {
            return response
                .status(StatusCode::NOT_FOUND)
                .body(Body::from("no such file"))
                .unwrap();
        }
        None => {}
    }
    if current(header::IF_NONE_MATCH) {
        return response
            .status(StatusCode::NOT_MODIFIED)
            .body(Body::empty())
            .unwrap();
    }
    let range = headers.get(header::RANGE).and_then(|value| {
        value
            .to_str()
            .ok()?
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let fresh = !headers.contains_key(header::IF_RANGE) || current(header::IF_RANGE);
    let begin = range.filter(|begin| ranged && fresh && *begin < bytes.len());
    if let Some(begin) = begin {
        response = response.status(206).header(
            header::CONTENT_RANGE,
            claimed.unwrap_or(format!("bytes {begin}-{}/{}", bytes.len() - 1, bytes.len())),
        );
    }
    let body = bytes.slice(begin.unwrap_or(0)..);
    response = response.header(header::CONTENT_LENGTH, body.len());
    if let Some((size, pause)) = trickle {
        let pieces: Vec<_> = (0..body.len().div_ceil(size))
            .map(|n| body.slice(n * size..body.len().min((n + 1) * size)))
            .collect();
        let slowly = futures_util::stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            Ok::<_, std::io::Error>(piece)
        });
        return response.body(Body::from_stream(slowly)).unwrap();
    }
    let Some(n) = cut else {
        return response.body(Body::from(body)).unwrap();
    };
    // Bytes that arrive, a moment for them to do so, and a broken connection.
    let head = futures_util::stream::once(async move { Ok(body.slice(..n.min(body.len()))) });
    let end = futures_util::stream::once(async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        Err(std::io::Error::other("cut"))
    });
    response.body(Body::from_stream(head.chain(end))).unwrap()
}

/// Answers each connection with the same bytes, whatever is asked, and closes it. Returns its address and what it
/// was asked.
pub async fn parrot(answer: Vec<u8>) -> (std::net::SocketAddr, Arc<Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => break,
                }
            }
            let text = String::from_utf8_lossy(&request).into_owned();
            seen.lock().unwrap().push(text);
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    });
    (address, asked)
}
