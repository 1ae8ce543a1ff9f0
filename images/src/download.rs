//! A download: tried again with pauses, resumed where it broke, bounded in bytes and time, and pushed into the
//! intake while it comes, so that what it is made into is ready when its last byte is there.
//!
//! Next step: `intake`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use pileus_base::{Code, Error, Phase, Reporter, Result};
use reqwest::header::{self, HeaderMap, HeaderName};
use reqwest::{Response, StatusCode};
use url::Url;

use crate::fetch::{Patience, cause};
use crate::format::too_large;
use crate::intake::Intake;
use crate::reference::ImageRef;
use crate::sources::Mark;
use crate::store::Store;

/// Bytes that are gathered before they are passed on.
const BATCH: usize = 256 << 10;

/// What came of a download.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// The server says that what we know is still current.
    Unchanged,
    /// All of it was pushed.
    New(Mark),
}

pub(crate) struct Download<'a> {
    pub store: &'a Arc<Store>,
    pub report: &'a Reporter,
    pub url: &'a Url,
    /// What we know of the content that is in the store.
    pub known: Option<&'a Mark>,
    /// Its digest is known, so that parts of two contents would not be taken for one.
    pub checked: bool,
}

/// How one attempt ended, if not in an error for good.
enum Attempt {
    Done,
    Unchanged,
    /// Try again, after this pause if the server named one.
    Again(Error, Option<Duration>),
}

/// What the bytes that came so far are the beginning of.
#[derive(Debug, Default)]
struct Begun {
    mark: Mark,
    /// What tells this content from every other.
    validator: Option<String>,
    /// Bytes in all, if the server says so.
    total: Option<u64>,
}

impl Download<'_> {
    /// Pushes all of it into `intake`.
    pub async fn run(&self, intake: &mut Intake) -> Result<Fetched> {
        self.report.phase(Phase::RetrievingImage);
        let mut begun = Begun::default();
        let mut pace = Pace::new(&self.store.config.patience);
        let (mut fruitless, mut furthest) = (0, 0);
        loop {
            let attempt = self.attempt(intake, &mut begun, &mut pace).await?;
            let (err, wish) = match attempt {
                Attempt::Done => return Ok(Fetched::New(begun.mark)),
                Attempt::Unchanged => return Ok(Fetched::Unchanged),
                Attempt::Again(err, wish) => (err, wish),
            };
            // What had to be fetched once more is no progress.
            fruitless = if intake.position() > furthest {
                1
            } else {
                fruitless + 1
            };
            furthest = furthest.max(intake.position());
            if fruitless >= self.store.config.patience.attempts {
                return Err(err);
            }
            let pause = self.pause(fruitless, wish);
            tracing::info!(url = shown(self.url), %err, ?pause, at = intake.position(), "download is tried again");
            self.report.log(format!("{err}; trying again"));
            pace.waited(pause, 0).map_err(|why| self.error(&why))?;
            self.report
                .or_cancelled(async {
                    tokio::time::sleep(pause).await;
                    Ok(())
                })
                .await?;
        }
    }

    fn pause(&self, fruitless: u32, wish: Option<Duration>) -> Duration {
        let patience = &self.store.config.patience;
        let full = patience.pause.saturating_mul(1 << fruitless.min(10));
        let jittered = full.mul_f64(rand::random_range(0.5..1.0));
        wish.unwrap_or(jittered).min(patience.max_pause)
    }

    async fn attempt(
        &self,
        intake: &mut Intake,
        begun: &mut Begun,
        pace: &mut Pace,
    ) -> Result<Attempt> {
        // Without a sign that it is the rest of the same, the rest is of no use.
        if intake.position() > 0 && begun.validator.is_none() && !self.checked {
            intake.restart().await?;
        }
        let at = intake.position();
        let request = self.request(at, begun);
        let asked = Instant::now();
        let answer = self
            .report
            .or_cancelled(async { Ok(request.send().await) })
            .await?;
        let slow = pace.waited(asked.elapsed(), 0);
        let response = match answer {
            Ok(response) => response,
            Err(err) if err.is_redirect() || err.is_builder() => return Err(self.failed(err)),
            Err(err) => return Ok(Attempt::Again(self.failed(err), None)),
        };
        slow.map_err(|why| self.error(&why))?;
        match response.status() {
            StatusCode::NOT_MODIFIED if at == 0 && self.known.is_some() => {
                return Ok(Attempt::Unchanged);
            }
            StatusCode::PARTIAL_CONTENT if at > 0 => {
                if !begun.goes_on_with(at, response.headers()) {
                    intake.restart().await?;
                    let err = self.error("the server goes on with something else");
                    return Ok(Attempt::Again(err, None));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if at > 0 => {
                intake.restart().await?;
                let err = self.error("the server can't resume the download");
                return Ok(Attempt::Again(err, None));
            }
            StatusCode::OK => {
                if at > 0 {
                    tracing::info!(url = shown(self.url), at, "download starts over");
                    intake.restart().await?;
                }
                *begun = Begun::of(&response);
            }
            _ => return self.status(&response),
        }
        let limits = &intake.target().limits;
        let rest = response.content_length();
        let end = rest.map(|rest| rest.saturating_add(intake.position()));
        begun.total = begun.total.or(end);
        if begun
            .total
            .or(end)
            .is_some_and(|total| total > limits.download)
        {
            return Err(too_large(limits.download));
        }
        if let Some(rest) = rest {
            self.store.make_room(rest, self.report).await?;
        }
        self.stream(response, intake, begun.total, pace).await
    }

    fn request(&self, at: u64, begun: &Begun) -> reqwest::RequestBuilder {
        let mut request = self
            .store
            .client
            .get(self.url.clone())
            .header(header::ACCEPT_ENCODING, "identity");
        if at > 0 {
            request = request.header(header::RANGE, format!("bytes={at}-"));
            if let Some(validator) = &begun.validator {
                request = request.header(header::IF_RANGE, validator);
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
        intake: &mut Intake,
        total: Option<u64>,
        pace: &mut Pace,
    ) -> Result<Attempt> {
        let mut body = response.bytes_stream();
        let mut batch = BytesMut::new();
        loop {
            let asked = Instant::now();
            let next = self
                .report
                .or_cancelled(async { Ok(body.next().await) })
                .await?;
            let (bytes, ended) = match next {
                Some(Ok(bytes)) => (bytes, None),
                Some(Err(err)) => (Bytes::new(), Some(Some(self.failed(err)))),
                None => (Bytes::new(), Some(None)),
            };
            let slow = pace.waited(asked.elapsed(), bytes.len());
            batch.extend_from_slice(&bytes);
            if batch.len() >= BATCH || ended.is_some() && !batch.is_empty() {
                // Not a wait for the network: the disk sets the pace.
                let full = batch.split().freeze();
                self.report.or_cancelled(intake.push(full)).await?;
                self.report.progress(intake.position(), total);
            }
            slow.map_err(|why| self.error(&why))?;
            match ended {
                None => {}
                Some(Some(err)) => return Ok(Attempt::Again(err, None)),
                Some(None) if total.is_some_and(|total| intake.position() < total) => {
                    return Ok(Attempt::Again(self.error("the connection was cut"), None));
                }
                Some(None) => return Ok(Attempt::Done),
            }
        }
    }

    /// Judges a status that is no success. What else the answer says is not shown: it may be something that only
    /// this host can see.
    fn status(&self, response: &Response) -> Result<Attempt> {
        let status = response.status();
        let err = self.error(&format!("the server answers {status}"));
        let again = status.is_server_error()
            || matches!(
                status,
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
            );
        if again {
            return Ok(Attempt::Again(err, self.retry_after(response.headers())));
        }
        if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED || !status.is_client_error() {
            return Err(err);
        }
        Err(Error::new(
            Code::ImageNotFound,
            format!(
                "There is no image at {}: the server answers {status}",
                shown(self.url)
            ),
        )
        .advise("Check the URL, and whether it asks for a name and a password."))
    }

    /// When to come again, in seconds or as a date (by the server's clock, if it tells it).
    fn retry_after(&self, headers: &HeaderMap) -> Option<Duration> {
        let value = text(headers, header::RETRY_AFTER)?;
        if let Ok(seconds) = value.trim().parse() {
            return Some(Duration::from_secs(seconds));
        }
        let now = date(headers, header::DATE).unwrap_or_else(self.store.config.now);
        let wait = date(headers, header::RETRY_AFTER)?.duration_since(now);
        Some(wait.try_into().unwrap_or(Duration::ZERO))
    }

    fn error(&self, why: &str) -> Error {
        Error::new(
            Code::FetchFailed,
            format!("Downloading {} failed: {why}", shown(self.url)),
        )
        .advise("Check the connection and the URL, and try again.")
    }

    fn failed(&self, err: reqwest::Error) -> Error {
        self.error(&cause(&err)).with_source(err.without_url())
    }
}

impl Begun {
    fn of(response: &Response) -> Self {
        let headers = response.headers();
        let mark = Mark {
            etag: text(headers, header::ETAG),
            last_modified: text(headers, header::LAST_MODIFIED),
            file: None,
        };
        // A weak tag may stand for two contents, and so may a time that was not over when it was told.
        let strong = mark.etag.clone().filter(|etag| !etag.starts_with("W/"));
        let over = || {
            let (changed, told) = (
                date(headers, header::LAST_MODIFIED)?,
                date(headers, header::DATE)?,
            );
            (told.as_second() > changed.as_second()).then(|| mark.last_modified.clone())?
        };
        Self {
            validator: strong.or_else(over),
            total: response.content_length(),
            mark,
        }
    }

    /// Whether a partial answer is the rest of what came, from `at`.
    fn goes_on_with(&self, at: u64, headers: &HeaderMap) -> bool {
        let Some((begin, total)) = text(headers, header::CONTENT_RANGE).and_then(|r| range(&r))
        else {
            return false;
        };
        let same_total = self.total.is_none() || total.is_none() || total == self.total;
        let etag = text(headers, header::ETAG);
        let same_etag = etag.is_none() || self.mark.etag.is_none() || etag == self.mark.etag;
        begin == at && same_total && same_etag
    }
}

/// `bytes 5-9/10`: the first byte, and how many there are in all.
fn range(text: &str) -> Option<(u64, Option<u64>)> {
    let (part, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let begin = part.split_once('-')?.0.parse().ok()?;
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((begin, total))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<Timestamp> {
    static PARSER: rfc2822::DateTimeParser = rfc2822::DateTimeParser::new();
    PARSER.parse_timestamp(text(headers, name)?.trim()).ok()
}

/// Ends a download that keeps its connection alive but does not come forward.
#[derive(Debug)]
struct Pace {
    begin: Instant,
    total: Option<Duration>,
    window: Duration,
    least: u64,
    waited: Duration,
    got: u64,
}

impl Pace {
    fn new(patience: &Patience) -> Self {
        Self {
            begin: Instant::now(),
            total: patience.total,
            window: patience.window,
            least: patience.least,
            waited: Duration::ZERO,
            got: 0,
        }
    }

    /// So long the network was waited for, and gave so many bytes. An error says why it was too long.
    fn waited(&mut self, time: Duration, bytes: usize) -> std::result::Result<(), String> {
        if let Some(total) = self.total
            && self.begin.elapsed() > total
        {
            return Err(format!("it takes longer than {} s", total.as_secs()));
        }
        self.waited += time;
        self.got += bytes as u64;
        if self.got >= self.least {
            (self.waited, self.got) = (Duration::ZERO, 0);
        } else if self.waited >= self.window {
            return Err(format!(
                "it is too slow: {} bytes in {} s",
                self.got,
                self.waited.as_secs()
            ));
        }
        Ok(())
    }
}

impl ImageRef {
    /// As it may be shown and stored, as a user would write it but for what is secret in a URL.
    pub fn shown(&self) -> String {
        match self {
            Self::Url(url) => shown(url),
            other => other.to_string(),
        }
    }
}

/// A URL as it may be shown and stored: without a name, a password, a fragment, or what else lets one in.
pub(crate) fn shown(url: &Url) -> String {
    const SECRETS: [&str; 12] = [
        "token",
        "secret",
        "sig",
        "pass",
        "pwd",
        "auth",
        "credential",
        "key",
        "session",
        "jwt",
        "x-amz-",
        "x-goog-",
    ];
    let mut shown = url.clone();
    // Fails for URLs that can't have them.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_fragment(None);
    let is_secret = |name: &str| {
        let name = name.to_ascii_lowercase();
        SECRETS.iter().any(|secret| name.contains(secret))
    };
    if url.query_pairs().any(|(name, _)| is_secret(&name)) {
        let pairs: Vec<_> = url
            .query_pairs()
            .map(|(name, value)| match is_secret(&name) {
                true => (name, "hidden".into()),
                false => (name, value),
            })
            .collect();
        shown.query_pairs_mut().clear().extend_pairs(pairs);
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_say_where_they_begin() {
        for (text, want) in [
            ("bytes 5-9/10", Some((5, Some(10)))),
            ("bytes 5-9/*", Some((5, None))),
            ("bytes */10", None),
            ("bytes 5-9", None),
            ("bytes x-9/10", None),
            ("bytes 5-9/x", None),
            ("lines 5-9/10", None),
            ("bytes 99999999999999999999-1/2", None),
        ] {
            assert_eq!(range(text), want, "{text}");
        }
    }

    #[test]
    fn dates_of_http() {
        let headers = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::DATE, value.parse().unwrap());
            date(&headers, header::DATE).map(Timestamp::as_second)
        };
        assert_eq!(headers("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        for bad in ["", "now", "Sun, 06 Nov 1994", "99999999999999999999"] {
            assert_eq!(headers(bad), None, "{bad}");
        }
    }

    #[test]
    fn coming_forward_is_what_counts() {
        let patience = Patience {
            window: Duration::from_secs(10),
            least: 100,
            ..Patience::default()
        };
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(&patience);
        for _ in 0..100 {
            pace.waited(second, 12).unwrap();
        }
        let mut pace = Pace::new(&patience);
        let slow = (0..100).position(|_| pace.waited(second, 9).is_err());
        assert_eq!(slow, Some(9), "after ten seconds");
        let mut pace = Pace::new(&patience);
        assert!(pace.waited(20 * second, 100).is_ok(), "a pause and a gush");
        assert!(pace.waited(20 * second, 0).is_err());
    }

    #[test]
    fn references_are_shown_without_secrets() {
        for (text, want) in [
            ("debian", "debian"),
            ("file:///a%20b", "file:///a b"),
            ("https://u:p@h/a?sig=1", "https://h/a?sig=hidden"),
        ] {
            let reference: ImageRef = text.parse().unwrap();
            assert_eq!(reference.shown(), want);
        }
    }
}
