//! Several processes share a store: what one holds no other takes away, what one fetches no other fetches, and what a
//! killed one held is free at once. The other processes are this program once more.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pileus_base::{Code, Digest, Reporter};
use pileus_images::{ImageRef, Store};
use tokio_util::sync::CancellationToken;

use crate::support::*;

const ROOT: &str = "PILEUS_TEST_SHARE_ROOT";

/// Not a test of its own: a process that does what it is told, line by line, and says when it is done.
#[tokio::test]
#[ignore = "run by the tests of this file"]
async fn other() {
    let Some(root) = std::env::var_os(ROOT).map(PathBuf::from) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let store = Store::open(config(&root)).unwrap();
    let report = Reporter::silent();
    let (mut images, mut locks) = (Vec::new(), Vec::new());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let done = match word {
            "hold" => store.get(&rest.parse().unwrap()).map(|image| {
                images.push(image);
            }),
            "obtain" => {
                let image = store.obtain(&rest.parse().unwrap(), None, &report).await;
                let image = image.inspect_err(|err| eprintln!("other: {err}"));
                image.map(|image| images.push(image)).ok()
            }
            "lock" => {
                locks.push(store.lock_item(rest, &report).await.unwrap());
                Some(())
            }
            "drop" => {
                images.clear();
                locks.clear();
                Some(())
            }
            "remove" => store.remove(&rest.parse().unwrap()).map(drop).ok(),
            "churn" => {
                churn(&store, Path::new(rest)).await;
                Some(())
            }
            _ => panic!("{line:?}"),
        };
        println!("\nother: {}", if done.is_some() { "done" } else { "no" });
        std::io::stdout().flush().unwrap();
    }
}

struct Other {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Other {
    fn new(root: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "share::other", "--ignored", "--nocapture"])
            .env(ROOT, root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self {
            child,
            to,
            from: BufReader::new(from),
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    fn answer(&mut self) -> bool {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "it ended");
            if let Some(said) = line.strip_prefix("other: ") {
                return said.trim() == "done";
            }
        }
    }

    fn ask(&mut self, line: &str) -> bool {
        self.tell(line);
        self.answer()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn one_image(fixture: &Fixture) -> Digest {
    let reference = fixture.file("disk.raw", &disk());
    let image = fixture
        .store
        .obtain(&reference, None, &Reporter::silent())
        .await
        .unwrap();
    image.digest().clone()
}

#[tokio::test]
async fn what_another_process_holds_stays() {
    let fixture = Fixture::new();
    let digest = one_image(&fixture).await;
    let mut other = Other::new(fixture.store.root());
    assert!(other.ask(&format!("hold {digest}")));
    let err = fixture.store.remove(&digest).unwrap_err();
    assert_eq!(err.code, Code::ImageInUse);
    assert!(fixture.store.prune(&Default::default()).unwrap().is_empty());
    let collected = fixture.store.collect(&Default::default(), u64::MAX / 2);
    assert!(collected.unwrap().is_empty());
    assert!(other.ask("drop"));
    fixture.store.remove(&digest).unwrap();
    assert!(!other.ask(&format!("hold {digest}")));
}

#[tokio::test]
async fn what_a_killed_process_held_is_free() {
    let fixture = Fixture::new();
    let digest = one_image(&fixture).await;
    let mut other = Other::new(fixture.store.root());
    assert!(other.ask(&format!("hold {digest}")));
    assert!(other.ask("lock key"));
    drop(other);
    fixture.store.remove(&digest).unwrap();
    let report = Reporter::silent();
    let lock = fixture.store.lock_item("key", &report);
    tokio::time::timeout(Duration::from_secs(20), lock)
        .await
        .unwrap()
        .unwrap();
    fixture.assert_clean();
}

#[tokio::test]
async fn an_item_is_one_processs_at_a_time_and_waiting_can_be_cancelled() {
    let fixture = Fixture::new();
    let mut other = Other::new(fixture.store.root());
    assert!(other.ask("lock key"));
    let cancel = CancellationToken::new();
    let report = Reporter::new(|_| (), cancel.clone());
    let (store, waiting) = (fixture.store.clone(), report.clone());
    let waiting = tokio::spawn(async move { store.lock_item("key", &waiting).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    cancel.cancel();
    let err = waiting.await.unwrap().unwrap_err();
    assert_eq!(err.code, Code::Cancelled);
    // Another item is free.
    let report = Reporter::silent();
    drop(fixture.store.lock_item("other", &report).await.unwrap());
    let store = fixture.store.clone();
    let waiting = tokio::spawn(async move { store.lock_item("key", &Reporter::silent()).await });
    assert!(other.ask("drop"));
    waiting.await.unwrap().unwrap();
    let left = std::fs::read_dir(fixture.store.root().join("locks")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_came_while_one_waited_is_not_fetched_again() {
    let server = crate::server::Server::start(disk(), []).await;
    let fixture = Fixture::new();
    let url = server.url();
    let mut others: Vec<_> = (0..3).map(|_| Other::new(fixture.store.root())).collect();
    for other in &mut others {
        other.tell(&format!("obtain {url}"));
    }
    for other in &mut others {
        assert!(other.answer());
    }
    let asked = server.header("if-none-match");
    let bodies = asked.iter().filter(|mark| *mark == "-").count();
    assert_eq!(bodies, 1, "{asked:?}");
    let reference: ImageRef = url.parse().unwrap();
    let report = Reporter::silent();
    let image = fixture.store.obtain(&reference, None, &report).await;
    assert_eq!(image.unwrap().digest(), &digest(&disk()));
}

/// Images come, are held, checked and go, at random; what is held must be whole.
async fn churn(store: &Arc<Store>, files: &Path) {
    use rand::Rng;
    let report = Reporter::silent();
    for _ in 0..60 {
        let number = rand::rng().random_range(0..3);
        let reference = ImageRef::File(files.join(format!("{number}")));
        let image = store.obtain(&reference, None, &report).await.unwrap();
        assert_eq!(
            std::fs::metadata(image.disk()).unwrap().len(),
            DISK_SIZE as u64
        );
        tokio::task::yield_now().await;
        assert_eq!(
            std::fs::read(image.disk()).unwrap()[9000],
            number,
            "what is held was changed or taken away"
        );
        let digest = image.digest().clone();
        drop(image);
        match store.remove(&digest) {
            Ok(_) => {}
            Err(err) if matches!(err.code, Code::ImageInUse | Code::ImageNotFound) => {}
            Err(err) => panic!("{err}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_processes_race_to_hold_and_remove() {
    let fixture = Fixture::new();
    for number in 0..3 {
        let mut bytes = disk();
        bytes[9000] = number;
        fixture.file(&number.to_string(), &bytes);
    }
    let mut others: Vec<_> = (0..2).map(|_| Other::new(fixture.store.root())).collect();
    for other in &mut others {
        other.tell(&format!("churn {}", fixture.dir.path().display()));
    }
    churn(&fixture.store, fixture.dir.path()).await;
    for other in &mut others {
        assert!(other.answer());
    }
    drop(others);
    let store = Store::open(config(fixture.store.root())).unwrap();
    for image in store.list().unwrap() {
        store
            .verify(&image.info.digest, &Reporter::silent())
            .unwrap();
    }
    fixture.assert_clean();
}
