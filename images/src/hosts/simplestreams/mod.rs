//! Images under Ubuntu's names: catalogues on the net in the simplestreams form, one a *remote*
//! (`release`, `daily`, …), all below one address. A name is an alias (`24.04`, `noble`, `lts`), a
//! release's code name, or the beginning of a hash; what it means is a file's address and the SHA-256
//! that the catalogue promises, and fetching and checking that file is the store's business.
//!
//! A *mirror* is another address with the same catalogues. It is trusted with bytes, not with what they
//! are: only images that the host itself lists with the same hash are taken from it.
//!
//! Files: `manifest` (what a catalogue says), `catalogue` (fetched, kept, used again).
//! Next step: `obtain` (one piece of work an item).

mod catalogue;
mod manifest;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Reporter, Result};
use url::Url;

use super::{About, CatalogEntry, Host, Item, Origin};
use crate::fetch::{self, Patience};
use crate::reference::ImageRef;
use catalogue::Catalogue;
use manifest::Entry;

/// Where Ubuntu publishes its cloud images.
pub const UBUNTU: &str = "https://cloud-images.ubuntu.com/";
/// How long a catalogue is believed without asking again.
pub const FRESH: Duration = Duration::from_secs(15 * 60);
/// This machine's processor, as Ubuntu calls it.
const ARCH: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};

/// The remote that is asked first for a name without one.
pub const RELEASE: &str = "release";

/// Name, folder below the address, and whether lists show it.
const REMOTES: [(&str, &str, bool); 3] = [
    (RELEASE, "releases/", true),
    ("daily", "daily/", true),
    ("snapcraft", "buildd/daily/", false),
];

/// What the remotes share.
#[derive(Debug, Clone)]
pub struct StreamsConfig {
    /// The address that the remotes' folders are below; ends with a slash.
    pub base: Url,
    /// Folder for what was fetched last.
    pub cache: PathBuf,
    pub mirror: Mirror,
    pub patience: Patience,
    /// Whether requests go through the proxies that the environment names.
    pub proxies: bool,
    /// How long a catalogue is believed.
    pub fresh: Duration,
    pub now: fn() -> Timestamp,
}

impl StreamsConfig {
    /// Catalogues below `base`, with usual bounds.
    pub fn new(base: Url, cache: PathBuf) -> Self {
        Self {
            base: with_slash(base),
            cache,
            mirror: Mirror::default(),
            patience: Patience::default(),
            proxies: true,
            fresh: FRESH,
            now: Timestamp::now,
        }
    }

    /// The hosts of all remotes, in the order in which they are asked.
    pub fn hosts(&self) -> Result<Vec<Arc<dyn Host>>> {
        let client = fetch::client(&self.patience, self.proxies)?;
        let host = |(name, folder, listed)| -> Result<Arc<dyn Host>> {
            let url = join(&self.base, folder)?;
            Ok(Arc::new(SimpleStreams {
                name,
                folder,
                listed,
                client: client.clone(),
                own: Catalogue::new(url, self),
                mirrored: tokio::sync::Mutex::new(None),
                config: self.clone(),
            }))
        };
        REMOTES.into_iter().map(host).collect()
    }
}

/// The mirror that holds at the moment. Cheap to clone; all clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Mirror(Arc<RwLock<Option<Url>>>);

impl Mirror {
    /// Takes another mirror from now on; an empty text means none. It must be an `https://` address
    /// (or `http://` on this machine itself).
    pub fn set(&self, text: &str) -> Result<()> {
        let url = match text {
            "" => None,
            text => Some(mirror_url(text)?),
        };
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = url;
        Ok(())
    }

    /// The mirror's address; empty if there is none.
    pub fn get(&self) -> String {
        self.url().map_or(String::new(), String::from)
    }

    fn url(&self) -> Option<Url> {
        let held = self.0.read();
        held.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn mirror_url(text: &str) -> Result<Url> {
    let bad = |why: &str| {
        Error::new(
            Code::InvalidSetting,
            format!("Invalid setting 'local.image.mirror={text}': {why}"),
        )
        .advise("Give the address of a mirror of Ubuntu's cloud images, https://HOST/PATH/.")
    };
    let url = Url::parse(text).map_err(|err| bad(&err.to_string()))?;
    let local = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if local => {}
        _ => return Err(bad("the mirror must begin with https://")),
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("an address with ? or # is no folder"));
    }
    Ok(with_slash(url))
}

/// An address that others are below: without the slash its last part would be replaced.
fn with_slash(mut url: Url) -> Url {
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    url
}

fn join(base: &Url, path: &str) -> Result<Url> {
    base.join(path).map_err(|err| {
        Error::new(
            Code::InvalidArgument,
            format!("{base}{path} is no address: {err}"),
        )
    })
}

/// One remote.
#[derive(Debug)]
pub struct SimpleStreams {
    name: &'static str,
    folder: &'static str,
    listed: bool,
    client: reqwest::Client,
    own: Catalogue,
    /// The same remote on the mirror that was used last.
    mirrored: tokio::sync::Mutex<Option<Arc<Catalogue>>>,
    config: StreamsConfig,
}

/// What can be had at the moment, and from where.
struct Offer {
    base: Url,
    entries: Vec<Entry>,
}

impl SimpleStreams {
    async fn offer(&self, refresh: bool, report: &Reporter) -> Result<Offer> {
        let list =
            |catalogue| Catalogue::list(catalogue, &self.client, &self.config, refresh, report);
        let own = list(&self.own).await?;
        let Some(mirror) = self.mirrored().await? else {
            return Ok(Offer {
                base: self.own.url().clone(),
                entries: own.entries.clone(),
            });
        };
        let theirs = list(&mirror).await?;
        let promised: HashSet<&Digest> = own.entries.iter().map(|entry| &entry.digest).collect();
        let entries = theirs.entries.iter();
        let (good, strange): (Vec<&Entry>, _) =
            entries.partition(|entry| promised.contains(&entry.digest));
        if !strange.is_empty() {
            tracing::warn!(mirror = %mirror.url(), images = strange.len(),
                "the mirror has images that the host itself does not list; they are not used");
        }
        Ok(Offer {
            base: mirror.url().clone(),
            entries: good.into_iter().cloned().collect(),
        })
    }

    async fn mirrored(&self) -> Result<Option<Arc<Catalogue>>> {
        let mut held = self.mirrored.lock().await;
        let Some(mirror) = self.config.mirror.url() else {
            *held = None;
            return Ok(None);
        };
        let url = join(&mirror, self.folder)?;
        let fits = held.as_ref().filter(|catalogue| *catalogue.url() == url);
        let catalogue = match fits {
            Some(catalogue) => catalogue.clone(),
            None => Arc::new(Catalogue::new(url, &self.config)),
        };
        *held = Some(catalogue.clone());
        Ok(Some(catalogue))
    }

    fn item(&self, base: &Url, entry: &Entry) -> Result<Item> {
        Ok(Item {
            key: format!("{}:{}", self.name, entry.digest),
            source: format!("{}:{}", self.name, name_of(entry)),
            origin: Origin::Url(join(base, &entry.path)?),
            expected: Some(entry.digest.clone()),
            about: about(entry),
        })
    }

    async fn find(&self, wanted: &str, report: &Reporter) -> Result<Option<Item>> {
        let offer = self.offer(false, report).await?;
        match look_up(&offer.entries, wanted, self.name)? {
            Some(entry) => self.item(&offer.base, entry).map(Some),
            None => Ok(None),
        }
    }
}

impl Host for SimpleStreams {
    fn name(&self) -> &str {
        self.name
    }

    fn is_listed(&self) -> bool {
        self.listed
    }

    fn catalog(&self, refresh: bool) -> BoxFuture<'_, Result<Vec<CatalogEntry>>> {
        async move {
            let offer = self.offer(refresh, &Reporter::silent()).await?;
            let entries = offer.entries.iter();
            Ok(entries
                .filter_map(|entry| shown(self.name, entry))
                .collect())
        }
        .boxed()
    }

    fn resolve<'a>(
        &'a self,
        reference: &'a ImageRef,
        report: &'a Reporter,
    ) -> BoxFuture<'a, Result<Option<Item>>> {
        async move {
            match reference {
                ImageRef::On { remote, name } if remote == self.name => {
                    self.find(name, report).await
                }
                // What lists don't show is only meant when it is named.
                ImageRef::Name(name) if self.listed => self.find(name, report).await,
                ImageRef::Digest(hex) if self.listed => self.find(hex, report).await,
                _ => Ok(None),
            }
        }
        .boxed()
    }
}

/// The entry that a name means: by alias, by code name, or by the beginning of its hash.
fn look_up<'a>(entries: &'a [Entry], wanted: &str, remote: &str) -> Result<Option<&'a Entry>> {
    let alias = match wanted {
        "ubuntu" if remote == RELEASE => "lts",
        other => other,
    };
    let named = |entry: &&Entry| {
        let codename = !entry.aliases.is_empty() && entry.codename == alias;
        codename || entry.aliases.iter().any(|a| a == alias)
    };
    let found = match entries.iter().find(named) {
        Some(entry) => Some(entry),
        None => by_hash(entries, wanted)?,
    };
    match found {
        Some(entry) if !entry.supported => Err(Error::new(
            Code::ImageNotFound,
            format!("The {wanted} release is no longer supported."),
        )
        .advise("`pileus find` shows those that are.")),
        found => Ok(found),
    }
}

fn by_hash<'a>(entries: &'a [Entry], wanted: &str) -> Result<Option<&'a Entry>> {
    let digits = wanted.to_ascii_lowercase();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut matching = entries
        .iter()
        .filter(|entry| entry.digest.hex().starts_with(&digits));
    let Some(first) = matching.next() else {
        return Ok(None);
    };
    if matching.any(|other| other.digest != first.digest) {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("Too many images matching \"{wanted}\""),
        )
        .advise("Give more digits of the hash."));
    }
    Ok(Some(first))
}

/// What people type: neither `default` nor single letters.
fn names(entry: &Entry) -> impl Iterator<Item = &String> {
    let usual = |alias: &&String| alias.len() > 1 && *alias != "default";
    entry.aliases.iter().filter(usual)
}

/// The name that an entry is launched by.
fn name_of(entry: &Entry) -> String {
    match names(entry).next() {
        Some(name) => name.clone(),
        None => entry.digest.short().to_owned(),
    }
}

fn shown(remote: &str, entry: &Entry) -> Option<CatalogEntry> {
    let name = names(entry).next()?.clone();
    let mut aliases: Vec<String> = names(entry).skip(1).cloned().collect();
    // The code name is what most people know.
    aliases.sort_by_key(|alias| *alias != entry.codename);
    Some(CatalogEntry {
        remote: remote.to_owned(),
        name,
        aliases,
        supported: entry.supported,
        digest: Some(entry.digest.clone()),
        about: about(entry),
    })
}

fn about(entry: &Entry) -> About {
    About {
        os: entry.os.clone(),
        release: entry.title.clone(),
        title: format!("{} {}", entry.os, entry.title),
        codename: entry.codename.clone(),
        version: entry.version.clone(),
        arch: std::env::consts::ARCH.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(aliases: &[&str], codename: &str, digest: &str, supported: bool) -> Entry {
        Entry {
            aliases: aliases.iter().map(|a| (*a).to_owned()).collect(),
            os: "Ubuntu".into(),
            codename: codename.into(),
            title: codename.into(),
            version: "1".into(),
            supported,
            digest: format!("{digest:0<64}").parse().unwrap(),
            path: "x".into(),
        }
    }

    #[test]
    fn names_and_hashes_lead_to_entries() {
        let entries = [
            entry(&["23.10", "mantic"], "mantic", "dd", false),
            entry(&["24.04", "default", "lts", "n"], "noble", "ab1", true),
            entry(&[], "noble", "ab2", true),
            entry(&[], "noble", "c0", true),
        ];
        for (wanted, digest) in [
            ("24.04", Some("ab1")),
            ("lts", Some("ab1")),
            ("ubuntu", Some("ab1")),
            ("default", Some("ab1")),
            ("n", Some("ab1")),
            ("noble", Some("ab1")),
            ("ab2", Some("ab2")),
            ("C0", Some("c0")),
            ("jammy", None),
            ("e", None),
            ("", None),
        ] {
            let found = look_up(&entries, wanted, RELEASE).unwrap();
            let hex = found.map(|entry| entry.digest.hex().trim_end_matches('0').to_owned());
            let digest = digest.map(|digits| digits.trim_end_matches('0').to_owned());
            assert_eq!(hex, digest, "{wanted}");
        }
        assert!(look_up(&entries, "ubuntu", "daily").unwrap().is_none());
        let err = look_up(&entries, "ab", RELEASE).unwrap_err();
        assert_eq!(err.message, "Too many images matching \"ab\"");
        let err = look_up(&entries, "mantic", RELEASE).unwrap_err();
        assert_eq!(err.message, "The mantic release is no longer supported.");
    }

    #[test]
    fn lists_show_the_names_that_people_type() {
        let entry = entry(
            &["24.04", "default", "lts", "n", "noble"],
            "noble",
            "a",
            true,
        );
        let shown = shown(RELEASE, &entry).unwrap();
        assert_eq!(shown.name, "24.04");
        assert_eq!(shown.aliases, ["noble", "lts"]);
        assert_eq!(shown.about.title, "Ubuntu noble");
    }

    #[test]
    fn mirrors_good_and_bad() {
        let mirror = Mirror::default();
        for (text, kept) in [
            ("https://m.invalid", "https://m.invalid/"),
            ("https://m.invalid/a/b", "https://m.invalid/a/b/"),
            ("http://127.0.0.1:8/x/", "http://127.0.0.1:8/x/"),
            ("", ""),
        ] {
            mirror.set(text).unwrap();
            assert_eq!(mirror.get(), kept);
        }
        mirror.set("https://m.invalid").unwrap();
        for bad in [
            "http://m.invalid/",
            "m.invalid",
            "ftp://m.invalid/",
            "https://m.invalid/?x",
            "https://",
        ] {
            let err = mirror.set(bad).unwrap_err();
            assert_eq!(err.code, Code::InvalidSetting, "{bad}");
        }
        assert_eq!(mirror.get(), "https://m.invalid/");
    }
}
