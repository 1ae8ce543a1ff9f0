//! Where an image's bytes are read: local files here, with what `download` needs to be polite and safe.
//!
//! Next step: `intake` (what the bytes pass through).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt};
use sha2::Digest as _;
use url::Url;

use crate::format::too_large;
use crate::intake::{Intake, PIECE, blocking};
use crate::sources::Mark;

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
    /// At least `least` bytes have to come within any so long time of waiting for the network.
    pub window: Duration,
    pub least: u64,
    /// The longest time that a download may take in all; as long as it comes forward there is no bound without.
    pub total: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(30),
            attempts: 6,
            pause: Duration::from_millis(500),
            max_pause: Duration::from_secs(30),
            window: Duration::from_secs(300),
            least: 256 << 10,
            total: None,
        }
    }
}

/// A client for downloads. `proxies`: whether the proxy variables of the environment count.
pub(crate) fn client(patience: &Patience, proxies: bool) -> Result<reqwest::Client> {
    let redirects = reqwest::redirect::Policy::custom(|attempt| {
        match may_follow(attempt.previous(), attempt.url()) {
            Ok(()) => attempt.follow(),
            Err(why) => attempt.error(why),
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

/// Whether a redirect is followed; what was encrypted stays so.
fn may_follow(previous: &[Url], next: &Url) -> std::result::Result<(), &'static str> {
    let was_secret = previous.iter().any(|url| url.scheme() == "https");
    match next.scheme() {
        "https" | "http" if previous.len() > MAX_REDIRECTS => Err("too many redirects"),
        "https" => Ok(()),
        "http" if was_secret => Err("the server redirects from https to http"),
        "http" => Ok(()),
        _ => Err("the server redirects to something else than http"),
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

/// Pushes a local file's bytes into the intake, read once through one descriptor, so that what is checked is
/// what is used.
pub(crate) async fn file(path: &Path, intake: &mut Intake) -> Result<Mark> {
    let target = intake.target();
    target.report.phase(Phase::RetrievingImage);
    let (file, meta) = open_file(path)?;
    let (total, limit) = (meta.len(), target.limits.download);
    if total > limit {
        return Err(too_large(limit));
    }
    target.check_room_for(meta.blocks().saturating_mul(512).min(total))?;
    let mark = mark_of_file(&meta);
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(PIECE);
    let what = format!("Reading {}", path.display());
    intake
        .pour(&mut file, Some(total), |err| Error::io(&what, err))
        .await?;
    let now = file.metadata().await.io(&what)?;
    if mark_of_file(&now) != mark {
        return Err(Error::new(
            Code::BadImage,
            format!("{} was changed while it was read", path.display()),
        )
        .advise("Try again when nothing writes to it."));
    }
    Ok(mark)
}

/// The digest of a file's content.
pub(crate) async fn hash(path: &Path, report: &Reporter) -> Result<Digest> {
    let what = format!("Reading {}", path.display());
    let mut file = File::open(path).io(&what)?;
    let total = file.metadata().io(&what)?.len();
    let report = report.clone();
    blocking(move || {
        let mut hash = sha2::Sha256::new();
        let mut buffer = vec![0; PIECE];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_that_are_followed() {
        let urls =
            |text: &str| -> Vec<Url> { text.split(' ').map(|url| url.parse().unwrap()).collect() };
        let may = |previous: &str, next: &str| may_follow(&urls(previous), &urls(next)[0]).is_ok();
        assert!(may("http://a/", "http://b/"));
        assert!(may("http://a/", "https://b/"));
        assert!(may("https://a/", "https://b/"));
        assert!(!may("https://a/", "http://a/"));
        assert!(!may("http://a/ https://a/", "http://a/"));
        assert!(!may("http://a/", "file:///etc/passwd"));
        assert!(!may("http://a/", "ftp://a/"));
        let many = ["http://a/"; MAX_REDIRECTS].join(" ");
        assert!(may(&many, "http://a/"));
        assert!(!may(&format!("{many} http://a/"), "http://a/"));
    }
}
