//! One catalogue, as it was when it was last fetched: in memory, and in a file so that a daemon that
//! starts without a network still knows what it knew. Fetched again when it is old, and used as it is
//! when that fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Reporter, Result, files};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use url::Url;

use super::manifest::{self, Entry};
use super::{ARCH, StreamsConfig};

const INDEX: &str = "streams/v1/index.json";
/// Real ones have a few kilobytes and a few megabytes.
const MAX_INDEX: usize = 4 << 20;
const MAX_PRODUCTS: usize = 64 << 20;
/// After a failure the copy is used for this time before the host is asked again.
const REST: Duration = Duration::from_secs(60);
/// How long a host may take if there is a copy, and if there is none.
const BOUND_WITH_COPY: Duration = Duration::from_secs(20);
const BOUND: Duration = Duration::from_secs(120);
const ATTEMPTS: u32 = 2;

/// What a catalogue says.
#[derive(Debug, Serialize, Deserialize)]
pub struct List {
    /// Where it came from; a file of another address is not believed.
    pub url: Url,
    pub fetched: Timestamp,
    pub entries: Vec<Entry>,
}

#[derive(Debug, Default)]
struct Known {
    list: Option<Arc<List>>,
    /// The file was looked at.
    loaded: bool,
    failed: Option<Instant>,
}

/// The catalogue at one address.
#[derive(Debug)]
pub struct Catalogue {
    url: Url,
    file: PathBuf,
    known: tokio::sync::Mutex<Known>,
}

impl Catalogue {
    pub fn new(url: Url, config: &StreamsConfig) -> Self {
        let hash = Digest::from_bytes(sha2::Sha256::digest(url.as_str().as_bytes()).into());
        Self {
            file: config.cache.join(format!("{}.json", &hash.hex()[..32])),
            url,
            known: tokio::sync::Mutex::default(),
        }
    }

    pub fn url(&self) -> &Url {
        &self.url
    }

    /// What it says. With `refresh` it is fetched however new the copy is.
    pub async fn list(
        &self,
        client: &reqwest::Client,
        config: &StreamsConfig,
        refresh: bool,
        report: &Reporter,
    ) -> Result<Arc<List>> {
        // Held while it is fetched: others wait for the same list.
        let mut known = self.known.lock().await;
        if !known.loaded {
            known.list = self.load().await;
            known.loaded = true;
        }
        if let (Some(list), false) = (&known.list, refresh) {
            let resting = known.failed.is_some_and(|at| at.elapsed() < REST);
            if resting || is_fresh(list, config) {
                return Ok(list.clone());
            }
        }
        let bound = match known.list {
            Some(_) => BOUND_WITH_COPY,
            None => BOUND,
        };
        let fetched = async {
            match tokio::time::timeout(bound, self.fetch(client, config)).await {
                Ok(fetched) => fetched,
                Err(_) => Err(self.failed("it does not answer in time")),
            }
        };
        match (report.or_cancelled(fetched).await, &known.list) {
            (Ok(list), _) => {
                let list = Arc::new(list);
                known.failed = None;
                known.list = Some(list.clone());
                self.keep(list.clone()).await;
                Ok(list)
            }
            (Err(err), Some(list)) if err.code == Code::FetchFailed => {
                tracing::warn!(%err, "an image list is not current");
                report.warn(format!("{err}; using the list of {}", list.fetched));
                let list = list.clone();
                known.failed = Some(Instant::now());
                Ok(list)
            }
            (Err(err), _) => Err(err),
        }
    }

    async fn fetch(&self, client: &reqwest::Client, config: &StreamsConfig) -> Result<List> {
        let index = self.get(client, config, INDEX, MAX_INDEX).await?;
        let path = manifest::index(&index).map_err(|err| self.failed(&err.message))?;
        let bytes = self.get(client, config, &path, MAX_PRODUCTS).await?;
        let entries = tokio::task::spawn_blocking(move || manifest::products(&bytes, ARCH)).await;
        let entries = entries
            .map_err(|err| Error::internal(format!("Reading an image list panicked: {err}")))?
            .map_err(|err| self.failed(&err.message))?;
        Ok(List {
            url: self.url.clone(),
            fetched: (config.now)(),
            entries,
        })
    }

    /// Gets a small file, trying again once if that may help.
    async fn get(
        &self,
        client: &reqwest::Client,
        config: &StreamsConfig,
        path: &str,
        limit: usize,
    ) -> Result<Vec<u8>> {
        let url = self.url.join(path);
        let url = url.map_err(|err| self.failed(&err.to_string()))?;
        let mut attempt = 1;
        loop {
            match get_once(client, url.clone(), limit).await {
                Ok(bytes) => return Ok(bytes),
                Err((_, true)) if attempt < ATTEMPTS => attempt += 1,
                Err((why, _)) => return Err(self.failed(&why)),
            }
            tokio::time::sleep(config.patience.pause).await;
        }
    }

    fn failed(&self, why: &str) -> Error {
        Error::new(
            Code::FetchFailed,
            format!("The image host {} can't be used: {why}", self.url),
        )
        .advise("Check the connection; `local.image.mirror` names another host.")
    }

    async fn load(&self) -> Option<Arc<List>> {
        let (file, url) = (self.file.clone(), self.url.clone());
        let load = move || {
            let bytes = files::read_bounded(&file, MAX_PRODUCTS as u64).ok()?;
            let list: List = serde_json::from_slice(&bytes).ok()?;
            (list.url == url).then(|| Arc::new(list))
        };
        tokio::task::spawn_blocking(load).await.ok().flatten()
    }

    /// Not worth failing for.
    async fn keep(&self, list: Arc<List>) {
        let file = self.file.clone();
        let keep = move || {
            if let Some(folder) = file.parent() {
                files::create_folder(folder, 0o755)?;
            }
            let text = serde_json::to_vec(&*list)
                .map_err(|err| Error::internal(format!("Writing an image list: {err}")))?;
            files::write_atomic(&file, &text, 0o644)
        };
        match tokio::task::spawn_blocking(keep).await {
            Ok(Err(err)) => tracing::warn!(%err, "an image list can't be kept"),
            Err(err) => tracing::warn!(%err, "an image list can't be kept"),
            Ok(Ok(())) => {}
        }
    }
}

/// Whether the list is young enough. One from the future (the clock was set back) is not.
fn is_fresh(list: &List, config: &StreamsConfig) -> bool {
    let age = (config.now)().duration_since(list.fetched);
    !age.is_negative() && age.unsigned_abs() < config.fresh
}

/// The body, or why there is none and whether it is worth another try.
async fn get_once(
    client: &reqwest::Client,
    url: Url,
    limit: usize,
) -> std::result::Result<Vec<u8>, (String, bool)> {
    // One that was silent for so long is not asked again.
    let failed = |err: reqwest::Error| (crate::fetch::cause(&err), !err.is_timeout());
    let response = client.get(url).send().await.map_err(failed)?;
    let status = response.status();
    if !status.is_success() {
        return Err((format!("it answers {status}"), status.is_server_error()));
    }
    let mut bytes = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(part) = body.next().await {
        bytes.extend_from_slice(&part.map_err(failed)?);
        if bytes.len() > limit {
            return Err((format!("its list has more than {limit} bytes"), false));
        }
    }
    Ok(bytes)
}
