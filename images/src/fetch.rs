//! Getting an artifact's bytes into the stage, hashed on the way: downloads that resume, retry and
//! are bounded, and copies of local files.
//!
//! Next step: `format` (what the bytes are).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt};
use reqwest::{Response, StatusCode, header};
use sha2::Digest as _;
use url::Url;

use crate::format::{Work, too_large};
use crate::sources::Mark;
use crate::sparse::SparseWriter;

/// Bytes that are gathered before they are written and hashed on a blocking thread.
const BATCH: usize = 1 << 20;
const MAX_REDIRECTS: usize = 10;

/// How patient downloads are.
#[derive(Debug, Clone)]
pub struct Patience {
    pub connect: Duration,
    /// Longest time without a byte.
    pub idle: Duration,
    /// Attempts in a row that bring no byte.
    pub attempts: u32,
    /// The first pause between attempts; it doubles, with jitter.
    pub pause: Duration,
    /// The longest pause, also if the server asks for more.
    pub max_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(30),
            attempts: 6,
            pause: Duration::from_millis(500),
            max_pause: Duration::from_secs(30),
        }
    }
}

/// A client for downloads. `proxies`: whether the proxy variables of the environment count.
pub(crate) fn client(patience: &Patience, proxies: bool) -> Result<reqwest::Client> {
    let redirects = reqwest::redirect::Policy::custom(|attempt| {
        let downgrade = attempt.url().scheme() != "https"
            && attempt.previous().iter().any(|url| url.scheme() == "https");
        if downgrade {
            attempt.error("the server redirects from https to http")
        } else if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirects")
        } else {
            attempt.follow()
        }
    });
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("pileus/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(patience.connect)
        .read_timeout(patience.idle)
        .redirect(redirects);
    if !proxies {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|err| Error::internal("Setting up the HTTP client failed").with_source(err))
}

/// What came of a download.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// The server says that what we know is still current.
    Unchanged,
    New(Digest, Mark),
}

/// Hash and file, written together.
struct Sink {
    writer: SparseWriter,
    hash: sha2::Sha256,
}

impl Sink {
    fn create(target: &Path, limit: u64) -> Result<Self> {
        let file = File::create_new(target).io(format_args!("Creating {}", target.display()))?;
        Ok(Self {
            writer: SparseWriter::new(file, limit),
            hash: sha2::Sha256::new(),
        })
    }

    fn write(&mut self, bytes: &[u8], limit: u64) -> Result<()> {
        self.writer
            .write_all(bytes)
            .map_err(|err| match err.kind() {
                io::ErrorKind::FileTooLarge => too_large(limit),
                _ => Error::io("Writing the download", err),
            })?;
        self.hash.update(bytes);
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.hash = sha2::Sha256::new();
        self.writer.restart().io("Starting the download again")
    }

    fn finish(self) -> Result<Digest> {
        self.writer.finish().io("Writing the download")?;
        Ok(Digest::from_bytes(self.hash.finalize().into()))
    }
}

/// How one attempt ended, if not in an error for good.
enum Attempt {
    Done,
    Unchanged,
    /// Try again, after this pause if the server named one.
    Again(Error, Option<Duration>),
}

pub(crate) struct Download<'a> {
    pub client: &'a reqwest::Client,
    pub patience: &'a Patience,
    pub work: &'a Work<'a>,
    pub report: &'a Reporter,
    pub url: &'a Url,
    /// What we know of the content that is in the store.
    pub known: Option<&'a Mark>,
}

impl Download<'_> {
    /// Downloads to `target`.
    pub async fn run(&self, target: &Path) -> Result<Fetched> {
        self.report.phase(Phase::RetrievingImage);
        let mut sink = Sink::create(target, self.work.limits.download)?;
        let mut mark = Mark::default();
        let mut fruitless = 0;
        loop {
            let before = sink.writer.position();
            let (back, attempt) = self.attempt(sink, &mut mark).await?;
            sink = back;
            let (err, wish) = match attempt {
                Attempt::Done => {
                    let digest = blocking(move || sink.finish()).await?;
                    return Ok(Fetched::New(digest, mark));
                }
                Attempt::Unchanged => return Ok(Fetched::Unchanged),
                Attempt::Again(err, wish) => (err, wish),
            };
            fruitless = if sink.writer.position() > before {
                1
            } else {
                fruitless + 1
            };
            if fruitless >= self.patience.attempts {
                return Err(err);
            }
            let pause = self.pause(fruitless, wish);
            tracing::info!(url = %self.url, %err, ?pause, at = sink.writer.position(), "download is tried again");
            self.report.log(format!("{err}; trying again"));
            self.report
                .or_cancelled(async {
                    tokio::time::sleep(pause).await;
                    Ok(())
                })
                .await?;
        }
    }

    fn pause(&self, fruitless: u32, wish: Option<Duration>) -> Duration {
        let patience = self.patience;
        let full = patience.pause.saturating_mul(1 << fruitless.min(10));
        let jittered = full.mul_f64(rand::random_range(0.5..1.0));
        wish.unwrap_or(jittered).min(patience.max_pause)
    }

    async fn attempt(&self, mut sink: Sink, mark: &mut Mark) -> Result<(Sink, Attempt)> {
        let at = sink.writer.position();
        let request = self.request(at, mark);
        let response = match self
            .report
            .or_cancelled(async { Ok(request.send().await) })
            .await?
        {
            Ok(response) => response,
            Err(err) => return Ok((sink, Attempt::Again(self.failed(err), None))),
        };
        let status = response.status();
        match status {
            StatusCode::NOT_MODIFIED if at == 0 => return Ok((sink, Attempt::Unchanged)),
            StatusCode::PARTIAL_CONTENT if at > 0 && resumes_at(&response) == Some(at) => {}
            StatusCode::RANGE_NOT_SATISFIABLE if at > 0 => {
                sink.restart()?;
                let err = self.error("the server can't resume the download");
                return Ok((sink, Attempt::Again(err, None)));
            }
            StatusCode::OK => {
                sink.restart()?;
                *mark = mark_of(&response);
            }
            _ => return self.status(&response).map(|attempt| (sink, attempt)),
        }
        let begin = sink.writer.position();
        let total = response.content_length().map(|len| len + begin);
        if let Some(total) = total {
            if total > self.work.limits.download {
                return Err(too_large(self.work.limits.download));
            }
            self.work.check_room_for(total - begin)?;
        }
        self.stream(response, sink, total).await
    }

    fn request(&self, at: u64, mark: &Mark) -> reqwest::RequestBuilder {
        let mut request = self
            .client
            .get(self.url.clone())
            .header(header::ACCEPT_ENCODING, "identity");
        if at > 0 {
            request = request.header(header::RANGE, format!("bytes={at}-"));
            // Only a strong mark promises that the rest belongs to the beginning.
            let strong = mark.etag.as_ref().filter(|etag| !etag.starts_with("W/"));
            if let Some(mark) = strong.or(mark.last_modified.as_ref()) {
                request = request.header(header::IF_RANGE, mark);
            }
        } else if let Some(known) = self.known {
            if let Some(etag) = &known.etag {
                request = request.header(header::IF_NONE_MATCH, etag);
            } else if let Some(time) = &known.last_modified {
                request = request.header(header::IF_MODIFIED_SINCE, time);
            }
        }
        request
    }

    async fn stream(
        &self,
        response: Response,
        mut sink: Sink,
        total: Option<u64>,
    ) -> Result<(Sink, Attempt)> {
        let limit = self.work.limits.download;
        let mut body = response.bytes_stream();
        let mut batch: Vec<Bytes> = Vec::new();
        let mut gathered = 0;
        loop {
            let next = self
                .report
                .or_cancelled(async { Ok(body.next().await) })
                .await?;
            let (end, broken) = match next {
                Some(Ok(bytes)) => {
                    gathered += bytes.len();
                    batch.push(bytes);
                    (false, None)
                }
                Some(Err(err)) => (true, Some(self.failed(err))),
                None => (true, None),
            };
            if gathered >= BATCH || end {
                let full = std::mem::take(&mut batch);
                gathered = 0;
                sink = blocking(move || {
                    for bytes in &full {
                        sink.write(bytes, limit)?;
                    }
                    Ok(sink)
                })
                .await?;
                self.report.progress(sink.writer.position(), total);
                self.work.check_space()?;
            }
            if let Some(err) = broken {
                return Ok((sink, Attempt::Again(err, None)));
            }
            if end {
                let short = total.is_some_and(|total| sink.writer.position() < total);
                let attempt = if short {
                    Attempt::Again(self.error("the connection was cut"), None)
                } else {
                    Attempt::Done
                };
                return Ok((sink, attempt));
            }
        }
    }

    /// Judges a status that is no success.
    fn status(&self, response: &Response) -> Result<Attempt> {
        let status = response.status();
        let err = self.error(&format!("the server answers {status}"));
        let again = status.is_server_error()
            || matches!(
                status,
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
            );
        if again {
            let wish = response
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                .map(Duration::from_secs);
            return Ok(Attempt::Again(err, wish));
        }
        if status.is_client_error() {
            return Err(Error::new(
                Code::ImageNotFound,
                format!(
                    "There is no image at {}: the server answers {status}",
                    self.url
                ),
            ));
        }
        Err(err)
    }

    fn error(&self, why: &str) -> Error {
        Error::new(
            Code::FetchFailed,
            format!("Downloading {} failed: {why}", self.url),
        )
        .advise("Check the connection and the URL, and try again.")
    }

    fn failed(&self, err: reqwest::Error) -> Error {
        self.error(&cause(&err)).with_source(err.without_url())
    }
}

/// Why a request failed, in few words.
pub(crate) fn cause(err: &reqwest::Error) -> String {
    if err.is_timeout() {
        return "the server does not answer in time".to_owned();
    }
    // The innermost cause is what helps: "connection refused", a TLS error, …
    let mut cause: &dyn std::error::Error = err;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn mark_of(response: &Response) -> Mark {
    let text = |name| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
    Mark {
        etag: text(header::ETAG),
        last_modified: text(header::LAST_MODIFIED),
        file: None,
    }
}

/// The first byte of a partial answer.
fn resumes_at(response: &Response) -> Option<u64> {
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    range
        .strip_prefix("bytes ")?
        .split_once('-')?
        .0
        .parse()
        .ok()
}

/// The mark of a local file: as long as it is the same, the content is taken to be.
pub(crate) fn file_mark(path: &Path) -> Result<Mark> {
    Ok(mark_of_file(&open_file(path)?.1))
}

fn mark_of_file(meta: &std::fs::Metadata) -> Mark {
    let mtime = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    Mark {
        file: Some((meta.len(), mtime, meta.ino(), meta.dev())),
        ..Mark::default()
    }
}

fn open_file(path: &Path) -> Result<(File, std::fs::Metadata)> {
    // A FIFO must not block us.
    let opened = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .and_then(|file| Ok((file.metadata()?, file)));
    let (meta, file) = opened.map_err(|err| match err.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::new(
            Code::ImageNotFound,
            format!("There is no file {}", path.display()),
        ),
        io::ErrorKind::PermissionDenied => Error::new(
            Code::ImageNotFound,
            format!("The daemon may not read {}", path.display()),
        ),
        _ => Error::io(format_args!("Opening {}", path.display()), err),
    })?;
    if !meta.is_file() {
        return Err(Error::new(
            Code::BadImage,
            format!("{} is not a regular file", path.display()),
        ));
    }
    Ok((file, meta))
}

/// Copies a local file to `target`, so that what is checked is what is used.
pub(crate) async fn copy(
    work: &Work<'_>,
    path: &Path,
    target: &Path,
    report: &Reporter,
) -> Result<(Digest, Mark)> {
    report.phase(Phase::RetrievingImage);
    let limit = work.limits.download;
    let (mut file, meta) = open_file(path)?;
    let total = meta.len();
    if total > limit {
        return Err(too_large(limit));
    }
    work.check_room_for(meta.blocks().saturating_mul(512).min(total))?;
    let mut sink = Sink::create(target, limit)?;
    let (path, report) = (path.to_owned(), report.clone());
    blocking(move || {
        let mut buffer = vec![0; BATCH];
        loop {
            report.check()?;
            let n = file
                .read(&mut buffer)
                .io(format_args!("Reading {}", path.display()))?;
            if n == 0 {
                break;
            }
            sink.write(&buffer[..n], limit)?;
            report.progress(sink.writer.position(), Some(total));
        }
        let mark = mark_of_file(&meta);
        let now = file
            .metadata()
            .io(format_args!("Reading {}", path.display()))?;
        if mark_of_file(&now) != mark {
            return Err(Error::new(
                Code::BadImage,
                format!("{} was changed while it was read", path.display()),
            )
            .advise("Try again when nothing writes to it."));
        }
        Ok((sink.finish()?, mark))
    })
    .await
}

/// The digest of a file's content.
pub(crate) async fn hash(path: &Path, report: &Reporter) -> Result<Digest> {
    let what = format!("Reading {}", path.display());
    let mut file = File::open(path).io(&what)?;
    let total = file.metadata().io(&what)?.len();
    let report = report.clone();
    blocking(move || {
        let mut hash = sha2::Sha256::new();
        let mut buffer = vec![0; BATCH];
        let mut done = 0;
        loop {
            report.check()?;
            let n = file.read(&mut buffer).io(&what)?;
            if n == 0 {
                return Ok(Digest::from_bytes(hash.finalize().into()));
            }
            hash.update(&buffer[..n]);
            done += n as u64;
            report.progress(done, Some(total));
        }
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| Error::internal(format!("Work on an image panicked: {err}")))?
}
