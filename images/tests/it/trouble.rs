//! Downloads in trouble: servers that are slow, lie, change their mind or send one elsewhere, proxies, secrets in
//! URLs; and who is to blame for what.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pileus_base::error::Class;
use pileus_base::{Code, Error, Reporter};
use pileus_images::{Image, StoreConfig};

use crate::server::{Answer, SECRET, Server, parrot};
use crate::support::*;

type Got = Result<std::sync::Arc<Image>, Error>;

async fn get(fixture: &Fixture, url: &str) -> Got {
    fixture
        .store
        .obtain(&url.parse().unwrap(), None, &Reporter::silent())
        .await
}

/// What one gets of a server that answers so, and how often it was asked.
async fn after(answers: Vec<Answer>, change: impl FnOnce(&mut StoreConfig)) -> (Got, Server) {
    let server = Server::start(disk(), answers).await;
    let fixture = Fixture::with(change);
    let got = get(&fixture, &server.url()).await;
    fixture.assert_clean();
    (got, server)
}

fn failed(got: Got, why: &str) -> Error {
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::FetchFailed, "{err}");
    assert!(err.message.contains(why), "{err}");
    err
}

#[tokio::test]
async fn a_date_says_when_to_come_again_and_the_wait_is_bounded() {
    // By the server's clock, which is decades behind.
    let begin = Instant::now();
    let (got, server) = after(vec![Answer::LaterAt(1)], |_| ()).await;
    assert!(got.is_ok(), "{got:?}");
    assert!(begin.elapsed() > Duration::from_millis(950));
    assert_eq!(server.requests(), 2);

    let begin = Instant::now();
    let long = vec![
        Answer::LaterAt(86_400),
        Answer::Later(86_400),
        Answer::LaterAt(-5),
    ];
    let (got, server) = after(long, |config| {
        config.patience.max_pause = Duration::from_millis(50);
        config.patience.attempts = 4;
    })
    .await;
    assert!(got.is_ok(), "{got:?}");
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(server.requests(), 4);
}

#[tokio::test]
async fn pauses_grow() {
    let begin = Instant::now();
    let (got, server) = after(vec![Answer::Status(502); 4], |config| {
        config.patience.attempts = 5;
        config.patience.pause = Duration::from_millis(40);
    })
    .await;
    assert!(got.is_ok(), "{got:?}");
    assert_eq!(server.requests(), 5);
    // 80 + 160 + 320 + 640 ms, each at least halved by chance.
    assert!(
        begin.elapsed() > Duration::from_millis(600),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn silence_ends_an_attempt() {
    for answer in [Answer::Silent, Answer::Hang] {
        let begin = Instant::now();
        let idle = |config: &mut StoreConfig| config.patience.idle = Duration::from_millis(100);
        let (got, server) = after(vec![answer.clone()], idle).await;
        assert!(got.is_ok(), "{answer:?}: {got:?}");
        assert_eq!(server.requests(), 2);
        let (got, _) = after(vec![answer; 3], idle).await;
        failed(got, "does not answer in time");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test]
async fn a_trickle_is_no_download_and_a_slow_one_is() {
    let slow = |config: &mut StoreConfig| {
        config.patience.window = Duration::from_millis(300);
        config.patience.least = 100_000;
    };
    let begin = Instant::now();
    let trickle = vec![Answer::Trickle(10, Duration::from_millis(20)); 3];
    let (got, server) = after(trickle, slow).await;
    failed(got, "too slow");
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(server.requests(), 1, "it would not be faster the next time");
    // Four megabytes in 42 pieces: slower than the window, but it comes forward.
    let begin = Instant::now();
    let steady = vec![Answer::Trickle(100_000, Duration::from_millis(20))];
    let (got, _) = after(steady.clone(), slow).await;
    assert!(got.is_ok(), "{got:?}");
    assert!(begin.elapsed() > Duration::from_millis(800));
    // Unless there is a bound for all of it.
    let (got, _) = after(steady, |config| {
        config.patience.total = Some(Duration::from_millis(300));
    })
    .await;
    failed(got, "takes longer");
}

#[tokio::test]
async fn cuts_that_bring_nothing_new_come_to_an_end() {
    // Each time the first half, from the beginning: it never resumes.
    let (got, server) = after(vec![Answer::CutAfter(500_000); 50], |config| {
        config.patience.attempts = 4;
    })
    .await;
    assert!(
        got.is_ok() || server.requests() > 4,
        "resumed, it comes to its end"
    );
    let server = Server::start(disk(), vec![Answer::CutAfter(500_000); 50]).await;
    server.script.lock().unwrap().etag = None;
    let fixture = Fixture::with(|config| config.patience.attempts = 4);
    let got = get(&fixture, &server.url()).await;
    assert_eq!(got.unwrap_err().code, Code::FetchFailed);
    assert!(server.requests() <= 8, "{}", server.requests());
    // Without a tag the rest would be of who knows what.
    assert!(server.header("range").iter().all(|range| range == "-"));
    fixture.assert_clean();
}

#[tokio::test]
async fn a_checksum_makes_a_tag_unnecessary() {
    let server = Server::start(disk(), [Answer::CutAfter(500_000)]).await;
    server.script.lock().unwrap().etag = None;
    let fixture = Fixture::new();
    let reference = server.reference();
    let wanted = digest(&disk());
    let report = Reporter::silent();
    let got = fixture
        .store
        .obtain(&reference, Some(&wanted), &report)
        .await;
    assert!(got.is_ok());
    assert!(server.header("range")[1].starts_with("bytes="));
}

#[tokio::test]
async fn a_weak_tag_is_not_trusted_and_a_time_that_was_over_is() {
    let cut = [Answer::CutAfter(500_000)];
    let server = Server::start(disk(), cut.clone()).await;
    server.script.lock().unwrap().etag = Some("W/\"weak\"".into());
    assert!(get(&Fixture::new(), &server.url()).await.is_ok());
    assert_eq!(server.header("range"), ["-", "-"]);
    let times = [
        (
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            false,
        ),
        (
            "Sun, 06 Nov 1994 08:49:30 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            true,
        ),
    ];
    for (changed, told, trusted) in times {
        let server = Server::start(disk(), cut.clone()).await;
        {
            let mut script = server.script.lock().unwrap();
            script.etag = None;
            script.extra = vec![("last-modified", changed.into()), ("date", told.into())];
        }
        assert!(get(&Fixture::new(), &server.url()).await.is_ok());
        let asked = server.header("if-range")[1].clone();
        assert_eq!(asked == changed, trusted, "{asked}");
    }
}

#[tokio::test]
async fn a_part_of_something_else_is_not_taken() {
    let size = DISK_SIZE;
    for wrong in [
        format!("bytes 0-{}/{size}", size - 1),
        format!("bytes 1000000-{}/{}", size - 1, size + 1),
        "bytes */5".into(),
        "nonsense".into(),
    ] {
        let answers = vec![Answer::CutAfter(1_000_000), Answer::Range(wrong.clone())];
        let (got, server) = after(answers, |_| ()).await;
        assert_eq!(got.unwrap().digest(), &digest(&disk()), "{wrong}");
        assert_eq!(server.requests(), 3, "{wrong}");
    }
}

#[tokio::test]
async fn bodies_without_end_stop_at_the_limit() {
    let begin = Instant::now();
    let (got, _) = after(vec![Answer::Endless], |config| {
        config.limits.download = 20 << 20;
    })
    .await;
    assert_eq!(got.unwrap_err().code, Code::ImageTooLarge);
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn lengths_that_are_lies() {
    let body = disk();
    let answer = |claimed: usize| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {claimed}\r\n\r\n");
        [head.as_bytes(), &body].concat()
    };
    // More is promised than comes, each time anew.
    let (address, asked) = parrot(answer(body.len() + 10)).await;
    let fixture = Fixture::new();
    let got = get(&fixture, &format!("http://{address}/x")).await;
    assert_eq!(got.unwrap_err().code, Code::FetchFailed);
    assert_eq!(asked.lock().unwrap().len(), 3);
    fixture.assert_clean();
    // Less: what is beyond is not the image's.
    let (address, _) = parrot(answer(body.len() - 512)).await;
    let image = get(&fixture, &format!("http://{address}/x")).await.unwrap();
    assert_eq!(image.digest(), &digest(&body[..body.len() - 512]));
    // More than anything may have.
    let (address, asked) = parrot(answer(usize::MAX / 2)).await;
    let got = get(&fixture, &format!("http://{address}/x")).await;
    assert_eq!(got.unwrap_err().code, Code::ImageTooLarge);
    assert_eq!(asked.lock().unwrap().len(), 1);
    // No HTTP at all.
    let (address, _) = parrot(b"SSH-2.0-x\r\n".to_vec()).await;
    let got = get(&fixture, &format!("http://{address}/x")).await;
    assert_eq!(got.unwrap_err().code, Code::FetchFailed);
}

#[tokio::test]
async fn redirects_have_an_end() {
    let (got, server) = after(vec![Answer::Redirect; 30], |_| ()).await;
    failed(got, "too many redirects");
    assert!(server.requests() <= 12, "{}", server.requests());
    // Nothing but HTTP.
    for target in ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"] {
        let (got, server) = after(vec![Answer::RedirectTo(target.into()); 3], |_| ()).await;
        assert_eq!(got.unwrap_err().class(), Class::Host, "{target}");
        assert!(server.requests() <= 3);
    }
}

/// What it is, the answers, the error, and how often the server is asked.
type Case = (&'static str, Vec<Answer>, Code, Class, usize);

/// Who is to blame, for each thing that can go wrong.
#[tokio::test]
async fn each_fault_is_its_owners() {
    let status = |status, times| vec![Answer::Status(status); times];
    let cases: Vec<Case> = vec![
        ("400", status(400, 1), Code::ImageNotFound, Class::User, 1),
        ("401", status(401, 1), Code::ImageNotFound, Class::User, 1),
        ("404", status(404, 1), Code::ImageNotFound, Class::User, 1),
        ("451", status(451, 1), Code::ImageNotFound, Class::User, 1),
        ("407", status(407, 1), Code::FetchFailed, Class::Host, 1),
        ("408", status(408, 3), Code::FetchFailed, Class::Host, 3),
        ("425", status(425, 3), Code::FetchFailed, Class::Host, 3),
        ("429", status(429, 3), Code::FetchFailed, Class::Host, 3),
        ("500", status(500, 3), Code::FetchFailed, Class::Host, 3),
        ("503", status(503, 3), Code::FetchFailed, Class::Host, 3),
        ("204", status(204, 1), Code::FetchFailed, Class::Host, 1),
        ("206", status(206, 1), Code::FetchFailed, Class::Host, 1),
        ("304", status(304, 1), Code::FetchFailed, Class::Host, 1),
        (
            "cut",
            vec![Answer::CutAfter(0); 3],
            Code::FetchFailed,
            Class::Host,
            3,
        ),
    ];
    for (name, answers, code, class, requests) in cases {
        let (got, server) = after(answers, |_| ()).await;
        let err = got.unwrap_err();
        assert_eq!((err.code, err.class()), (code, class), "{name}: {err}");
        assert_eq!(server.requests(), requests, "{name}");
        // What the server says beside the status is not passed on.
        assert!(!format!("{err:?}").contains(SECRET), "{name}");
    }
    let image = |bytes: Vec<u8>| async move {
        let server = Server::start(bytes, []).await;
        let fixture = Fixture::with(|config| {
            config.limits.virtual_size = 8 << 20;
            config.tools.qemu_img = "pileus-no-qemu-img".into();
        });
        let err = get(&fixture, &server.url()).await.unwrap_err();
        fixture.assert_clean();
        (err.code, err.class())
    };
    assert_eq!(
        image(b"hello".to_vec()).await,
        (Code::BadImage, Class::User)
    );
    assert_eq!(
        image(xz(&disk())[..50].to_vec()).await,
        (Code::BadImage, Class::User)
    );
    assert_eq!(image(zst(&vec![0x55; 9 << 20])).await.1, Class::User);
    let full = Fixture::with(|config| config.limits.reserve = u64::MAX / 2);
    let server = Server::start(disk(), []).await;
    let err = get(&full, &server.url()).await.unwrap_err();
    assert_eq!((err.code, err.class()), (Code::NoSpace, Class::Host));
    full.assert_clean();
}

#[tokio::test]
async fn secrets_of_a_url_are_used_and_never_shown() {
    let server = Server::start(disk(), [Answer::Status(500), Answer::Status(404)]).await;
    let url = format!(
        "http://ann:swordfish@{}/disk.img?token=t0ps3cret",
        server.address()
    );
    let fixture = Fixture::new();
    let (report, _, seen) = recorder();
    let reference = url.parse().unwrap();
    let err = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap_err();
    let image = get(&fixture, &url).await.unwrap();
    assert_eq!(
        server.header("authorization")[2],
        "Basic YW5uOnN3b3JkZmlzaA=="
    );
    let mut all = format!("{err:?} {:?} {:?}", seen.lock().unwrap(), image.info());
    for entry in walk(fixture.store.root()) {
        if entry.file_name().is_some_and(|name| name != "disk.raw") {
            all += &String::from_utf8_lossy(&std::fs::read(&entry).unwrap());
        }
    }
    for secret in ["swordfish", "t0ps3cret", "ann:"] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
    assert!(all.contains("/disk.img?token=hidden"), "{all}");
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(walk(&path));
        } else {
            all.push(path);
        }
    }
    all
}

const PROXY_TEST: &str = "PILEUS_TEST_PROXY_URL";

/// Not a test of its own: a process whose environment names proxies.
#[tokio::test]
#[ignore = "run by proxies_of_the_environment_are_used"]
async fn helper() {
    let Ok(url) = std::env::var(PROXY_TEST) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let fixture = Fixture::with(|config| config.proxies = true);
    match get(&fixture, &url).await {
        Ok(image) => println!("GOT {}", image.digest()),
        Err(err) => println!("FAILED {} {err:?}", err.code),
    }
}

fn through(variables: &[(&str, String)], url: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "trouble::helper", "--ignored", "--nocapture"])
        .env_clear()
        .env(PROXY_TEST, url)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stderr(Stdio::null());
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let done = command.output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let told = |line: &&str| line.contains("GOT ") || line.contains("FAILED ");
    text.lines().find(told).unwrap_or(&text).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_used() {
    let body = disk();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    let (proxy, asked) = parrot([head.as_bytes(), &body].concat()).await;
    let direct = Server::start(disk(), []).await;
    let proxy = format!("http://user:pr0xypass@{proxy}");
    let got = format!("GOT {}", digest(&body));
    let run = |variables: Vec<(&'static str, String)>, url: String| async move {
        tokio::task::spawn_blocking(move || through(&variables, &url))
            .await
            .unwrap()
    };
    // A name that nobody knows: only the proxy can have answered.
    let url = "http://image.invalid/disk.img".to_owned();
    let said = run(vec![("http_proxy", proxy.clone())], url.clone()).await;
    assert!(said.contains(&got), "{said}");
    let request = asked.lock().unwrap().pop().unwrap();
    assert!(
        request.starts_with("GET http://image.invalid/disk.img HTTP/1.1"),
        "{request}"
    );
    assert!(
        request
            .to_ascii_lowercase()
            .contains("proxy-authorization: basic"),
        "{request}"
    );
    // A tunnel for what is encrypted; this proxy gives none that works, and its password stays unknown.
    asked.lock().unwrap().clear();
    let url = "https://image.invalid/disk.img".to_owned();
    let said = run(vec![("HTTPS_PROXY", proxy.clone())], url).await;
    assert!(said.contains("FAILED fetch-failed"), "{said}");
    assert!(!said.contains("pr0xypass"), "{said}");
    let request = asked.lock().unwrap().pop().unwrap();
    assert!(
        request.starts_with("CONNECT image.invalid:443"),
        "{request}"
    );
    // What is near needs none.
    asked.lock().unwrap().clear();
    let variables = vec![("http_proxy", proxy), ("no_proxy", "127.0.0.1".into())];
    let said = run(variables, direct.url()).await;
    assert!(said.contains(&got), "{said}");
    assert_eq!((direct.requests(), asked.lock().unwrap().len()), (1, 0));
}
