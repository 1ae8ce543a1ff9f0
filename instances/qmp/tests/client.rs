//! The client against a peer that plays QEMU by script, well and badly, and against the real one.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use futures_util::FutureExt;
use pileus_qmp::commands::{AddFd, GetFd, QueryStatus, Quit, Status};
use pileus_qmp::{Client, Events, Options, QmpError};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":"","new":1},"capabilities":["oob"]}}"#;

/// The other end of the socket.
struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    async fn send(&mut self, line: &str) {
        let stream = self.stream.get_mut();
        stream.write_all(line.as_bytes()).await.unwrap();
        stream.write_all(b"\r\n").await.unwrap();
    }

    async fn command(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap_or_else(|err| panic!("{line:?}: {err}"))
    }

    /// Answers the next command, which must be `name`.
    async fn answer(&mut self, name: &str, reply: impl Into<Value>) {
        let command = self.command().await;
        assert_eq!(command["execute"], name, "{command}");
        self.send(&json!({"return": reply.into(), "id": command["id"]}).to_string())
            .await;
    }
}

async fn connected(options: Options) -> (Client, Events, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer {
        stream: BufReader::new(theirs),
    };
    let play = async {
        peer.send(GREETING).await;
        peer.answer("qmp_capabilities", json!({})).await;
    };
    let (client, ()) = tokio::join!(Client::handshake(ours, options), play);
    let (client, events) = client.unwrap();
    (client, events, peer)
}

fn quick() -> Options {
    Options {
        max_line: 4096,
        greeting: Duration::from_millis(200),
        deadline: Duration::from_millis(200),
        max_events: 2,
    }
}

#[tokio::test]
async fn typed_and_raw_commands_and_refusals() {
    let (client, _events, mut peer) = connected(Options::default()).await;
    assert_eq!(client.version().major, 10);
    let play = async {
        peer.answer(
            "query-status",
            json!({"running":true,"status":"running","x":1}),
        )
        .await;
        peer.answer("new-command", json!([1, 2])).await;
        let command = peer.command().await;
        assert!(command.get("arguments").is_none(), "{command}");
        peer.send(
            &json!({"id":command["id"],"error":{"class":"GenericError","desc":"no"}}).to_string(),
        )
        .await;
    };
    let ask = async {
        let status: Status = client.run(&QueryStatus {}).await.unwrap();
        assert!(status.running);
        let raw = client.execute("new-command", json!({"a":1})).await.unwrap();
        assert_eq!(raw, json!([1, 2]));
        let refused = client.run(&Quit {}).await.unwrap_err();
        assert!(
            matches!(&refused, QmpError::Refused { description, .. } if description == "no"),
            "{refused}"
        );
    };
    tokio::join!(play, ask);
}

#[tokio::test]
async fn an_unknown_event_or_message_disturbs_nothing() {
    let (client, mut events, mut peer) = connected(Options::default()).await;
    peer.send(r#"{"event":"FROM_QEMU_99","data":{"deep":{"er":[]}},"timestamp":"odd"}"#)
        .await;
    peer.send(r#"{"what":"ever"}"#).await;
    peer.send(r#"{"return":{},"id":4242}"#).await;
    peer.send("").await;
    let (reply, ()) = tokio::join!(
        client.execute("x", Value::Null),
        peer.answer("x", json!("still here"))
    );
    assert_eq!(reply.unwrap(), "still here");
    assert_eq!(events.recv().await.unwrap().name, "FROM_QEMU_99");
}

#[tokio::test]
async fn a_command_that_was_given_up_only_forgets_its_id() {
    let (client, _events, mut peer) = connected(quick()).await;
    let late = client.execute("slow", Value::Null).await.unwrap_err();
    assert!(matches!(late, QmpError::Deadline { .. }), "{late}");
    // Dropped before it was ever polled to its end.
    assert!(
        client
            .execute("dropped", Value::Null)
            .now_or_never()
            .is_none()
    );
    let slow = peer.command().await;
    let dropped = peer.command().await;
    assert_eq!(dropped["execute"], "dropped");
    for command in [&slow, &dropped] {
        peer.send(&json!({"return":"too late","id":command["id"]}).to_string())
            .await;
    }
    let (reply, ()) = tokio::join!(
        client.execute("next", Value::Null),
        peer.answer("next", json!("mine"))
    );
    assert_eq!(reply.unwrap(), "mine");
}

#[tokio::test]
async fn replies_may_come_in_another_order() {
    let (client, _events, mut peer) = connected(Options::default()).await;
    let play = async {
        let first = peer.command().await;
        let second = peer.command().await;
        for command in [second, first] {
            peer.send(&json!({"return":command["execute"],"id":command["id"]}).to_string())
                .await;
        }
    };
    let (a, b, ()) = tokio::join!(
        client.execute("a", Value::Null),
        client.execute("b", Value::Null),
        play
    );
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn a_closed_connection_wakes_every_waiter() {
    let (client, mut events, mut peer) = connected(Options::default()).await;
    let close = async {
        peer.command().await;
        peer.command().await;
        drop(peer);
    };
    let (a, b, ()) = tokio::join!(
        client.execute("a", Value::Null),
        client.execute("b", Value::Null),
        close
    );
    assert!(a.unwrap_err().is_closed());
    assert!(b.unwrap_err().is_closed());
    assert!(events.recv().await.is_none());
    client.closed().await;
    assert!(
        client
            .execute("c", Value::Null)
            .await
            .unwrap_err()
            .is_closed()
    );
}

#[tokio::test]
async fn a_line_without_end_and_a_line_that_is_no_json_end_the_connection() {
    for line in [
        format!(r#"{{"event":"{}"}}"#, "A".repeat(5000)),
        "\u{1b}[0m not QMP".into(),
    ] {
        let (client, mut events, mut peer) = connected(quick()).await;
        peer.send(&line).await;
        let reply = client.execute("a", Value::Null).await.unwrap_err();
        assert!(reply.is_closed(), "{reply}");
        assert!(events.recv().await.is_none());
    }
}

#[tokio::test]
async fn a_flood_of_events_does_not_hold_up_replies() {
    let (client, mut events, mut peer) = connected(quick()).await;
    for n in 0..100 {
        peer.send(&format!(r#"{{"event":"E{n}"}}"#)).await;
    }
    let (reply, ()) = tokio::join!(client.execute("a", Value::Null), peer.answer("a", json!(1)));
    assert_eq!(reply.unwrap(), 1);
    assert_eq!(events.recv().await.unwrap().name, "E0");
    assert_eq!(events.recv().await.unwrap().name, "E1");
    assert!(events.try_recv().is_err());
}

#[tokio::test]
async fn a_peer_that_reads_nothing_hits_the_deadline_and_holds_nothing() {
    let (client, _events, peer) = connected(quick()).await;
    let huge = json!("x".repeat(4 << 20));
    let err = client.execute("a", huge).await.unwrap_err();
    assert!(matches!(err, QmpError::Deadline { .. }), "{err}");
    drop(client);
    // The writer lets go of the socket although its line was never taken.
    let mut stream = peer.stream.into_inner().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let read = tokio::task::spawn_blocking(move || stream.read_to_end(&mut Vec::new()));
    assert!(read.await.unwrap().is_ok());
}

#[tokio::test]
async fn what_greets_wrongly_is_not_qemu() {
    for greeting in [
        "SSH-2.0-x",
        "{}",
        r#"{"QMP":{}}"#,
        r#"{"QMP":{"version":7}}"#,
        "",
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut theirs = theirs;
        theirs
            .write_all(format!("{greeting}\n").as_bytes())
            .await
            .unwrap();
        let err = Client::handshake(ours, quick()).await.unwrap_err();
        assert!(
            matches!(err, QmpError::Connect { .. }),
            "{greeting:?}: {err}"
        );
    }
    let (ours, _silent) = UnixStream::pair().unwrap();
    let err = Client::handshake(ours, quick()).await.unwrap_err();
    assert!(err.to_string().contains("no greeting"), "{err}");
    let (ours, gone) = UnixStream::pair().unwrap();
    drop(gone);
    assert!(Client::handshake(ours, quick()).await.is_err());
}

/// Reads one line and the descriptors that came with it.
fn receive_with_fds(stream: &std::os::unix::net::UnixStream) -> (Value, Vec<OwnedFd>) {
    let mut line = Vec::new();
    let mut fds = Vec::new();
    while !line.ends_with(b"\n") {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::empty(),
        )
        .unwrap();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        line.extend_from_slice(&bytes[..got.bytes]);
    }
    (serde_json::from_slice(&line).unwrap(), fds)
}

#[tokio::test]
async fn descriptors_travel_one_after_the_other() {
    let (client, _events, peer) = connected(Options::default()).await;
    let stream = peer.stream.into_inner().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let server = tokio::task::spawn_blocking(move || {
        let mut texts = Vec::new();
        for _ in 0..2 {
            let (command, mut fds) = receive_with_fds(&stream);
            assert_eq!(command["execute"], "getfd");
            assert_eq!(fds.len(), 1);
            let mut text = String::new();
            let mut file = std::fs::File::from(fds.remove(0));
            file.read_to_string(&mut text).unwrap();
            assert_eq!(command["arguments"]["fdname"], text);
            texts.push(text);
            // Time for the other one to overtake, if it could.
            std::thread::sleep(Duration::from_millis(50));
            let reply = json!({"return": {}, "id": command["id"]}).to_string() + "\n";
            (&stream).write_all(reply.as_bytes()).unwrap();
        }
        texts
    });
    let give = async |name: &str| {
        let (mut write, read) = std::os::unix::net::UnixStream::pair().unwrap();
        write.write_all(name.as_bytes()).unwrap();
        drop(write);
        client
            .run_with_fd(
                &GetFd {
                    fdname: name.into(),
                },
                OwnedFd::from(read),
            )
            .await
            .unwrap();
    };
    tokio::join!(give("one"), give("two"));
    assert_eq!(server.await.unwrap(), ["one", "two"]);
}

/// QEMU without a machine, on a socket that we bound, as pileus starts it.
#[tokio::test]
async fn the_real_qemu() {
    let Ok(found) = std::process::Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
    else {
        eprintln!("SKIPPED: the_real_qemu: no qemu-system-x86_64 on the PATH");
        return;
    };
    assert!(found.status.success());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let fd = rustix::io::dup(listener.as_fd()).unwrap();
    // dup clears close-on-exec, so QEMU inherits it under the same number.
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let mut qemu = std::process::Command::new("qemu-system-x86_64")
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-M",
            "none",
        ])
        .args([
            "-chardev",
            &format!("socket,id=q,fd={number},server=on,wait=off"),
        ])
        .args(["-mon", "chardev=q,mode=control"])
        .spawn()
        .unwrap();
    drop((fd, listener));

    let (client, _events) = Client::connect(&path, Options::default()).await.unwrap();
    assert!(client.version().major >= 8);
    let schema = client
        .execute("query-qmp-schema", Value::Null)
        .await
        .unwrap();
    assert!(schema.as_array().unwrap().len() > 100);
    let err = client.execute("no-such", Value::Null).await.unwrap_err();
    assert!(
        matches!(&err, QmpError::Refused { class, .. } if class == "CommandNotFound"),
        "{err}"
    );

    // A descriptor arrives and can be found again.
    let file = std::fs::File::open("/dev/null").unwrap();
    let add = AddFd {
        fdset_id: Some(9),
        opaque: Some("null".into()),
    };
    let added = client.run_with_fd(&add, file.into()).await.unwrap();
    assert_eq!(added.fdset_id, 9);
    let sets = client.execute("query-fdsets", Value::Null).await.unwrap();
    assert_eq!(sets[0]["fds"][0]["opaque"], "null");

    // We go away and come back.
    drop(client);
    let (client, mut events) = Client::connect(&path, Options::default()).await.unwrap();
    match client.run(&Quit {}).await {
        Ok(_) => (),
        Err(err) => assert!(err.is_closed(), "{err}"),
    }
    while let Some(event) = events.recv().await {
        assert_eq!(event.name, "SHUTDOWN");
    }
    assert!(qemu.wait().unwrap().success());
}
