//! Transfers with OpenSSH's own `sftp-server` behind a pipe, and with servers that mean harm.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::*;
use crate::sftp::session::Pipe;

const SERVERS: [&str; 2] = ["/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server"];

/// A server whose home is a folder; `delay` is the time that each direction takes.
fn server(home: &Path, delay: Duration) -> Option<Pipe> {
    let Some(program) = SERVERS.iter().find(|path| Path::new(path).exists()) else {
        eprintln!("SKIPPED: this host has no sftp-server (Debian: openssh-sftp-server)");
        return None;
    };
    let mut child = tokio::process::Command::new(program)
        .current_dir(home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let (to, sent) = mpsc::channel::<Bytes>(8);
    let (received, from) = mpsc::channel(8);
    let mut sent = late(sent, delay);
    let (read, mut pieces) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(bytes) = sent.recv().await {
            if input.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let _child = child;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let len = output.read(&mut buffer).await.unwrap_or_default();
            if len == 0
                || read
                    .send(Bytes::copy_from_slice(&buffer[..len]))
                    .await
                    .is_err()
            {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let (again, back) = mpsc::channel(8);
        let mut back = late(back, delay);
        tokio::spawn(async move {
            while let Some(bytes) = pieces.recv().await {
                if again.send(bytes).await.is_err() {
                    return;
                }
            }
        });
        while let Some(bytes) = back.recv().await {
            if received.send(Ok(bytes)).await.is_err() {
                return;
            }
        }
    });
    Some(Pipe { to, from })
}

/// Passes pieces on, each so much later.
fn late(mut from: mpsc::Receiver<Bytes>, delay: Duration) -> mpsc::Receiver<Bytes> {
    let (way, mut end) = mpsc::unbounded_channel();
    let (to, out) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(bytes) = from.recv().await {
            if way.send((Instant::now() + delay, bytes)).is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some((at, bytes)) = end.recv().await {
            tokio::time::sleep_until(at.into()).await;
            if to.send(bytes).await.is_err() {
                return;
            }
        }
    });
    out
}

/// A host's folder, a guest's home, and the way between them.
struct Place {
    dir: tempfile::TempDir,
    sftp: Arc<Sftp>,
    report: Arc<Report>,
}

impl Place {
    async fn new(delay: Duration) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        fs::create_dir(dir.path().join("home")).unwrap();
        let pipe = server(&dir.path().join("home"), delay)?;
        let sftp = Arc::new(Sftp::connect(pipe).await.unwrap());
        Some(Self {
            dir,
            sftp,
            report: Report::new(false, "test:"),
        })
    }

    fn host(&self, path: &str) -> PathBuf {
        self.dir.path().join("host").join(path)
    }

    fn home(&self, path: &str) -> PathBuf {
        self.dir.path().join("home").join(path)
    }

    fn upload(&self, flags: &str) -> Upload {
        Upload {
            sftp: self.sftp.clone(),
            report: self.report.clone(),
            options: options(flags),
        }
    }

    async fn put(&self, sources: &[&str], to: &str, flags: &str) -> Result<bool, String> {
        let sources: Vec<PathBuf> = sources.iter().map(|path| self.host(path)).collect();
        let done = self.upload(flags).run(&sources, to.as_bytes()).await;
        done.map_err(|failure| failure.to_string())?;
        Ok(self.clean())
    }

    async fn get(&self, sources: &[&str], to: &str, flags: &str) -> Result<bool, String> {
        let options = options(flags);
        let target = download::target(&self.host(to), sources.len() > 1, options)?;
        let download = Download {
            sftp: self.sftp.clone(),
            report: self.report.clone(),
            options,
        };
        let mut jobs = Jobs::default();
        for source in sources {
            download.run(source.as_bytes(), &target, &mut jobs).await;
        }
        jobs.finish().await;
        Ok(self.clean())
    }

    /// Whether all went well; and nothing is left lying about in any case.
    fn clean(&self) -> bool {
        let mut open = vec![self.dir.path().to_owned()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                assert!(!name.starts_with(".pileus-transfer"), "{path:?}");
                if path.is_dir() && !path.is_symlink() {
                    open.push(path);
                }
            }
        }
        !self.report.failed()
    }
}

fn options(flags: &str) -> Options {
    Options {
        recursive: flags.contains('r'),
        parents: flags.contains('p'),
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn file(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|err| panic!("{path:?}: {err}"))
}

/// A tree with all that a tree may have.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("deep/er")).unwrap();
    file(&at.join("a"), "A", 0o640);
    file(&at.join("deep/run"), "#!/bin/sh\n", 0o755);
    file(&at.join("deep/er/empty"), "", 0o600);
    symlink("../a", at.join("deep/link")).unwrap();
    symlink("/nowhere", at.join("dangling")).unwrap();
    // A folder that may not be written to once it is there.
    fs::set_permissions(at.join("deep/er"), fs::Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(at.join("deep"), fs::Permissions::from_mode(0o750)).unwrap();
}

fn check_tree(at: &Path) {
    assert_eq!(
        (read(&at.join("a")), mode(&at.join("a"))),
        ("A".into(), 0o640)
    );
    assert_eq!(mode(&at.join("deep/run")), 0o755);
    assert_eq!(read(&at.join("deep/er/empty")), "");
    assert_eq!(
        (mode(&at.join("deep")), mode(&at.join("deep/er"))),
        (0o750, 0o555)
    );
    assert_eq!(
        fs::read_link(at.join("deep/link")).unwrap(),
        Path::new("../a")
    );
    assert_eq!(
        fs::read_link(at.join("dangling")).unwrap(),
        Path::new("/nowhere")
    );
    fs::set_permissions(at.join("deep/er"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn host_to_guest_by_the_rules() {
    let Some(place) = Place::new(Duration::ZERO).await else {
        return;
    };
    file(&place.host("one"), "1", 0o751);
    file(&place.host("two"), "2", 0o400);
    // A file becomes the target, or goes into it.
    assert!(place.put(&["one"], "uno", "").await.unwrap());
    assert_eq!(
        (read(&place.home("uno")), mode(&place.home("uno"))),
        ("1".into(), 0o751)
    );
    assert!(place.put(&["one", "two"], ".", "").await.unwrap());
    assert_eq!(
        (read(&place.home("two")), mode(&place.home("two"))),
        ("2".into(), 0o400)
    );
    // Replaced by its mode as well; a link stays one.
    symlink("uno", place.home("link")).unwrap();
    assert!(place.put(&["two"], "link", "").await.unwrap());
    assert_eq!(
        (read(&place.home("uno")), mode(&place.home("uno"))),
        ("2".into(), 0o400)
    );
    assert!(place.home("link").is_symlink());
    // Several need a folder.
    let err = place.put(&["one", "two"], "uno", "").await.unwrap_err();
    assert_eq!(err, "Target \"uno\" is not a directory");
    let err = place.put(&["one", "two"], "none", "").await.unwrap_err();
    assert_eq!(err, "Target \"none\" is not a directory");
    assert!(place.put(&["one", "two"], "new/er", "p").await.unwrap());
    assert_eq!(read(&place.home("new/er/two")), "2");
    assert!(place.put(&["one"], "a/b/c", "p").await.unwrap());
    assert_eq!(read(&place.home("a/b/c")), "1");
    // A tree: as the target if that is new, into it if it is there.
    tree(&place.host("tree"));
    assert!(place.put(&["tree"], "copy", "r").await.unwrap());
    check_tree(&place.home("copy"));
    assert!(place.put(&["tree"], "copy", "r").await.unwrap());
    check_tree(&place.home("copy/tree"));
}

#[tokio::test]
async fn guest_to_host_by_the_rules() {
    let Some(place) = Place::new(Duration::ZERO).await else {
        return;
    };
    file(&place.home("one"), "1", 0o4751);
    file(&place.home("two"), "2", 0o400);
    assert!(place.get(&["one"], "uno", "").await.unwrap());
    // The set-user bit lends nobody's rights here.
    assert_eq!(
        (read(&place.host("uno")), mode(&place.host("uno"))),
        ("1".into(), 0o751)
    );
    assert!(place.get(&["one", "./two"], ".", "").await.unwrap());
    assert_eq!(read(&place.host("two")), "2");
    symlink("uno", place.host("link")).unwrap();
    assert!(place.get(&["two"], "link", "").await.unwrap());
    assert_eq!(read(&place.host("uno")), "2");
    assert!(place.host("link").is_symlink());
    let err = place.get(&["one", "two"], "uno", "").await.unwrap_err();
    assert!(err.ends_with("uno\" is not a directory"), "{err}");
    assert!(
        place
            .get(&["one"], "none/x", "")
            .await
            .unwrap_err()
            .contains("No such file")
    );
    assert!(place.get(&["one"], "some/x", "p").await.unwrap());
    assert_eq!(read(&place.host("some/x")), "1");
    tree(&place.home("tree"));
    assert!(place.get(&["tree"], "copy", "r").await.unwrap());
    check_tree(&place.host("copy"));
    assert!(place.get(&["tree/"], "copy", "r").await.unwrap());
    check_tree(&place.host("copy/tree"));
    // The home has a name of its own.
    fs::create_dir(place.host("into")).unwrap();
    assert!(place.get(&["."], "into", "r").await.unwrap());
    assert_eq!(read(&place.host("into/home/one")), "1");
    fs::set_permissions(
        place.home("tree/deep/er"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let inner = place.host("into/home/tree/deep/er");
    fs::set_permissions(inner, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn an_error_is_told_and_the_rest_goes_on() {
    let Some(place) = Place::new(Duration::ZERO).await else {
        return;
    };
    fs::create_dir(place.host("folder")).unwrap();
    fs::create_dir(place.home("folder")).unwrap();
    file(&place.host("good"), "good", 0o600);
    let sources = ["folder", "none", "good"];
    assert!(!place.put(&sources, ".", "").await.unwrap());
    assert_eq!(read(&place.home("good")), "good");
    fs::remove_file(place.host("good")).unwrap();
    assert!(!place.get(&sources, ".", "").await.unwrap());
    assert_eq!(read(&place.host("good")), "good");
    assert_eq!(place.report.errors(), 4);
    // A folder is not replaced by a file, nor a file by a folder.
    fs::create_dir(place.home("good2")).unwrap();
    fs::create_dir(place.host("good3")).unwrap();
    fs::create_dir(place.host("x")).unwrap();
    file(&place.host("x/good2"), "", 0o600);
    assert!(!place.put(&["x/good2"], ".", "").await.unwrap());
    file(&place.home("good3"), "", 0o600);
    assert!(!place.get(&["good3"], ".", "").await.unwrap());
    assert!(!place.get(&["folder"], "good", "r").await.unwrap());
    assert_eq!(place.report.errors(), 7);
}

#[tokio::test]
async fn streams_both_ways() {
    let Some(place) = Place::new(Duration::ZERO).await else {
        return;
    };
    let bytes: Vec<u8> = (0..=255).cycle().take(1_000_001).collect();
    let upload = place.upload("p");
    upload.stream(&bytes[..], b"new/file").await.unwrap();
    assert!(fs::read(place.home("new/file")).unwrap() == bytes);
    assert_eq!(mode(&place.home("new/file")), 0o664);
    upload.stream(&b"x"[..], b".").await.unwrap();
    assert_eq!(read(&place.home("stream_output.dat")), "x");
    upload.stream(&b""[..], b"new/file").await.unwrap();
    assert_eq!(read(&place.home("new/file")), "");
    upload.stream(&b"gone"[..], b"/dev/null").await.unwrap();
    upload.stream(&bytes[..], b"file").await.unwrap();
    let download = Download {
        sftp: place.sftp.clone(),
        report: place.report.clone(),
        options: options(""),
    };
    let mut out = Vec::new();
    download.stream(b"file", &mut out).await.unwrap();
    assert!(out == bytes);
    // A file whose size is not told.
    let mut out = Vec::new();
    download
        .stream(b"/proc/self/status", &mut out)
        .await
        .unwrap();
    assert!(out.starts_with(b"Name:"));
    assert!(download.stream(b".", &mut out).await.is_err());
    assert!(place.clean());
}

#[tokio::test]
async fn a_slow_way_costs_little() {
    let Some(place) = Place::new(Duration::from_millis(30)).await else {
        return;
    };
    let bytes = vec![7; 32 << 20];
    let begin = Instant::now();
    place.upload("").stream(&bytes[..], b"big").await.unwrap();
    let up = begin.elapsed();
    let begin = Instant::now();
    assert!(place.get(&["big"], "big", "").await.unwrap());
    let down = begin.elapsed();
    assert!(fs::read(place.host("big")).unwrap() == bytes);
    eprintln!("32 MiB with 60 ms a round trip: up {up:?}, down {down:?}");
    // One piece a round trip would take a minute.
    assert!(up < Duration::from_secs(15) && down < Duration::from_secs(15));
    let begin = Instant::now();
    fs::create_dir(place.host("many")).unwrap();
    for i in 0..100 {
        file(&place.host(&format!("many/{i}")), "x", 0o644);
    }
    assert!(place.put(&["many"], "many", "r").await.unwrap());
    eprintln!("100 files: {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(15));
    assert_eq!(fs::read_dir(place.home("many")).unwrap().count(), 100);
}

/// Answers requests by a script; the way back is a list of packets' bodies, each with the request's id.
fn hostile(answers: Vec<Vec<u8>>) -> Pipe {
    let (to, mut sent) = mpsc::channel::<Bytes>(8);
    let (received, from) = mpsc::channel(8);
    tokio::spawn(async move {
        sent.recv().await;
        let hello = Bytes::from_static(&[0, 0, 0, 5, 2, 0, 0, 0, 3]);
        received.send(Ok(hello)).await.unwrap();
        let mut answers = answers.into_iter();
        while let Some(request) = sent.recv().await {
            let Some(answer) = answers.next() else { return };
            let id = &request[5..9];
            let len = u32::try_from(answer.len() + 4).unwrap().to_be_bytes();
            let packet = [&len, &answer[..1], id, &answer[1..]].concat();
            let _ = received.send(Ok(packet.into())).await;
        }
    });
    Pipe { to, from }
}

fn text(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap().to_be_bytes();
    [&len, text].concat()
}

fn attrs(mode: u32) -> Vec<u8> {
    [4_u32.to_be_bytes(), mode.to_be_bytes()].concat()
}

fn listing(names: &[(&[u8], u32)]) -> Vec<u8> {
    let count = u32::try_from(names.len()).unwrap().to_be_bytes();
    let mut body = [&[104], &count[..]].concat();
    for (name, mode) in names {
        body.extend([text(name), text(b""), attrs(*mode)].concat());
    }
    body
}

fn code(code: u32) -> Vec<u8> {
    [&[101][..], &code.to_be_bytes(), &text(b"")].concat()
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// A guest that serves whatever is asked for: each folder has these names, each file says EVIL.
fn serves(names: Vec<(Vec<u8>, u32)>) -> Pipe {
    let (to, mut sent) = mpsc::channel::<Bytes>(8);
    let (received, from) = mpsc::channel(8);
    tokio::spawn(async move {
        sent.recv().await;
        let hello = Bytes::from_static(&[0, 0, 0, 5, 2, 0, 0, 0, 3]);
        received.send(Ok(hello)).await.unwrap();
        // Only the first folder has the names.
        let mut listed = false;
        while let Some(request) = sent.recv().await {
            let (kind, id) = (request[4], &request[5..9]);
            let offset = |request: &[u8]| request[request.len() - 12..request.len() - 4] == [0; 8];
            let answer = match kind {
                3 | 11 => [&[102][..], &text(b"h")].concat(),
                5 if offset(&request) => [&[103][..], &text(b"EVIL")].concat(),
                12 if !listed => {
                    listed = true;
                    let names: Vec<(&[u8], u32)> = names
                        .iter()
                        .map(|(name, mode)| (&name[..], *mode))
                        .collect();
                    listing(&names)
                }
                5 | 12 => code(1),
                7 | 17 => [&[105][..], &attrs(FOLDER)].concat(),
                19 => listing(&[(b"/etc/passwd", 0)]),
                _ => code(0),
            };
            let len = u32::try_from(answer.len() + 4).unwrap().to_be_bytes();
            let packet = [&len, &answer[..1], id, &answer[1..]].concat();
            let _ = received.send(Ok(packet.into())).await;
        }
    });
    Pipe { to, from }
}

#[tokio::test]
async fn names_of_a_hostile_guest_stay_in_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    let outside = dir.path().join("outside");
    for folder in [&host, &outside] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(outside.join("kept"), "mine").unwrap();
    let absolute = outside
        .join("absolute")
        .as_os_str()
        .as_encoded_bytes()
        .to_vec();
    let bad = [
        b"../../outside/up".to_vec(),
        b"../kept".to_vec(),
        b"in/side".to_vec(),
        absolute,
        b"".to_vec(),
        b"a\0b".to_vec(),
        vec![b'x'; 256],
    ];
    let mut names: Vec<(Vec<u8>, u32)> = vec![(b".".to_vec(), FOLDER), (b"..".to_vec(), FOLDER)];
    names.extend(bad.iter().map(|name| (name.clone(), FILE)));
    names.push((b"../../outside/folder".to_vec(), FOLDER));
    names.push((b"../../outside/link".to_vec(), LINK));
    names.push((b"good".to_vec(), FILE));
    names.push((b"passwd".to_vec(), LINK));
    let sftp = Arc::new(Sftp::connect(serves(names)).await.unwrap());
    let report = Report::new(false, "test:");
    let options = options("r");
    let target = download::target(&host, false, options).unwrap();
    let download = Download {
        sftp,
        report: report.clone(),
        options,
    };
    let mut jobs = Jobs::default();
    download.run(b"tree", &target, &mut jobs).await;
    jobs.finish().await;
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(list(dir.path()), ["host", "outside"]);
    assert_eq!(list(&outside), ["kept"]);
    assert_eq!(list(&host), ["tree"]);
    // What is good comes all the same.
    assert_eq!(list(&host.join("tree")), ["good", "passwd"]);
    assert_eq!(read(&host.join("tree/good")), "EVIL");
    assert_eq!(report.errors(), bad.len() as u64 + 2);
}

#[tokio::test]
async fn no_link_is_written_through() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir_all(dir.path().join("host/tree")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("kept"), "mine").unwrap();
    // Links that were there before, and one that the guest makes before it lists a folder of its name.
    symlink(&outside, dir.path().join("host/tree/folder")).unwrap();
    symlink(outside.join("kept"), dir.path().join("host/tree/file")).unwrap();
    let names = vec![
        (b"folder".to_vec(), FOLDER),
        (b"file".to_vec(), FILE),
        (b"twice".to_vec(), LINK),
        (b"twice".to_vec(), FOLDER),
    ];
    let sftp = Arc::new(Sftp::connect(serves(names)).await.unwrap());
    let report = Report::new(false, "test:");
    let options = options("r");
    let target = download::target(&dir.path().join("host"), false, options).unwrap();
    let download = Download {
        sftp,
        report: report.clone(),
        options,
    };
    let mut jobs = Jobs::default();
    download.run(b"tree", &target, &mut jobs).await;
    jobs.finish().await;
    assert_eq!(read(&outside.join("kept")), "mine");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    // The file took the link's place.
    assert_eq!(read(&dir.path().join("host/tree/file")), "EVIL");
    assert!(!dir.path().join("host/tree/file").is_symlink());
    assert_eq!(report.errors(), 2);
}

#[tokio::test]
async fn a_server_that_breaks_off_or_lies_ends_the_transfer() {
    for answers in [
        // It ends.
        vec![],
        // More than was asked for.
        vec![
            [&[102][..], &text(b"h")].concat(),
            [&[103][..], &text(&vec![0; 40_000])].concat(),
        ],
        // Nothing at all, for ever.
        vec![
            [&[102][..], &text(b"h")].concat(),
            [&[103][..], &text(b"")].concat(),
        ],
        // An answer to another question.
        vec![[&[105][..], &attrs(FILE)].concat()],
    ] {
        let sftp = Sftp::connect(hostile(answers)).await.unwrap();
        let read = async {
            let handle = sftp.open(b"x", 1, None).await?;
            sftp.read(&handle, 0, 100).await
        };
        let read = tokio::time::timeout(Duration::from_secs(5), read).await;
        assert!(read.unwrap().is_err());
    }
}
