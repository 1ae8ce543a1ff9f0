//! What is asked of a guest that lives, and what its agent makes of it.

use super::*;
use crate::guest::in_agent::in_agent;
use crate::guest::keys::InstanceKeys;
use crate::qemu::Paths;
use std::net::Ipv4Addr;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

const HELLO: &str = r#"{"type":"hello","proto":1,"agent":"1","boot_id":"b","hostname":"h","kernel":"k","machine":"m","python":"3","os":"o"}"#;
const SOON: Duration = Duration::from_secs(10);

/// A guest whose agent answers each request as the function says; the requests come out.
struct Played {
    _dir: tempfile::TempDir,
    guest: Guest,
    asked: tokio::sync::mpsc::UnboundedReceiver<Value>,
}

fn played(hello: bool, answer: fn(&Value) -> Value) -> Played {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(dir.path(), dir.path());
    let port = UnixListener::bind(paths.agent()).unwrap();
    let keys = InstanceKeys::generate().unwrap();
    let guest = Guest::connect(&paths, dir.path(), keys, Ipv4Addr::LOCALHOST);
    let (asked_in, asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (from, mut to) = port.accept().await.unwrap().0.into_split();
        if hello {
            to.write_all(format!("{HELLO}\n").as_bytes()).await.unwrap();
        }
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let Ok(request) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            if request["do"] == "hello" {
                continue;
            }
            let mut reply = answer(&request);
            reply["type"] = "reply".into();
            reply["id"] = request["id"].clone();
            asked_in.send(request).unwrap();
            to.write_all(format!("{reply}\n").as_bytes()).await.unwrap();
        }
    });
    Played {
        _dir: dir,
        guest,
        asked,
    }
}

#[tokio::test]
async fn a_resumed_guest_learns_the_time_and_gets_randomness() {
    let mut played = played(true, |_| json!({"ok": true}));
    played.guest.resumed(SOON).await.unwrap();
    let asked = played.asked.recv().await.unwrap();
    assert_eq!(asked["do"], "resumed");
    assert_eq!(asked["entropy"].as_str().unwrap().len(), 128);
    let away = (asked["time"].as_f64().unwrap() - warm::now()).abs();
    assert!(away < 5.0, "{away} s away");
    played.guest.resumed(SOON).await.unwrap();
    let again = played.asked.recv().await.unwrap();
    assert_ne!(asked["entropy"], again["entropy"]);

    let name = "keen-otter".parse().unwrap();
    played.guest.rename(&name, SOON).await.unwrap();
    assert_eq!(played.asked.recv().await.unwrap()["hostname"], "keen-otter");
    played.guest.wall("soon").await.unwrap();
    assert_eq!(played.asked.recv().await.unwrap()["text"], "soon");
    for (told, name) in [
        (played.guest.grow(SOON).await, "grow"),
        (played.guest.sync(SOON).await, "sync"),
    ] {
        told.unwrap();
        assert_eq!(played.asked.recv().await.unwrap()["do"], name);
    }
}

#[tokio::test]
async fn an_older_agent_learns_the_time_only() {
    let mut played = played(true, |request| match request["do"].as_str() {
        Some("set-time") => json!({"ok": true}),
        _ => json!({"ok": false, "error": "unknown request resumed"}),
    });
    played.guest.resumed(SOON).await.unwrap();
    assert_eq!(played.asked.recv().await.unwrap()["do"], "resumed");
    let asked = played.asked.recv().await.unwrap();
    assert_eq!(asked["do"], "set-time");
    assert!(asked["unix"].as_f64().unwrap() > 1e9);
    // What else it does not know is an error.
    let err = played.guest.grow(SOON).await.unwrap_err();
    assert_eq!(err.code, Code::ExecFailed);
}

#[tokio::test]
async fn a_guest_without_an_agent_costs_the_bound_and_no_more() {
    let played = played(false, |_| json!({"ok": true}));
    let began = Instant::now();
    let bound = Duration::from_millis(200);
    let err = played.guest.resumed(bound).await.unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    assert!(began.elapsed() < SOON / 2);
}

#[test]
fn after_a_pause_old_connections_end_and_new_ones_stay() {
    in_agent(
        r#"
done, clock = [], [100.0]
class Time:
    CLOCK_REALTIME = 0
    time = staticmethod(lambda: clock[0])
    sleep = staticmethod(lambda seconds: None)
    clock_settime = staticmethod(lambda which, now: clock.__setitem__(0, now))
files = {"/run/pileus/generation": "i-1 m-1\n"}
names.update(time=Time, prefer=lambda *a: None, reseed=lambda b: done.append(("seed", len(b))), report=lambda: {"type": "report"},
             put=lambda p, t, *a: files.__setitem__(p, t), read_text=lambda p, *a: files.get(p, ""),
             run=lambda argv, **k: done.append(tuple(argv)), pids_of=lambda u: [5] if "networkd" in u else [],
             addresses=lambda: [{"name": "eth0", "addresses": ["x"]}, {"name": "eth1", "addresses": []}])
class Path:
    exists = staticmethod(lambda p: p in files)
class Os:
    path, kill = Path, None
    getpid = staticmethod(lambda: 1)
    urandom = staticmethod(lambda n: b"r" * n)
names["os"] = Os
class Ssh:
    def __init__(self, visit): self.visit = visit
    def hang_up(self): done.append(("end", self.visit))
class Agent:
    visits, ssh = 3, {"a": Ssh(2), "b": Ssh(3)}
    hello = staticmethod(lambda: {"type": "hello"})
    send = staticmethod(lambda m: done.append(m["type"]))
answer, after = names["LIFE"]["resumed"](Agent, {"entropy": "ab" * 64, "time": 4000})
assert answer == {"passed": 3900.0} and clock == [4000.0], (answer, clock)
assert done == [("seed", 64), ("end", 2), "hello"], done
assert files["/run/pileus/generation"].split()[:2] == ["i-1", "m-1"]
assert len(files["/run/pileus/generation"].split()) == 3
del done[:]
after()
assert done == ["report", ("networkctl", "renew", "eth0")], done
# A short one asks nobody for anything.
answer, after = names["LIFE"]["resumed"](Agent, {"entropy": "ab" * 64, "time": 4010})
del done[:]
after()
assert done == ["report"], done
"#,
    );
}

#[test]
fn another_name_is_written_wherever_the_next_boot_looks() {
    in_agent(
        r#"
lib = "/var/lib/cloud/data/"
files = {"/etc/hosts": "127.0.1.1 old.example old\n10.0.0.1 old-one xold my.old\n",
         lib + "previous-hostname": "old\n", lib + "set-hostname": '{"fqdn": "old.example", "hostname": "old"}'}
kernel = ["old"]
class Socket:
    gethostname = staticmethod(lambda: kernel[0])
    sethostname = staticmethod(lambda n: kernel.__setitem__(0, n))
names.update(socket=Socket, put=lambda p, t, *a: files.__setitem__(p, t), flush_seed=lambda: None,
             read_text=lambda p, *a: files.get(p, ""))
names["os"] = type("Os", (), {"sync": staticmethod(lambda: None)})
class Agent:
    sent = []
    hello = staticmethod(lambda: {"hostname": kernel[0]})
    send = sent.append
names["LIFE"]["rename"](Agent, {"hostname": "new-1"})
assert kernel == ["new-1"] and Agent.sent == [{"hostname": "new-1"}]
assert files["/etc/hostname"] == "new-1\n"
assert files["/etc/hosts"] == "127.0.1.1 new-1.example new-1\n10.0.0.1 old-one xold my.old\n", files["/etc/hosts"]
assert files[lib + "previous-hostname"] == "new-1\n"
assert json.loads(files[lib + "set-hostname"]) == {"fqdn": "new-1.example", "hostname": "new-1"}
for bad in ("", "-x", "a b", "x\n", "a" * 65):
    try:
        names["LIFE"]["rename"](Agent, {"hostname": bad})
        assert False, bad
    except RuntimeError:
        pass
"#,
    );
}

#[test]
fn the_root_grows_whatever_it_is() {
    in_agent(
        r#"
mounts, ran, answers = [""], [], []
class Done:
    def __init__(self, code, text): self.returncode, self.stdout = code, text
class Sub:
    DEVNULL = PIPE = STDOUT = None
    @staticmethod
    def run(argv, **_):
        ran.append(" ".join(argv))
        return Done(*answers.pop(0))
names.update(read_text=lambda p, *a: mounts[0], run=lambda argv: ran.append(" ".join(argv)), subprocess=Sub)
class T: sleep = staticmethod(lambda s: None)
names["time"] = T
def grown(mount, *told):
    mounts[0], answers[:], ran[:] = "proc /proc proc rw 0 0\n" + mount, told, []
    names["grow_root"]()
    return ran
changed, nothing = (0, b"CHANGED: x"), (1, b"NOCHANGE: x")
assert grown("/dev/vda1 / ext4 rw 0 0", changed) == ["growpart /dev/vda 1", "resize2fs /dev/vda1"], ran
assert grown("/dev/vda / ext4 rw 0 0") == ["resize2fs /dev/vda"], ran
assert grown("/dev/vda2 / xfs rw 0 0", nothing, changed)[1:] == ["growpart /dev/vda 2", "xfs_growfs /"], ran
assert grown("/dev/vda2 / btrfs rw 0 0", nothing, nothing, nothing)[-1] == "btrfs filesystem resize max /", ran
for mount, told in (("/dev/mapper/x / ext4 rw 0 0", ()), ("", ()), ("/dev/vda1 / ext4 rw 0 0", ((2, b"FAILED: no"),))):
    try:
        grown(mount, *told)
        assert False, mount
    except RuntimeError:
        pass
"#,
    );
}

#[test]
fn a_message_reaches_terminals_that_want_one() {
    in_agent(
        r#"
import os, shutil, tempfile
folder = tempfile.mkdtemp()
try:
    master, slave = os.openpty()
    shut_master, shut = os.openpty()
    os.fchmod(slave, 0o620)
    os.fchmod(shut, 0o600)
    os.symlink(os.ttyname(slave), folder + "/0")
    os.symlink(os.ttyname(shut), folder + "/1")
    open(folder + "/ptmx", "w").close()
    assert names["tell_terminals"]("down\nin a minute", ((folder, r"\d+"), (folder + "/none", "x"))) == 1
    seen = os.read(master, 4096)
    assert b"down\r" in seen and b"in a minute\r" in seen, seen
    os.set_blocking(shut_master, False)
    try:
        assert not os.read(shut_master, 4096)
    except BlockingIOError:
        pass
finally:
    shutil.rmtree(folder)
"#,
    );
}
