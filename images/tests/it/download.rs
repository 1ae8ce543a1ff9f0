//! Downloads: resume, retry, revalidation, what is given up and why.

use std::time::{Duration, Instant};

use pileus_base::{Code, Phase, Reporter, Update};

use crate::server::{Answer, Server};
use crate::support::*;

#[tokio::test]
async fn a_cut_connection_is_resumed_where_it_broke() {
    let bytes = disk();
    let server = Server::start(
        bytes.clone(),
        [
            Answer::CutAfter(1_000_000),
            Answer::Status(503),
            Answer::CutAfter(500_000),
        ],
    )
    .await;
    let fixture = Fixture::new();
    let (report, _, seen) = recorder();
    let image = fixture
        .store
        .obtain(&server.reference(), Some(&digest(&bytes)), &report)
        .await
        .unwrap();
    assert!(std::fs::read(image.disk()).unwrap() == bytes);
    let ranges = server.header("range");
    assert_eq!(ranges.len(), 4, "{ranges:?}");
    assert_eq!(ranges[0], "-");
    // What had arrived when it broke is kept; how much that is, the sockets decide.
    let at: Vec<usize> = ranges[1..]
        .iter()
        .map(|r| {
            r.trim_start_matches("bytes=")
                .trim_end_matches('-')
                .parse()
                .unwrap()
        })
        .collect();
    assert!(at[0] > 0 && at[0] <= 1_000_000, "{at:?}");
    assert_eq!(at[1], at[0]);
    assert!(at[2] > at[1], "{at:?}");
    assert_eq!(server.header("if-range")[1], "\"one\"");
    let seen = seen.lock().unwrap();
    assert!(seen.contains(&Update::Phase(Phase::RetrievingImage)));
    let size = DISK_SIZE as u64;
    assert!(seen.contains(&Update::Progress {
        done: size,
        total: Some(size)
    }));
    fixture.assert_clean();
}

#[tokio::test]
async fn content_that_changed_meanwhile_is_fetched_from_the_start() {
    let (mut old, new) = (vec![1; DISK_SIZE], disk());
    old[510..512].copy_from_slice(&[0x55, 0xaa]);
    let server = Server::start(old, [Answer::CutAfter(1_000_000)]).await;
    let fixture = Fixture::new();
    let script = server.script.clone();
    let changer = tokio::spawn({
        let new = new.clone();
        async move {
            while script.lock().unwrap().requests.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let mut script = script.lock().unwrap();
            script.bytes = new.into();
            script.etag = Some("\"two\"".into());
        }
    });
    let image = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await
        .unwrap();
    changer.await.unwrap();
    assert_eq!(image.digest(), &digest(&new));
}

#[tokio::test]
async fn a_server_without_ranges_is_fine() {
    let server = Server::start(disk(), [Answer::CutAfter(900_000), Answer::NoRange]).await;
    let fixture = Fixture::new();
    let got = fixture
        .store
        .obtain(
            &server.reference(),
            Some(&digest(&disk())),
            &Reporter::silent(),
        )
        .await;
    assert!(got.is_ok(), "{got:?}");
}

#[tokio::test]
async fn redirects_are_followed() {
    let server = Server::start(disk(), [Answer::Redirect]).await;
    let fixture = Fixture::new();
    let got = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await;
    assert!(got.is_ok(), "{got:?}");
}

#[tokio::test]
async fn giving_up_after_the_last_attempt() {
    let server = Server::start(disk(), vec![Answer::Status(500); 9]).await;
    let fixture = Fixture::new();
    let got = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await;
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::FetchFailed);
    assert!(err.message.contains("500"), "{}", err.message);
    assert_eq!(server.requests(), 3);
    fixture.assert_clean();
}

#[tokio::test]
async fn a_missing_image_is_not_asked_for_twice() {
    for status in [403, 404, 410] {
        let server = Server::start(disk(), [Answer::Status(status)]).await;
        let fixture = Fixture::new();
        let got = fixture
            .store
            .obtain(&server.reference(), None, &Reporter::silent())
            .await;
        assert_eq!(got.unwrap_err().code, Code::ImageNotFound);
        assert_eq!(server.requests(), 1);
        fixture.assert_clean();
    }
}

#[tokio::test]
async fn the_server_says_when() {
    let server = Server::start(disk(), [Answer::Later(1)]).await;
    let fixture = Fixture::new();
    let begin = Instant::now();
    let got = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await;
    assert!(got.is_ok());
    assert!(begin.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn silence_has_a_bound() {
    let server = Server::start(disk(), [Answer::Hang, Answer::Hang, Answer::Hang]).await;
    let fixture = Fixture::with(|config| config.patience.idle = Duration::from_millis(200));
    let got = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await;
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::FetchFailed);
    assert!(err.message.contains("in time"), "{}", err.message);
}

#[tokio::test]
async fn nobody_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x", listener.local_addr().unwrap());
    drop(listener);
    let fixture = Fixture::new();
    let got = fixture
        .store
        .obtain(&url.parse().unwrap(), None, &Reporter::silent())
        .await;
    assert_eq!(got.unwrap_err().code, Code::FetchFailed);
}

#[tokio::test]
async fn what_is_current_is_not_fetched_again() {
    let server = Server::start(disk(), []).await;
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let first = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await
        .unwrap();
    let second = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await
        .unwrap();
    assert_eq!(first.digest(), second.digest());
    assert_eq!(server.header("if-none-match"), ["-", "\"one\""]);
    // With its checksum it is not even asked for.
    let third = fixture
        .store
        .obtain(&server.reference(), Some(first.digest()), &report)
        .await;
    assert!(third.is_ok());
    assert_eq!(server.requests(), 2);
    // Another content is another image.
    let mut other = disk();
    other[8192] ^= 1;
    {
        let mut script = server.script.lock().unwrap();
        script.bytes = other.clone().into();
        script.etag = Some("\"two\"".into());
    }
    let fourth = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await
        .unwrap();
    assert_eq!(fourth.digest(), &digest(&other));
    assert_eq!(fixture.store.list().unwrap().len(), 2);
}

#[tokio::test]
async fn a_host_that_fails_does_not_take_away_what_is_here() {
    let server = Server::start(disk(), []).await;
    let fixture = Fixture::new();
    fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await
        .unwrap();
    server.script.lock().unwrap().answers = vec![Answer::Status(500); 9].into();
    let (report, _, seen) = recorder();
    let again = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await;
    assert!(again.is_ok(), "{again:?}");
    let warned = |update: &Update| matches!(update, Update::Warning(_));
    assert!(seen.lock().unwrap().iter().any(warned));
}

#[tokio::test]
async fn a_wrong_checksum_keeps_nothing() {
    let server = Server::start(disk(), []).await;
    let fixture = Fixture::new();
    let wrong = digest(b"something else");
    let got = fixture
        .store
        .obtain(&server.reference(), Some(&wrong), &Reporter::silent())
        .await;
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::ChecksumMismatch);
    assert!(err.message.contains(wrong.hex()), "{}", err.message);
    assert!(
        err.message.contains(digest(&disk()).hex()),
        "{}",
        err.message
    );
    assert!(fixture.store.list().unwrap().is_empty());
    fixture.assert_clean();
}

#[tokio::test]
async fn more_than_the_limit_is_not_downloaded() {
    let server = Server::start(disk(), []).await;
    let fixture = Fixture::with(|config| config.limits.download = 1 << 20);
    let got = fixture
        .store
        .obtain(&server.reference(), None, &Reporter::silent())
        .await;
    assert_eq!(got.unwrap_err().code, Code::ImageTooLarge);
    fixture.assert_clean();
}

#[tokio::test]
async fn cancelling_leaves_nothing() {
    let server = Server::start(disk(), [Answer::Hang]).await;
    let fixture = Fixture::new();
    let (report, cancel, _) = recorder();
    let canceller = async {
        while server.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let reference = server.reference();
    let work = fixture.store.obtain(&reference, None, &report);
    let (got, ()) = tokio::join!(work, canceller);
    assert_eq!(got.unwrap_err().code, Code::Cancelled);
    fixture.assert_clean();
    // And it can be had later.
    let again = fixture
        .store
        .obtain(&reference, None, &Reporter::silent())
        .await;
    assert!(again.is_ok());
}

#[tokio::test]
async fn one_download_for_many_callers_also_when_the_first_leaves() {
    let server = Server::start(disk(), [Answer::Later(1)]).await;
    let fixture = Fixture::new();
    let (first, cancel, _) = recorder();
    let reference = server.reference();
    let store = &fixture.store;
    let silent = Reporter::silent();
    let canceller = async {
        while server.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let (a, b, c, ()) = tokio::join!(
        store.obtain(&reference, None, &first),
        store.obtain(&reference, None, &silent),
        store.obtain(&reference, None, &silent),
        canceller,
    );
    assert_eq!(a.unwrap_err().code, Code::Cancelled);
    assert!(std::sync::Arc::ptr_eq(&b.unwrap(), &c.unwrap()));
    assert_eq!(server.requests(), 2, "one 429 and one download");
}
