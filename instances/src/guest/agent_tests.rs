//! The link against a peer that lies, floods, tears lines and comes back; and against the real agent.

use super::*;
use crate::guest::wire::CloudInitState;
use std::process::{Child, Command, Stdio};
use tokio::net::UnixListener;

const HELLO: &str = r#"{"type":"hello","proto":1,"agent":"1","boot_id":"b","hostname":"h","kernel":"k","machine":"m","python":"3","os":"o"}"#;
const SOON: Duration = Duration::from_secs(10);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(SOON, work).await.expect("nothing happened in time")
}

/// A peer that takes one connection after the other.
struct Peer {
    _dir: tempfile::TempDir,
    listener: UnixListener,
    link: AgentLink,
}

impl Peer {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        Self {
            _dir: dir,
            listener,
            link: AgentLink::connect(path),
        }
    }

    async fn accept(&self) -> UnixStream {
        soon(self.listener.accept()).await.unwrap().0
    }
}

async fn say(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.write_all(b"\n").await.unwrap();
}

/// The next request that the link sends, without its opening hello.
async fn request(stream: &mut UnixStream) -> Value {
    let mut line = Vec::new();
    loop {
        let byte = soon(stream.read_u8()).await.unwrap();
        if byte != b'\n' {
            line.push(byte);
            continue;
        }
        match serde_json::from_slice::<Value>(&std::mem::take(&mut line)) {
            Ok(value) if value["do"] != "hello" => return value,
            _ => {}
        }
    }
}

#[tokio::test]
async fn garbage_before_and_between_messages_is_ignored() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    say(&mut stream, "half a line of an older conversation\"}").await;
    say(&mut stream, "{\"type\":\"nonsense\"}\n\n\u{1b}[2J").await;
    say(&mut stream, &"x".repeat(3 * MAX_LINE)).await;
    say(&mut stream, HELLO).await;
    assert_eq!(soon(peer.link.wait_hello()).await.unwrap().hostname, "h");
    say(
        &mut stream,
        r#"{"type":"cloud-init","state":"error","errors":["a"]}"#,
    )
    .await;
    let end = soon(peer.link.wait_cloud_init()).await.unwrap();
    assert_eq!((end.state, end.errors.len()), (CloudInitState::Error, 1));
}

#[tokio::test]
async fn answers_find_their_requests() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    let (one, two) = (peer.link.clone(), peer.link.clone());
    let one = tokio::spawn(async move { one.request("a", json!({"x": 1}), SOON).await });
    let first = request(&mut stream).await;
    assert_eq!((&first["do"], &first["x"]), (&json!("a"), &json!(1)));
    let two = tokio::spawn(async move { two.request("b", json!({}), SOON).await });
    let second = request(&mut stream).await;
    let refusal = format!(
        r#"{{"type":"reply","id":{},"ok":false,"error":"no"}}"#,
        second["id"]
    );
    // Answers to no one, the other order, and an answer twice.
    say(&mut stream, r#"{"type":"reply","id":99999,"ok":true}"#).await;
    say(&mut stream, &refusal).await;
    say(&mut stream, &refusal).await;
    let answer = format!(r#"{{"type":"reply","id":{},"ok":true,"y":2}}"#, first["id"]);
    say(&mut stream, &answer).await;
    assert_eq!(soon(one).await.unwrap().unwrap()["y"], 2);
    let err = soon(two).await.unwrap().unwrap_err();
    assert!(err.message.contains("no"), "{err}");
}

#[tokio::test]
async fn a_silent_guest_costs_only_its_bound() {
    let peer = Peer::new();
    let _stream = peer.accept().await;
    let bound = Duration::from_millis(100);
    let err = peer
        .link
        .request("ping", json!({}), bound)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    assert!(lock(&peer.link.pending).is_empty());
}

#[tokio::test]
async fn a_broken_link_fails_its_requests_and_comes_back() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    say(&mut stream, HELLO).await;
    soon(peer.link.wait_hello()).await.unwrap();
    let link = peer.link.clone();
    let waiting = tokio::spawn(async move { link.request("ping", json!({}), SOON).await });
    request(&mut stream).await;
    drop(stream);
    let err = soon(waiting).await.unwrap().unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    let mut hello = peer.link.hello();
    soon(hello.wait_for(Option::is_none)).await.unwrap();
    let mut stream = peer.accept().await;
    say(&mut stream, &HELLO.replace("\"h\"", "\"again\"")).await;
    assert_eq!(
        soon(peer.link.wait_hello()).await.unwrap().hostname,
        "again"
    );
}

#[tokio::test]
async fn after_a_reset_or_a_silence_it_connects_anew() {
    let peer = Peer::new();
    let first = peer.accept().await;
    peer.link.reconnect();
    let second = peer.accept().await;
    // Nobody says hello here, so the link tries again by itself.
    let third = timeout(SILENCE_BEFORE_HELLO * 2, peer.listener.accept()).await;
    assert!(third.is_ok());
    drop((first, second));
}

/// A clone on a busy host: it is asked at once, and comes round late.
#[tokio::test]
async fn who_is_asked_something_is_waited_for() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    let link = peer.link.clone();
    let asked = tokio::spawn(async move {
        let bound = SILENCE_BEFORE_HELLO * 4;
        link.request("identify", json!({}), bound).await
    });
    let question = request(&mut stream).await;
    tokio::time::sleep(SILENCE_BEFORE_HELLO + Duration::from_millis(500)).await;
    say(&mut stream, HELLO).await;
    let reply = json!({"type": "reply", "id": question["id"], "ok": true, "steps": 7});
    say(&mut stream, &reply.to_string()).await;
    assert_eq!(soon(asked).await.unwrap().unwrap()["steps"], 7);
}

#[tokio::test]
async fn the_last_handle_ends_the_link() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    let Peer {
        link,
        listener,
        _dir,
    } = peer;
    drop(link);
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    let again = timeout(Duration::from_millis(300), listener.accept()).await;
    assert!(again.is_err(), "the link came back");
}

#[tokio::test]
async fn a_flood_is_slowed_down() {
    let peer = Peer::new();
    let mut stream = peer.accept().await;
    let flood = "{}\n".repeat(20_000);
    let sent = timeout(Duration::from_millis(1500), async {
        for _ in 0..200 {
            stream.write_all(flood.as_bytes()).await.unwrap();
        }
    })
    .await;
    assert!(sent.is_err(), "12 MB of lines were swallowed at once");
}

/// The real agent under this host's Python, with sockets in place of ports.
struct RealAgent {
    dir: tempfile::TempDir,
    child: Child,
}

impl RealAgent {
    fn start(dir: tempfile::TempDir) -> Option<Self> {
        let script = dir.path().join("agent.py");
        std::fs::write(&script, crate::guest::seed::AGENT_PY).unwrap();
        std::fs::write(dir.path().join("clone.py"), crate::guest::seed::CLONE_PY).unwrap();
        std::fs::create_dir_all(dir.path().join("cloud")).unwrap();
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        let child = Command::new("python3")
            .args(["-I", "-S"])
            .arg(&script)
            .arg("--ports")
            .arg(dir.path())
            .arg("--etc")
            .arg(dir.path().join("etc"))
            .arg("--cloud")
            .arg(dir.path().join("cloud"))
            .stdin(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self { dir, child }),
            Err(err) => {
                eprintln!("SKIPPED: python3 can't be run: {err}");
                None
            }
        }
    }

    /// Processor time of the agent so far, in clock ticks.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Joins the agent (which connects to a socket in tests) to the link (which connects too): two
/// listeners and a copy between them, as QEMU is one.
async fn splice(ports: UnixListener, host: UnixListener) {
    loop {
        let (Ok((mut a, _)), Ok((mut b, _))) = (ports.accept().await, host.accept().await) else {
            return;
        };
        let _ = tokio::io::copy_bidirectional(&mut a, &mut b).await;
    }
}

#[tokio::test]
async fn the_real_agent_reports_reconnects_and_rests() {
    let dir = tempfile::tempdir().unwrap();
    let ports = UnixListener::bind(dir.path().join("pileus.agent.0")).unwrap();
    let host_path = dir.path().join("host.sock");
    let host = UnixListener::bind(&host_path).unwrap();
    let Some(agent) = RealAgent::start(dir) else {
        return;
    };
    tokio::spawn(splice(ports, host));
    let link = AgentLink::connect(&host_path);
    let hello = soon(link.wait_hello()).await.unwrap();
    assert_eq!(hello.proto, wire::PROTO);
    let report = link.fresh_report(SOON).await.unwrap();
    assert!(report.memory.total > 0 && report.disk.total > 0 && report.cpus > 0);
    let err = link
        .request("no-such-thing", json!({}), SOON)
        .await
        .unwrap_err();
    assert!(err.message.contains("unknown request"), "{err}");
    link.request("sync", json!({}), SOON).await.unwrap();
    let err = link
        .request("rename", json!({"hostname": "-"}), SOON)
        .await
        .unwrap_err();
    assert!(err.message.contains("not a host name"), "{err}");
    // The part that only clones need is loaded on request.
    let items = link.identity(SOON).await.unwrap();
    let hostname = items.iter().find(|(name, _)| name == "hostname").unwrap();
    assert!(hostname.1.contains(&hello.hostname), "{items:?}");

    // cloud-init's real result, from files as it writes them.
    let cloud = agent.dir.path().join("cloud");
    let stage = |done: bool| {
        let errors = if done {
            json!(["('scripts_user', RuntimeError('boom'))"])
        } else {
            json!([])
        };
        json!({"start": 1.0, "finished": done.then_some(2.5), "errors": errors, "recoverable_errors": {"WARNING": ["careful"]}})
    };
    let status = |done| {
        json!({"v1": {"stage": "modules-final", "datasource": "X", "init-local": {"start": 1, "finished": 2, "errors": []},
            "init": {"start": 1, "finished": 2, "errors": []}, "modules-config": {"start": 1, "finished": 2, "errors": []},
            "modules-final": stage(done)}})
        .to_string()
    };
    let put = |name: &str, text: String| {
        let temp = cloud.join("temp");
        std::fs::write(&temp, text).unwrap();
        std::fs::rename(temp, cloud.join(name)).unwrap();
    };
    put("status.json", status(false));
    let mut state = link.cloud_init();
    soon(state.wait_for(|s| s.state == CloudInitState::Running))
        .await
        .unwrap();
    put("status.json", status(true));
    put(
        "result.json",
        json!({"v1": {"datasource": "X", "errors": ["('scripts_user', RuntimeError('boom'))"]}})
            .to_string(),
    );
    let end = soon(link.wait_cloud_init()).await.unwrap();
    assert_eq!(end.state, CloudInitState::Error);
    assert_eq!(
        end.errors,
        ["modules-final: ('scripts_user', RuntimeError('boom'))"]
    );
    assert_eq!(end.recoverable, ["modules-final: careful"]);
    assert_eq!(end.stages["modules-final"].seconds(), Some(1.5));

    // The daemon restarts: another link finds the same agent.
    drop(link);
    let link = AgentLink::connect(&host_path);
    let again = soon(link.wait_hello()).await.unwrap();
    assert_eq!(again.boot_id, hello.boot_id);
    soon(link.wait_cloud_init()).await.unwrap();

    // At rest it uses no processor time, with the host there and with the host away.
    for _ in 0..2 {
        let before = agent.ticks();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let spent = agent.ticks() - before;
        assert!(spent <= 3, "{spent} ticks in 1.5 s of rest");
        link.outgoing.send(Vec::new()).await.unwrap();
    }
    drop(link);
    let before = agent.ticks();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let spent = agent.ticks() - before;
    assert!(spent <= 5, "{spent} ticks in 1.5 s without a host");
}
