//! What is asked of a clone's agent, and what of its answers is believed.

use super::*;

fn spec() -> IdentitySpec {
    IdentitySpec {
        instance: "6f9b0a0e-3c3f-4d27-9d1e-000000000001".into(),
        hostname: "keen-otter".into(),
        machine_id: "0".repeat(32),
        entropy: vec![0xa5; 64],
        time: 1.5,
        keys: InstanceKeys::generate().unwrap(),
        authorized: vec!["ssh-ed25519 AAAA you".into()],
        timezone: None,
        nic: Some(CloneNic {
            mac: "52:54:00:00:00:01".parse().unwrap(),
            address: Ipv4Addr::new(10, 1, 2, 3),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 1, 2, 1),
            dns: Ipv4Addr::new(10, 1, 2, 1),
        }),
        grow: false,
        cloud_init: false,
        standby: false,
        mode: CloneMode::Warm,
    }
}

#[test]
fn the_request_says_it_all_and_the_log_little() {
    let spec = spec();
    let request = spec.request().unwrap();
    assert_eq!(request["nic"]["address"], "10.1.2.3/24");
    assert_eq!(request["nic"]["mac"], "52:54:00:00:00:01");
    assert_eq!(request["entropy"], "a5".repeat(64));
    assert_eq!(request["authorized"].as_array().unwrap().len(), 2);
    assert_eq!(request["mode"], "warm");
    assert!(request.to_string().len() < super::super::wire::MAX_LINE / 2);
    let shown = format!("{spec:?}");
    assert!(
        !shown.contains("PRIVATE") && !shown.contains("165"),
        "{shown}"
    );
}

#[test]
fn answers_are_bounded_and_cleaned() {
    let answer = |value: Value| value.as_object().unwrap().clone();
    let good = answer(json!({"steps": [["ids\u{1b}[2J", 3], ["keys", 4]]}));
    assert_eq!(
        steps(&good).unwrap(),
        [("ids".to_owned(), 3), ("keys".to_owned(), 4)]
    );
    for bad in [
        json!({}),
        json!({"steps": 1}),
        json!({"steps": [["a", -1]]}),
        json!({"steps": [["a"]]}),
    ] {
        assert!(steps(&answer(bad)).is_none());
    }
    let many: Map<String, Value> = (0..500)
        .map(|n| (n.to_string(), json!(vec!["v"; 500])))
        .collect();
    let all = items(&answer(json!({ "items": many }))).unwrap();
    assert_eq!((all.len(), all[0].1.len()), (MAX_ITEMS, MAX_VALUES));
    for bad in [
        json!({"items": []}),
        json!({"items": {"a": 1}}),
        json!({"items": {"a": [1]}}),
    ] {
        assert!(items(&answer(bad)).is_none());
    }
}

/// The guest's side, as far as it can be tried here: values in texts, lists of keys and pickles.
#[test]
fn old_values_become_new_ones_wherever_they_lie() {
    use std::io::Write;
    let script = r##"
import json, pickle, sys
parts = json.load(sys.stdin)
names = {"__name__": "agent", "__file__": "/x/agent.py"}
exec(compile(parts["agent"], "agent.py", "exec"), names)
exec(compile(parts["clone"], "clone.py", "exec"), names)
class Settings: pass
old = names["Old"].__new__(names["Old"])
old.instance, old.hostname = "pileus-template-instance", "pileus-template"
old.host_key = "-----BEGIN-----\nAAAAAAAAAAAAAAAAAAAA\nBBBBBBBBBBBBBBBB\n-----END-----\n"
old.host_public, old.client = "ssh-ed25519 OLDHOST h", ["ssh-ed25519 OLDCLIENT c"]
request = {"authorized": ["ssh-ed25519 ONE a", "ssh-ed25519 TWO b"], "hostname": "otter",
           "host_public": "ssh-ed25519 NEWHOST h", "mode": "warm",
           "host_key": old.host_key.replace("A", "C").replace("BBBB", "DDDD")}
change = names["Change"](old, request, {"instance": "i-2"})
text = json.dumps({"key": old.host_key, "id": old.instance, "local-hostname": old.hostname})
new = json.loads(change.text(text))
assert new["id"] == "i-2" and new["local-hostname"] == "otter", new
assert "CCCCCCCC" in new["key"] and "AAAA" not in new["key"] and "BBBB" not in new["key"], new
keys = change.keys("# mine\nssh-rsa KEPT\ncommand=\"x\" ssh-ed25519 OLDCLIENT c\n")
assert keys == "# mine\nssh-rsa KEPT\ncommand=\"x\" ssh-ed25519 ONE a\ncommand=\"x\" ssh-ed25519 TWO b\n", keys
value = {"raw": "x" * 300 + old.instance + "y" * 70000, "id": old.instance, "again": [old.instance, 7, b"z"]}
for protocol in (2, 4, 5):
    parts = names["pickle_parts"](pickle.dumps(value, protocol), old.pattern())
    back = pickle.loads(names["pickle_join"](parts, change.text))
    assert back == {"raw": "x" * 300 + "i-2" + "y" * 70000, "id": "i-2", "again": ["i-2", 7, b"z"]}, protocol
"##;
    let Ok(mut python) = std::process::Command::new("python3")
        .args(["-I", "-S", "-c", script])
        .stdin(std::process::Stdio::piped())
        .spawn()
    else {
        eprintln!("SKIPPED: python3 can't be run");
        return;
    };
    let parts = json!({
        "agent": super::super::seed::AGENT_PY,
        "clone": super::super::seed::CLONE_PY,
    });
    let mut stdin = python.stdin.take().unwrap();
    stdin.write_all(parts.to_string().as_bytes()).unwrap();
    drop(stdin);
    assert!(python.wait().unwrap().success());
}

/// A stand-in for sshd that stops to listen for a while when it is told to read its keys.
#[test]
fn an_sshd_that_reads_its_keys_anew_is_waited_for_until_it_listens() {
    super::super::in_agent::in_agent(
        r##"
import os, signal, socket, subprocess, time
exec(compile(clone, "clone.py", "exec"), names)
server = r"""
import signal, socket, sys, time
def listen():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    s.listen(1)
    return s
s = listen()
sys.argv[1:] = [str(s.getsockname()[1])]
def again(*_):
    global s
    s.close()
    time.sleep(0.4)
    s = listen()
signal.signal(signal.SIGHUP, again)
print(sys.argv[1], flush=True)
while True: signal.pause()
"""
child = subprocess.Popen([sys.executable, "-I", "-c", server], stdout=subprocess.PIPE)
try:
    port = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGSTOP)
    login = names["Login"](child.pid)
    assert len(login.before) == 1, login.before
    began = time.monotonic()
    login.renew()
    login.wait()
    assert 0.3 < time.monotonic() - began < 9, time.monotonic() - began
    socket.create_connection(("127.0.0.1", port), 1).close()
    # One that PID 1 gave its socket never closes it; one that does not come back is not waited for long.
    began = time.monotonic()
    login = names["Login"](child.pid)
    login.wait(0.1)
    assert 0.1 < time.monotonic() - began < 5
    pids = names["open_files"]
    names["open_files"] = lambda pid: pids(child.pid)
    names["Login"](child.pid).wait(60)
    names["open_files"] = pids
    child.kill()
    child.wait()
    login.wait(60)
    # None at all.
    names["Login"](0).renew()
    names["Login"](0).wait(60)
    assert time.monotonic() - began < 30
finally:
    child.kill()
"##,
    );
}
