//! Ubuntu's names, from an image host that serves the real formats with our own small disk behind them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use pileus_base::{Code, Reporter, Update};
use pileus_images::hosts::simplestreams::{Mirror, StreamsConfig};
use pileus_images::{CatalogWish, Image, ImageRef};
use serde_json::{Value, json};

use crate::server::{Answer, Server};
use crate::support::*;

type Files = BTreeMap<String, Bytes>;

/// Another disk with the same form.
fn other_disk(mark: u8) -> Vec<u8> {
    let mut bytes = disk();
    bytes[8192] ^= mark;
    bytes
}

fn release(aliases: &str, title: &str, codename: &str, supported: bool, versions: &Value) -> Value {
    json!({ "aliases": aliases, "arch": "amd64", "os": "ubuntu", "release": codename,
        "release_codename": format!("{codename} animal"), "release_title": title,
        "supported": supported, "support_eol": "2036-01-01", "version": title, "versions": versions })
}

fn version(path: &str, bytes: &[u8]) -> Value {
    json!({ "label": "release", "pubname": "ubuntu", "items": {
        "disk1.img": { "ftype": "disk1.img", "md5": "0", "path": path,
            "sha256": digest(bytes).hex(), "size": bytes.len() },
        "manifest": { "ftype": "manifest", "path": "server/x.manifest", "sha256": "00", "size": 1 } } })
}

fn put_list(files: &mut Files, folder: &str, products: &Value) {
    let index = json!({ "format": "index:1.0", "index": {
        "com.ubuntu.cloud:released:aws": { "datatype": "image-ids", "path": "streams/v1/com.ubuntu.cloud:released:aws.json" },
        "com.ubuntu.cloud:released:download": { "datatype": "image-downloads",
            "format": "products:1.0", "path": "streams/v1/com.ubuntu.cloud:released:download.json" } } });
    let list = json!({ "content_id": "com.ubuntu.cloud:released:download", "format": "products:1.0",
        "datatype": "image-downloads", "products": products });
    files.insert(
        format!("/{folder}streams/v1/index.json"),
        index.to_string().into(),
    );
    files.insert(
        format!("/{folder}streams/v1/com.ubuntu.cloud:released:download.json"),
        list.to_string().into(),
    );
}

/// What a small Ubuntu publishes.
fn ubuntu() -> Files {
    let mut files = Files::new();
    put_list(
        &mut files,
        "releases/",
        &json!({
            "com.ubuntu.cloud:server:24.04:amd64": release("24.04,default,lts,n,noble", "24.04 LTS",
                "noble", true, &json!({
                    "20260101": version("server/releases/noble/new.img", &disk()),
                    "20250101": version("server/releases/noble/old.img", &other_disk(1)) })),
            "com.ubuntu.cloud:server:22.04:amd64": release("22.04,j,jammy", "22.04 LTS", "jammy", true,
                &json!({ "20260102": version("server/releases/jammy/x.img", &other_disk(2)) })),
            "com.ubuntu.cloud:server:23.10:amd64": release("23.10,m,mantic", "23.10", "mantic", false,
                &json!({ "20240101": version("server/releases/mantic/x.img", &other_disk(3)) })),
        }),
    );
    put_list(
        &mut files,
        "daily/",
        &json!({
            "com.ubuntu.cloud.daily:server:24.04:amd64": release("24.04,n,noble", "24.04 LTS", "noble",
                true, &json!({ "20260202": version("server/noble/daily.img", &other_disk(4)) })),
            "com.ubuntu.cloud.daily:server:26.10:amd64": release("26.10,devel,s,stonking", "26.10",
                "stonking", false, &json!({ "20260203": version("server/26.img", &other_disk(5)) })),
        }),
    );
    put_list(
        &mut files,
        "buildd/daily/",
        &json!({ "com.ubuntu.cloud.buildd:24.04:amd64": release("24.04,n,noble", "24.04 LTS", "noble",
            true, &json!({ "20260204": version("server/buildd.img", &other_disk(6)) })) }),
    );
    for (path, bytes) in [
        ("/releases/server/releases/noble/new.img", disk()),
        ("/releases/server/releases/noble/old.img", other_disk(1)),
        ("/releases/server/releases/jammy/x.img", other_disk(2)),
        ("/daily/server/noble/daily.img", other_disk(4)),
        ("/daily/server/26.img", other_disk(5)),
        ("/buildd/daily/server/buildd.img", other_disk(6)),
    ] {
        files.insert(path.to_owned(), bytes.into());
    }
    files
}

/// The clock of these tests stands still.
fn still() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn streams(server: &Server, folder: &Path) -> StreamsConfig {
    let mut streams = StreamsConfig::new(server.base(), folder.join("lists"));
    streams.proxies = false;
    streams.patience = config(folder).patience;
    streams.now = still;
    streams
}

/// A store that knows the server's images; a second one in the same folder stands for a restart.
struct World {
    dir: tempfile::TempDir,
    server: Server,
    mirror: Mirror,
    fixture: Fixture,
}

impl World {
    async fn new() -> Self {
        Self::of(ubuntu()).await
    }

    async fn of(files: Files) -> Self {
        let server = Server::of_files(files).await;
        let dir = tempfile::tempdir().unwrap();
        let streams = streams(&server, dir.path());
        Self {
            mirror: streams.mirror.clone(),
            fixture: with(&streams),
            dir,
            server,
        }
    }

    async fn get(&self, text: &str) -> pileus_base::Result<Arc<Image>> {
        let reference: ImageRef = text.parse().unwrap();
        let store = &self.fixture.store;
        store.obtain(&reference, None, &Reporter::silent()).await
    }

    fn replace(&self, path: &str, bytes: impl Into<Bytes>) {
        let mut script = self.server.script.lock().unwrap();
        script.files.insert(path.to_owned(), bytes.into());
    }

    fn refuse_all(&self) {
        let mut script = self.server.script.lock().unwrap();
        script.answers = vec![Answer::Status(500); 99].into();
    }

    /// The same lists, with nothing in memory.
    fn restarted(&self) -> Fixture {
        with(&streams(&self.server, self.dir.path()))
    }
}

fn with(streams: &StreamsConfig) -> Fixture {
    Fixture::with(|config| config.hosts.extend(streams.hosts().unwrap()))
}

#[tokio::test]
async fn every_kind_of_name_leads_to_its_image() {
    let world = World::new().await;
    for (text, bytes) in [
        ("24.04", disk()),
        ("noble", disk()),
        ("lts", disk()),
        ("ubuntu", disk()),
        ("release:lts", disk()),
        ("release:default", disk()),
        ("jammy", other_disk(2)),
        (&digest(&disk()).hex()[..6], disk()),
        (&digest(&disk()).hex()[..20], disk()),
        (digest(&other_disk(1)).hex(), other_disk(1)),
        ("daily:24.04", other_disk(4)),
        ("devel", other_disk(5)),
        ("snapcraft:24.04", other_disk(6)),
    ] {
        let image = world
            .get(text)
            .await
            .unwrap_or_else(|err| panic!("{text}: {err}"));
        assert_eq!(image.digest(), &digest(&bytes), "{text}");
        assert!(std::fs::read(image.disk()).unwrap() == bytes, "{text}");
    }
    let image = world.get("noble").await.unwrap();
    let info = image.info();
    assert_eq!(
        (
            info.os.as_str(),
            info.release.as_str(),
            info.version.as_str()
        ),
        ("Ubuntu", "24.04 LTS", "20260101")
    );
    assert_eq!(info.source, "release:24.04");
    // No kernel beside it: the firmware boots it.
    assert!(!info.kernel && info.cmdline.is_none());
    world.fixture.assert_clean();
}

#[tokio::test]
async fn the_list_is_asked_for_once_and_an_image_too() {
    let world = World::new().await;
    world.get("noble").await.unwrap();
    let paths = world.server.paths();
    assert_eq!(
        paths,
        [
            "/releases/streams/v1/index.json",
            "/releases/streams/v1/com.ubuntu.cloud:released:download.json",
            "/releases/server/releases/noble/new.img"
        ]
    );
    world.get("24.04").await.unwrap();
    world.get("jammy").await.unwrap();
    assert_eq!(
        world.server.paths(),
        ["/releases/server/releases/jammy/x.img"]
    );
    // Not asked for at all: names that are made here.
    assert!(
        world
            .fixture
            .store
            .resolve(&"debian".parse().unwrap(), &Reporter::silent())
            .await
            .is_ok()
    );
    assert!(world.server.paths().is_empty());
}

#[tokio::test]
async fn the_texts_of_refusals() {
    let world = World::new().await;
    for (text, code, message) in [
        (
            "mantic",
            Code::ImageNotFound,
            "The mantic release is no longer supported.",
        ),
        (
            "release:plucky",
            Code::ImageNotFound,
            "Unable to find an image matching \"plucky\" in remote \"release\".",
        ),
        (
            "plucky",
            Code::ImageNotFound,
            "Unable to find an image matching \"plucky\".",
        ),
        (
            "nowhere:noble",
            Code::ImageNotFound,
            "Remote \"nowhere\" is unknown or unreachable. If image mirror is enabled, please \
             confirm it is valid.",
        ),
    ] {
        let err = world.get(text).await.unwrap_err();
        assert_eq!((err.code, err.message.as_str()), (code, message), "{text}");
    }
}

#[tokio::test]
async fn a_hash_that_begins_two_images_is_refused() {
    let mut files = Files::new();
    let item = |digit: char| {
        json!({ "items": { "disk1.img": { "ftype": "disk1.img", "path": "x.img",
            "sha256": format!("abc{}", digit.to_string().repeat(61)) } } })
    };
    let noble = release(
        "24.04",
        "24.04 LTS",
        "noble",
        true,
        &json!({ "2": item('1'), "1": item('2') }),
    );
    put_list(&mut files, "releases/", &json!({ "a": noble }));
    let world = World::of(files).await;
    for text in ["abc", "sha256:abc"] {
        let err = world.get(text).await.unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
        assert_eq!(err.message, "Too many images matching \"abc\"");
    }
    let item = world
        .fixture
        .store
        .resolve(&"abc2".parse().unwrap(), &Reporter::silent())
        .await;
    assert_eq!(item.unwrap().about.version, "1");
}

#[tokio::test]
async fn lists_show_each_release_once() {
    let world = World::new().await;
    let store = &world.fixture.store;
    let names = async |wish: &CatalogWish| -> Vec<String> {
        let all = store.catalog(wish).await.unwrap();
        all.iter()
            .map(|entry| format!("{}:{}", entry.remote, entry.name))
            .collect()
    };
    let usual = names(&CatalogWish::default()).await;
    assert_eq!(
        usual,
        [
            "build:debian-13",
            "build:debian-12",
            "release:22.04",
            "release:24.04",
            "daily:26.10"
        ]
    );
    let unsupported = CatalogWish {
        unsupported: true,
        ..CatalogWish::default()
    };
    assert!(
        names(&unsupported)
            .await
            .contains(&"release:23.10".to_owned())
    );
    let daily = CatalogWish {
        remote: Some("daily".into()),
        ..CatalogWish::default()
    };
    assert_eq!(names(&daily).await, ["daily:24.04", "daily:26.10"]);
    let hidden = CatalogWish {
        remote: Some("snapcraft".into()),
        ..CatalogWish::default()
    };
    assert_eq!(names(&hidden).await, ["snapcraft:24.04"]);
    let unknown = CatalogWish {
        remote: Some("x".into()),
        ..CatalogWish::default()
    };
    let err = store.catalog(&unknown).await.unwrap_err();
    assert!(err.message.starts_with("Remote 'x' is not found."), "{err}");
    let found = store.search(&"lts".parse().unwrap()).await.unwrap();
    assert_eq!((found.name.as_str(), found.remote.as_str()), ("lts", ""));
    assert_eq!(found.about.release, "24.04 LTS");
}

#[tokio::test]
async fn without_a_network_what_was_known_is_used() {
    let world = World::new().await;
    world.get("noble").await.unwrap();
    world.refuse_all();
    // The list's time is over, and the host does not answer; also after a restart.
    let streams = StreamsConfig {
        now: || still() + jiff::SignedDuration::from_mins(16),
        ..streams(&world.server, world.dir.path())
    };
    let later = Fixture::with(|config| config.hosts.extend(streams.hosts().unwrap()));
    let (report, _, seen) = recorder();
    let item = later
        .store
        .resolve(&"noble".parse().unwrap(), &report)
        .await
        .unwrap();
    assert_eq!(item.expected, Some(digest(&disk())));
    let warned = |update: &Update| matches!(update, Update::Warning(_));
    assert!(seen.lock().unwrap().iter().any(warned));
    let before = world.server.requests();
    later
        .store
        .resolve(&"jammy".parse().unwrap(), &report)
        .await
        .unwrap();
    assert_eq!(world.server.requests(), before, "asked again at once");
    // What is in the store is launched as ever.
    assert!(world.get("noble").await.is_ok());
}

#[tokio::test]
async fn a_list_is_fetched_again_when_it_is_old_or_when_that_is_wanted() {
    let world = World::new().await;
    let all = CatalogWish {
        remote: Some("release".into()),
        ..CatalogWish::default()
    };
    let refresh = CatalogWish {
        refresh: true,
        ..all.clone()
    };
    world.fixture.store.catalog(&all).await.unwrap();
    world.fixture.store.catalog(&all).await.unwrap();
    assert_eq!(world.server.paths().len(), 2);
    world.fixture.store.catalog(&refresh).await.unwrap();
    assert_eq!(world.server.paths().len(), 2);
    let restarted = world.restarted();
    restarted.store.catalog(&all).await.unwrap();
    assert!(
        world.server.paths().is_empty(),
        "the file is as good as the memory"
    );
    for minutes in [16, -16] {
        static SHIFT: AtomicI64 = AtomicI64::new(0);
        SHIFT.store(minutes, Ordering::Relaxed);
        let streams = StreamsConfig {
            now: || still() + jiff::SignedDuration::from_mins(SHIFT.load(Ordering::Relaxed)),
            ..streams(&world.server, world.dir.path())
        };
        let other = with(&streams);
        other.store.catalog(&all).await.unwrap();
        assert_eq!(world.server.paths().len(), 2, "{minutes} minutes");
    }
}

#[tokio::test]
async fn nobody_there_and_nothing_known() {
    let world = World::new().await;
    world.refuse_all();
    let err = world.get("lts").await.unwrap_err();
    assert_eq!(err.code, Code::FetchFailed);
    assert!(
        err.message.contains("matching \"lts\"") && err.message.contains("unreachable"),
        "{err}"
    );
    let advice = err.advice.unwrap();
    assert!(advice.contains("debian-13"), "{advice}");
    // What needs no host is listed and found all the same.
    let all = world
        .fixture
        .store
        .catalog(&CatalogWish::default())
        .await
        .unwrap();
    assert!(all.iter().any(|entry| entry.name == "debian-13"));
    let missing = world.get("sha256:0123456789abcdef").await.unwrap_err();
    assert_eq!(missing.code, Code::ImageNotFound);
}

#[tokio::test]
async fn lists_that_are_none() {
    let huge = format!("{{\"index\": {{}}, \"x\": \"{}\"}}", "y".repeat(5 << 20));
    for (path, bytes) in [
        ("/releases/streams/v1/index.json", "{\"index\": ".to_owned()),
        ("/releases/streams/v1/index.json", huge),
        (
            "/releases/streams/v1/com.ubuntu.cloud:released:download.json",
            "<html>".to_owned(),
        ),
        (
            "/releases/streams/v1/com.ubuntu.cloud:released:download.json",
            "{\"products\": 7}".to_owned(),
        ),
    ] {
        let world = World::new().await;
        world.replace(path, bytes);
        let err = world.get("noble").await.unwrap_err();
        assert_eq!(err.code, Code::FetchFailed, "{path}");
    }
    let world = World::new().await;
    world
        .server
        .script
        .lock()
        .unwrap()
        .files
        .remove("/releases/streams/v1/com.ubuntu.cloud:released:download.json");
    let err = world.get("noble").await.unwrap_err();
    assert!(err.message.contains("404"), "{err}");
}

#[tokio::test]
async fn a_damaged_file_of_the_last_list_costs_one_fetch() {
    let world = World::new().await;
    world.get("noble").await.unwrap();
    let lists = world.dir.path().join("lists");
    for entry in std::fs::read_dir(&lists).unwrap() {
        std::fs::write(entry.unwrap().path(), b"{ not json").unwrap();
    }
    let restarted = world.restarted();
    let item = restarted
        .store
        .resolve(&"noble".parse().unwrap(), &Reporter::silent())
        .await;
    assert_eq!(item.unwrap().expected, Some(digest(&disk())));
}

#[tokio::test]
async fn other_bytes_than_promised_are_refused() {
    let world = World::new().await;
    world.replace("/releases/server/releases/noble/new.img", other_disk(9));
    let err = world.get("noble").await.unwrap_err();
    assert_eq!(err.code, Code::ChecksumMismatch);
    assert!(world.fixture.store.list().unwrap().is_empty());
    world
        .server
        .script
        .lock()
        .unwrap()
        .files
        .remove("/releases/server/releases/noble/new.img");
    let err = world.get("noble").await.unwrap_err();
    assert_eq!(err.code, Code::ImageNotFound);
    world.fixture.assert_clean();
}

#[tokio::test]
async fn a_newer_list_means_a_newer_image() {
    let world = World::new().await;
    world.get("noble").await.unwrap();
    let mut files = ubuntu();
    put_list(
        &mut files,
        "releases/",
        &json!({ "a": release("24.04,lts,noble", "24.04 LTS", "noble", true, &json!({ 
            "20260505": version("newest.img", &other_disk(8)) })) }),
    );
    files.insert("/releases/newest.img".into(), other_disk(8).into());
    world.server.script.lock().unwrap().files = files;
    let refresh = CatalogWish {
        refresh: true,
        ..CatalogWish::default()
    };
    world.fixture.store.catalog(&refresh).await.unwrap();
    assert_eq!(
        world.get("noble").await.unwrap().digest(),
        &digest(&other_disk(8))
    );
    assert_eq!(world.fixture.store.list().unwrap().len(), 2);
}

#[tokio::test]
async fn a_redirect_is_followed_for_lists_too() {
    let world = World::new().await;
    world.server.script.lock().unwrap().answers = [Answer::Redirect, Answer::Redirect].into();
    assert!(world.get("noble").await.is_ok());
}

#[tokio::test]
async fn a_server_that_stumbles_once_is_asked_again() {
    let world = World::new().await;
    world.server.script.lock().unwrap().answers = [Answer::Status(503)].into();
    assert!(world.get("noble").await.is_ok());
    assert_eq!(world.server.paths().len(), 4);
}

#[tokio::test]
async fn silence_has_a_bound() {
    let server = Server::of_files(ubuntu()).await;
    server.script.lock().unwrap().answers = vec![Answer::Hang; 9].into();
    let dir = tempfile::tempdir().unwrap();
    let mut streams = streams(&server, dir.path());
    streams.patience.idle = Duration::from_millis(100);
    let fixture = with(&streams);
    let got = fixture
        .store
        .resolve(&"noble".parse().unwrap(), &Reporter::silent())
        .await;
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::FetchFailed);
    assert!(err.message.contains("in time"), "{err}");
}

#[tokio::test]
async fn a_mirror_gives_bytes_but_does_not_say_what_they_are() {
    let world = World::new().await;
    // It has the same noble, and a jammy of its own.
    let mut files = Files::new();
    put_list(
        &mut files,
        "releases/",
        &json!({
            "a": release("24.04,lts,noble", "24.04 LTS", "noble", true,
                &json!({ "20260101": version("m/noble.img", &disk()) })),
            "b": release("22.04,jammy", "22.04 LTS", "jammy", true,
                &json!({ "20260102": version("m/jammy.img", &other_disk(7)) })),
        }),
    );
    files.insert("/releases/m/noble.img".into(), disk().into());
    files.insert("/releases/m/jammy.img".into(), other_disk(7).into());
    let mirror = Server::of_files(files).await;
    world.mirror.set(mirror.base().as_str()).unwrap();
    assert!(world.get("noble").await.is_ok());
    assert!(mirror.paths().contains(&"/releases/m/noble.img".to_owned()));
    assert!(
        !world
            .server
            .paths()
            .iter()
            .any(|path| path.ends_with(".img"))
    );
    let err = world.get("release:jammy").await.unwrap_err();
    assert_eq!(err.code, Code::ImageNotFound);
    // Without the mirror it is the host's own.
    world.mirror.set("").unwrap();
    assert_eq!(
        world.get("jammy").await.unwrap().digest(),
        &digest(&other_disk(2))
    );
}
