//! The pool and its sessions against a real OpenSSH server, started by the real agent; only the ports
//! are sockets here.

use super::*;
use crate::guest::exec::{Control, ExecSession, ExecSpec, Output, Tty, sftp_line};
use bytes::Bytes;
use std::process::{Child, Command, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

const SOON: Duration = Duration::from_secs(30);

struct Guest {
    dir: tempfile::TempDir,
    agent: Child,
    keys: InstanceKeys,
    link: AgentLink,
    pool: SshPool,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn user() -> String {
    let out = Command::new("id").arg("-un").output().unwrap();
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

impl Guest {
    /// `None`, loudly, where the host lacks what the test needs.
    async fn start() -> Option<Self> {
        if !Path::new("/usr/sbin/sshd").exists() {
            eprintln!("SKIPPED: /usr/sbin/sshd is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let keys = InstanceKeys::generate().unwrap();
        let etc = at("etc");
        std::fs::create_dir(&etc).unwrap();
        let write =
            |name: &str, text: String| files::write_atomic(&etc.join(name), text.as_bytes(), 0o600);
        write("ssh_host_ed25519_key", keys.host_private_text().unwrap()).unwrap();
        write("authorized_keys", keys.client_public_line().unwrap() + "\n").unwrap();
        // The folder lies below a world-writable one, and this host's PAM is none of our business.
        let settings =
            json!({"user": user(), "user_managed": false, "sshd": ["StrictModes no", "UsePAM no"]});
        write("agent.json", settings.to_string()).unwrap();
        std::fs::write(at("agent.py"), crate::guest::seed::AGENT_PY).unwrap();
        for name in ["pileus.agent.0", "pileus.ssh.0", "pileus.ssh.1"] {
            let port = UnixListener::bind(at(name)).unwrap();
            let host = UnixListener::bind(at(&format!("host-{name}"))).unwrap();
            tokio::spawn(splice(port, host));
        }
        let agent = Command::new("python3")
            .args(["-I", "-S"])
            .arg(at("agent.py"))
            .arg("--ports")
            .arg(dir.path())
            .arg("--etc")
            .arg(&etc)
            .arg("--cloud")
            .arg(at("cloud"))
            .stdin(Stdio::null())
            .spawn();
        let Ok(agent) = agent else {
            eprintln!("SKIPPED: python3 can't be run");
            return None;
        };
        let link = AgentLink::connect(at("host-pileus.agent.0"));
        timeout(SOON, link.wait_hello()).await.unwrap().unwrap();
        let port = |name: &str| (name.to_owned(), at(&format!("host-{name}")));
        let access = Access::Agent {
            link: link.clone(),
            ports: vec![port("pileus.ssh.0"), port("pileus.ssh.1")],
        };
        let pool = SshPool::new(access, user(), keys.clone());
        Some(Self {
            dir,
            agent,
            keys,
            link,
            pool,
        })
    }

    async fn exec(&self, spec: &ExecSpec) -> ExecSession {
        timeout(SOON, self.pool.exec(spec)).await.unwrap().unwrap()
    }

    async fn run(&self, command: &[&str]) -> End {
        finish(self.exec(&spec(command)).await).await
    }
}

/// Joins each connection of the agent's side to the next of the host's side.
async fn splice(port: UnixListener, host: UnixListener) {
    loop {
        let (Ok((mut a, _)), Ok((mut b, _))) = (port.accept().await, host.accept().await) else {
            return;
        };
        tokio::spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut a, &mut b).await;
        });
    }
}

fn spec(command: &[&str]) -> ExecSpec {
    ExecSpec {
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        ..ExecSpec::default()
    }
}

#[derive(Debug, Default)]
struct End {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: Option<u32>,
    signal: Option<String>,
    failed: Option<Error>,
}

async fn finish(mut session: ExecSession) -> End {
    let mut end = End::default();
    let collect = async {
        while let Some(piece) = session.output.recv().await {
            match piece {
                Output::Stdout(bytes) => end.stdout.extend_from_slice(&bytes),
                Output::Stderr(bytes) => end.stderr.extend_from_slice(&bytes),
                Output::Exit(code) => end.code = Some(code),
                Output::Signal(name) => end.signal = Some(name),
                Output::Failed(err) => end.failed = Some(err),
            }
        }
    };
    timeout(SOON, collect)
        .await
        .expect("the command did not end");
    end
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_end_as_they_would_in_a_shell() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let end = guest
        .run(&["sh", "-c", "echo out; echo err >&2; exit 33"])
        .await;
    assert_eq!(
        (text(&end.stdout), text(&end.stderr)),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(end.code, Some(33));
    assert_eq!(guest.run(&["exit", "7"]).await.code, Some(7));
    assert_eq!(guest.run(&["no-such-command"]).await.code, Some(127));
    let odd = "it's \"a\" $HOME `x` \\ \n*";
    assert_eq!(text(&guest.run(&["printf", "%s", odd]).await.stdout), odd);
    let end = guest.run(&["sh", "-c", "kill -TERM $$"]).await;
    assert!(
        end.signal.as_deref() == Some("TERM") || end.code == Some(143),
        "{end:?}"
    );
    // Folder and variables.
    let folder = guest.dir.path().join("a folder");
    std::fs::create_dir(&folder).unwrap();
    let spec = ExecSpec {
        command: vec!["sh".into(), "-c".into(), "pwd; echo $PILEUS_X".into()],
        cwd: Some(folder.to_str().unwrap().into()),
        env: vec![("PILEUS_X".into(), "a b".into())],
        tty: None,
        sftp: false,
    };
    let end = finish(guest.exec(&spec).await).await;
    assert_eq!(text(&end.stdout), format!("{}\na b\n", folder.display()));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_pass_unchanged_both_ways() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let bytes: Vec<u8> = (0..8 << 20_u32)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let session = guest.exec(&spec(&["cat"])).await;
    let (stdin, control) = (session.stdin.clone(), session.control.clone());
    let input = Bytes::from(bytes.clone());
    tokio::spawn(async move {
        for at in (0..input.len()).step_by(100_000) {
            let piece = input.slice(at..input.len().min(at + 100_000));
            stdin.send(piece).await.unwrap();
        }
        control.send(Control::Eof).await.unwrap();
    });
    let end = finish(session).await;
    assert!(
        end.stdout == bytes,
        "{} bytes of {}",
        end.stdout.len(),
        bytes.len()
    );
    assert_eq!(end.code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_its_size_and_takes_signals() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let tty = Tty {
        term: "xterm-256color".into(),
        cols: 101,
        rows: 37,
        modes: vec![(53, 0)], // ECHO off
    };
    // The trap first: what is printed after it tells that it is set.
    let script = "trap 'stty size; exit 5' WINCH; echo $TERM; stty size; \
                  while :; do sleep 0.1; done";
    let mut session = guest
        .exec(&ExecSpec {
            tty: Some(tty),
            ..spec(&["sh", "-c", script])
        })
        .await;
    let mut seen = String::new();
    while !seen.contains("37 101\r\n") {
        match timeout(SOON, session.output.recv()).await.unwrap() {
            Some(Output::Stdout(bytes)) => seen += &text(&bytes),
            other => panic!("{other:?} after {seen:?}"),
        }
    }
    assert!(seen.starts_with("xterm-256color\r\n"), "{seen:?}");
    let resize = Control::Resize { cols: 90, rows: 20 };
    session.control.send(resize).await.unwrap();
    let end = finish(session).await;
    assert_eq!((text(&end.stdout), end.code), ("20 90\r\n".into(), Some(5)));

    let script = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done";
    let mut session = guest.exec(&spec(&["sh", "-c", script])).await;
    let ready = timeout(SOON, session.output.recv()).await.unwrap();
    assert!(matches!(ready, Some(Output::Stdout(_))), "{ready:?}");
    let control = session.control.clone();
    control.send(Control::Signal("USR1".into())).await.unwrap();
    assert_eq!(finish(session).await.code, Some(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_reader_holds_up_nobody_and_fills_no_memory() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let sleeper = guest.exec(&spec(&["yes"])).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let end = guest.run(&["echo", "hi"]).await;
    assert_eq!(end.stdout, b"hi\n");
    // Dropped, it ends the command, and the first connection is free again.
    drop(sleeper);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let pid = guest.run(&["sh", "-c", "echo $PPID"]).await;
    assert_eq!(pid.code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_session_hangs_its_command_up() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let mark = guest.dir.path().join("hung-up");
    let script = format!(
        "trap 'touch {}; exit' HUP; echo ready; while :; do sleep 0.05; done",
        mark.display()
    );
    let mut session = guest.exec(&spec(&["sh", "-c", &script])).await;
    assert!(matches!(
        session.output.recv().await,
        Some(Output::Stdout(_))
    ));
    drop(session);
    for _ in 0..600 {
        if mark.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the command was not told");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_is_told_and_made_anew() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    // Its end stands still, and then goes: who waits for an answer hears of it before any bound is over.
    assert_eq!(guest.run(&["true"]).await.code, Some(0));
    let agent = guest.agent.id().to_string();
    let sshd = Command::new("pgrep").args(["-P", &agent]).output().unwrap();
    let sshd = text(&sshd.stdout).trim().parse().unwrap();
    let group = rustix::process::Pid::from_raw(sshd).unwrap();
    rustix::process::kill_process_group(group, rustix::process::Signal::STOP).unwrap();
    let began = std::time::Instant::now();
    let wait = tokio::time::sleep(Duration::from_millis(200));
    let close = async {
        wait.await;
        guest.link.request("ssh-close", json!({}), SOON).await
    };
    let (ran, closed) = tokio::join!(guest.run(&["echo", "soon"]), close);
    closed.unwrap();
    assert_eq!(ran.stdout, b"soon\n");
    assert!(began.elapsed() < OPEN_BOUND / 2, "{:?}", began.elapsed());

    let session = guest.exec(&spec(&["sleep", "60"])).await;
    let answer = guest.link.request("ssh-close", json!({}), SOON).await;
    answer.unwrap();
    let end = finish(session).await;
    assert!(end.failed.is_some(), "{end:?}");
    assert_eq!(guest.run(&["echo", "again"]).await.stdout, b"again\n");
    guest.pool.close().await;
    assert_eq!(guest.run(&["echo", "thrice"]).await.stdout, b"thrice\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_key_is_refused() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let other = InstanceKeys::generate().unwrap();
    let text = other.host_private_text().unwrap();
    std::fs::write(guest.dir.path().join("etc/ssh_host_ed25519_key"), text).unwrap();
    let err = timeout(SOON, guest.pool.exec(&spec(&["true"])))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    assert!(err.message.contains("another host key"), "{err}");
    assert_ne!(other.host_public(), guest.keys.host_public());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_client_key_is_refused() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    std::fs::write(guest.dir.path().join("etc/authorized_keys"), "").unwrap();
    let err = timeout(SOON, guest.pool.exec(&spec(&["true"])))
        .await
        .unwrap()
        .unwrap_err();
    assert!(err.message.contains("refused pileus's key"), "{err}");
}

#[tokio::test]
async fn leftovers_before_the_greeting_are_thrown_away() {
    for (before, after) in [
        ("", "SSH-2.0-x\r\n"),
        ("SSH-2.0-old\r\n\0\u{1}garbage", "SSH-2.0-x\r\n"),
        ("PILEUS-SSH wrongnonce\nPILEUS-SS", "rest"),
        ("PILEUS-SSH abcdefghPILEUS-SSH abcdefg", "rest"),
        ("PPPILEUSPILEUS-", ""),
    ] {
        let (mut guest, host) = tokio::io::duplex(1024);
        let line = format!("{before}PILEUS-SSH abcdefgh\n{after}");
        tokio::io::AsyncWriteExt::write_all(&mut guest, line.as_bytes())
            .await
            .unwrap();
        drop(guest);
        let mut host = BufReader::new(host);
        greeting(&mut host, "abcdefgh").await.unwrap();
        let mut rest = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut host, &mut rest)
            .await
            .unwrap();
        assert_eq!(rest, after, "after {before:?}");
    }
    let (guest, host) = tokio::io::duplex(64);
    drop(guest);
    let err = greeting(&mut BufReader::new(host), "abcdefgh")
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
}

/// As after a machine stood still while its old connection broke: the first greeting was lost.
#[tokio::test]
async fn a_greeting_that_is_lost_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, ssh) = (dir.path().join("agent"), dir.path().join("ssh"));
    let agent_port = UnixListener::bind(&agent).unwrap();
    let ssh_port = UnixListener::bind(&ssh).unwrap();
    let (nonces_in, mut nonces) = tokio::sync::mpsc::unbounded_channel::<String>();
    tokio::spawn(async move {
        let (stream, _) = agent_port.accept().await.unwrap();
        let (from, mut to) = stream.into_split();
        let mut lines = BufReader::new(from).lines();
        while let Some(line) = lines.next_line().await.unwrap() {
            let Ok(asked) = serde_json::from_str::<serde_json::Value>(&line) else {
                continue;
            };
            let mut answer = String::new();
            if asked["do"] == "hello" {
                let hello = json!({"type": "hello", "proto": 1, "agent": "1", "boot_id": "b", "hostname": "h",
                    "kernel": "k", "machine": "m", "python": "3", "os": "o", "pid": 1, "instance": "i"});
                answer = format!("{hello}\n");
            } else if asked["do"] == "ssh-open" {
                nonces_in
                    .send(asked["nonce"].as_str().unwrap().to_owned())
                    .unwrap();
            }
            let reply = json!({"type": "reply", "id": asked["id"], "ok": true});
            to.write_all(format!("{answer}{reply}\n").as_bytes())
                .await
                .unwrap();
        }
    });
    let link = AgentLink::connect(&agent);
    let held = link.clone();
    let agreed = tokio::spawn(async move { agreed(&held, "pileus.ssh.0", &ssh).await });
    let first = nonces.recv().await.unwrap();
    let (mut lost, _) = ssh_port.accept().await.unwrap();
    let second = nonces.recv().await.unwrap();
    assert_ne!(first, second);
    // The first one was closed, and its late greeting does not count.
    assert_eq!(lost.read(&mut [0; 8]).await.unwrap(), 0);
    let (mut port, _) = ssh_port.accept().await.unwrap();
    let greetings = format!("PILEUS-SSH {first}\nPILEUS-SSH {second}\nSSH-2.0");
    port.write_all(greetings.as_bytes()).await.unwrap();
    let (mut stream, dead) = agreed.await.unwrap().unwrap();
    let mut rest = [0; 7];
    stream.read_exact(&mut rest).await.unwrap();
    assert_eq!(&rest, b"SSH-2.0");
    assert!(!dead.is_cancelled());
    drop(link);
}

#[test]
fn a_foreign_key_is_pinned_at_first_use() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pin");
    let public = || InstanceKeys::generate().unwrap().host_public().clone();
    let (ours, first, second) = (public(), public(), public());
    let pin = |file: &Path| Pin::from_file(ours.clone(), file).unwrap();
    assert!(pin(&file).accepts(&ours).unwrap());
    assert!(!file.exists());
    assert!(pin(&file).accepts(&first).unwrap());
    assert!(pin(&file).accepts(&first).unwrap());
    assert!(!pin(&file).accepts(&second).unwrap());
    std::fs::write(&file, "nonsense").unwrap();
    assert!(Pin::from_file(ours, &file).is_err());
}

/// A server on the loopback that answers each connection with `serve`.
async fn server<F>(serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_carry_bytes_and_each_end_by_itself() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Some(guest) = Guest::start().await else {
        return;
    };
    // Reads to the end, then answers: needs an end of one direction only.
    let port = server(async |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        let answer = format!("{} bytes", all.len());
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let mut stream = guest.pool.port(port).await.unwrap();
    for _ in 0..100 {
        let piece = Bytes::from(vec![7; 50_000]);
        stream.to_guest.send(piece).await.unwrap();
    }
    drop(stream.to_guest);
    let mut answer = Vec::new();
    while let Some(piece) = stream.from_guest.recv().await {
        answer.extend_from_slice(&piece);
    }
    assert_eq!(text(&answer), "5000000 bytes");

    // The guest's end comes first, and the other direction still works.
    let (heard_in, mut heard) = tokio::sync::mpsc::channel(1);
    let port = server(move |mut stream| {
        let heard_in = heard_in.clone();
        async move {
            stream.write_all(b"bye").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            heard_in.send(all).await.unwrap();
        }
    })
    .await;
    let mut stream = guest.pool.port(port).await.unwrap();
    assert_eq!(stream.from_guest.recv().await.unwrap(), "bye");
    assert!(stream.from_guest.recv().await.is_none());
    stream.to_guest.send("late".into()).await.unwrap();
    drop(stream.to_guest);
    assert_eq!(timeout(SOON, heard.recv()).await.unwrap().unwrap(), b"late");

    // A port where nobody listens is an answer, and the connection lives on.
    let err = guest.pool.port(1).await.unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    assert!(err.message.contains("port 1"), "{err}");
    assert_eq!(guest.run(&["exit", "4"]).await.code, Some(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_whose_reader_sleeps_stops_nobody_else() {
    use tokio::io::AsyncWriteExt;
    let Some(guest) = Guest::start().await else {
        return;
    };
    const LEN: usize = 32 << 20;
    let port = server(async |mut stream| {
        let piece = vec![1; 1 << 20];
        for _ in 0..LEN >> 20 {
            if stream.write_all(&piece).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mut slow = guest.pool.port(port).await.unwrap();
    tokio::time::sleep(Duration::from_millis(800)).await;
    // The other slot serves this one.
    assert_eq!(guest.run(&["exit", "5"]).await.code, Some(5));
    let mut len = 0;
    while let Some(piece) = timeout(SOON, slow.from_guest.recv()).await.unwrap() {
        len += piece.len();
    }
    assert_eq!(len, LEN);
    // One that is dropped in the middle ends in the guest as well.
    let gone = guest.pool.port(port).await.unwrap();
    drop(gone.from_guest);
    assert_eq!(guest.run(&["exit", "6"]).await.code, Some(6));
}

/// Says what version it speaks, and hears the server's: 3, as OpenSSH's.
async fn speaks_sftp(session: &mut ExecSession) -> bool {
    session
        .stdin
        .send(Bytes::from_static(b"\0\0\0\x05\x01\0\0\0\x03"))
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 9 {
        match timeout(SOON, session.output.recv()).await.unwrap() {
            Some(Output::Stdout(bytes)) => seen.extend_from_slice(&bytes),
            other => panic!("{other:?} after {seen:?}"),
        }
    }
    seen[4..9] == *b"\x02\0\0\0\x03"
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sftp_server_is_a_subsystem_or_a_program() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let sftp = ExecSpec {
        sftp: true,
        ..ExecSpec::default()
    };
    let mut session = guest.exec(&sftp).await;
    assert!(speaks_sftp(&mut session).await);
    session.control.send(Control::Eof).await.unwrap();
    assert_eq!(finish(session).await.code, Some(0));
    // A server that does not know the word says so, and the program is started by its path.
    let err = guest.pool.subsystem("no-such").await.unwrap_err();
    assert_eq!(err.code, Code::ExecFailed);
    if !Path::new("/usr/lib/openssh/sftp-server").exists() {
        eprintln!("SKIPPED: this host has no sftp-server where Debian has it");
        return;
    }
    let mut session = guest.exec(&spec(&["sh", "-c", &sftp_line()])).await;
    assert!(speaks_sftp(&mut session).await);
    drop(session.stdin);
}
