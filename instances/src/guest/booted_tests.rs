//! A copy of another guest's disk becomes somebody: the agent's code on a folder that looks like the disk.

use crate::guest::in_agent::in_agent;

/// Lays `names` over a folder, and makes in it what a disk has: instance `instance-a`, host name `old`.
const DISK: &str = r##"
import os, shutil, tempfile
root = tempfile.mkdtemp()
def below(text):
    for top in ("etc", "var", "run", "boot", "efi", "root", "home"):
        text = text.replace('"/%s/' % top, '"%s/%s/' % (root, top))
    return text
names = {"__name__": "agent", "__file__": "/x/agent.py"}
exec(compile(below(agent), "agent.py", "exec"), names)
exec(compile(below(clone), "clone.py", "exec"), names)
def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    with open(root + path, "w") as file:
        file.write(text)
    os.chmod(root + path, mode)
def read(path):
    with open(root + path) as file:
        return file.read()
def there(path):
    return os.path.lexists(root + path)
A, B = "ssh-ed25519 AAAAold pileus", "ssh-ed25519 AAAAnew pileus"
KEY = "-----BEGIN-----\n%s\n%s\n-----END-----\n"
key_a, key_b = KEY % ("A" * 30, "B" * 20), KEY % ("C" * 30, "D" * 20)
id_a, id_b = "a" * 32, "b" * 32
lib = "/var/lib/cloud"
for at, text in {"/etc/machine-id": id_a, "/var/lib/dbus/machine-id": id_a, "/etc/hosts": "127.0.1.1 old\n",
                 "/var/log/journal/%s/system.journal" % id_a: "", "/var/log/journal/other/keep": "",
                 "/var/lib/systemd/random-seed": "seed", "/var/lib/systemd/credential.secret": "secret",
                 "/etc/iscsi/initiatorname.iscsi": "; a comment\nInitiatorName=iqn.1993-08.org.debian:01:abc123\n",
                 "/home/ubuntu/.ssh/authorized_keys": "ssh-rsa MINE me\n" + A + "\n",
                 "/root/.ssh/authorized_keys": "command=\"no\" " + A + "\n",
                 "/etc/ssh/ssh_host_ed25519_key": key_a, "/etc/ssh/ssh_host_ed25519_key.pub": "ssh-ed25519 HOSTA h\n",
                 "/etc/ssh/ssh_host_rsa_key": "x", "/run/x": "", "/etc/netplan/50-cloud-init.yaml": "52:54:00:00:00:0a",
                 lib + "/instances/instance-a/vendor-data.txt": key_a + A, lib + "/data/instance-id": "instance-a\n",
                 lib + "/data/previous-hostname": "old\n"}.items():
    write(at, text, 0o600 if "authorized" in at else 0o644)
os.symlink(root + lib + "/instances/instance-a", root + lib + "/instance")
def identity_files(etc, instance, key, client):
    write(etc + "/agent.json", json.dumps({"instance": instance, "uid": 1000, "user": "ubuntu"}, sort_keys=True,
                                          separators=(",", ":")) + "\n", 0o600)
    write(etc + "/ssh_host_ed25519_key", key, 0o600)
    write(etc + "/authorized_keys", client + "\n")
kernel, ran, ready = ["old"], [], [""]
class Socket:
    gethostname = staticmethod(lambda: kernel[0])
    sethostname = staticmethod(lambda n: kernel.__setitem__(0, n))
class Time:
    CLOCK_REALTIME = 0
    clock_settime = staticmethod(lambda *a: None)
    monotonic = staticmethod(lambda: 0.0)
class Network:
    ready = staticmethod(lambda nic: ready[0])
    def wait(self, nic, steps): ran.append("wait")
class Login:
    def __init__(self, pid): assert pid == 7
    def renew(self): ran.append("HUP")
    def wait(self): ran.append("listens")
names.update(socket=Socket, time=Time, Network=Network, Login=Login, reseed=lambda b: None, pids_of=lambda u: [1],
             main_pid=lambda u: 7 if u == "ssh.service" else 0,
             restart_all=lambda s, n: ran.append("restart"), flush_seed=lambda: None)
class Agent:
    def __init__(self):
        self.paths = type("P", (), {"etc": root + "/etc/pileus", "cloud": root + "/run/cloud-init"})
        self.settings, self.sent = names["read_json"](root + "/etc/pileus/agent.json"), []
    def send(self, message): self.sent.append(message["type"])
    def hello(self): return {"type": "hello"}
request = {"mode": "booted", "instance": "instance-b", "hostname": "new", "machine_id": id_b, "entropy": "ab" * 64,
           "time": 1e9, "host_key": key_b, "host_public": "ssh-ed25519 HOSTB h", "authorized": [B], "user": "ubuntu",
           "uid": 1000, "nic": {"mac": "52:54:00:00:00:0B", "address": "10.0.0.2/24"}}
def become():
    del ran[:]
    me = Agent()
    answer, after = names["REQUESTS"]["identify"](me, json.loads(json.dumps(request)))
    assert me.sent == ["hello", "cloud-init"], me.sent
    assert me.settings["instance"] == "instance-b"
    return [name for name, _ in answer["steps"]]
def nothing_old():
    for folder, _, files in os.walk(root):
        assert "instance-a" not in folder and id_a not in folder, folder
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                data = file.read().decode("utf-8", "replace")
            for mark in ("AAAAold", "A" * 30, "B" * 20, id_a, "HOSTA", "abc123", "secret"):
                assert mark not in data, (path, mark)
    assert kernel == ["new"] and read("/etc/hostname") == "new\n" and read("/etc/hosts") == "127.0.1.1 new\n"
    assert read("/etc/machine-id") == read("/var/lib/dbus/machine-id") == id_b + "\n"
    assert read("/home/ubuntu/.ssh/authorized_keys") == "ssh-rsa MINE me\n" + B + "\n"
    assert read("/root/.ssh/authorized_keys") == "command=\"no\" " + B + "\n", read("/root/.ssh/authorized_keys")
    assert os.stat(root + "/home/ubuntu/.ssh/authorized_keys").st_mode & 0o777 == 0o600
    assert "a comment" in read("/etc/iscsi/initiatorname.iscsi")
    assert len(read("/etc/iscsi/initiatorname.iscsi").split(":")[-1].strip()) == 12
    assert not there("/var/lib/systemd/credential.secret") and not there("/etc/ssh/ssh_host_rsa_key")
    assert not there("/etc/pileus/before") and there("/var/log/journal/other/keep")
    assert os.stat(root + "/var/lib/systemd/random-seed").st_size == 512
    assert read("/run/pileus/generation").startswith("instance-b " + id_b)
"##;

fn on_a_disk(script: &str) {
    let body: String = script.lines().map(|line| format!("    {line}\n")).collect();
    in_agent(&format!(
        "{DISK}\ntry:\n{body}\nfinally:\n    shutil.rmtree(root)\n"
    ));
}

/// The usual way: the boot has done the most of it already.
#[test]
fn what_the_boot_left_is_made_new() {
    on_a_disk(
        r#"
identity_files("/etc/pileus/before", "instance-a", key_a, A)
identity_files("/etc/pileus", "instance-b", key_b, B)
kernel[0] = "new"
names["set_hostname"]("old", "new")
write("/etc/machine-id", id_b + "\n")
shutil.rmtree(root + "/etc/ssh")
write("/etc/ssh/ssh_host_ed25519_key", key_b)
write(lib + "/instances/instance-b/obj", "")
os.unlink(root + lib + "/instance")
os.symlink(root + lib + "/instances/instance-b", root + lib + "/instance")
inode = os.stat(root + "/etc/pileus/agent.json").st_ino
# cloud-init has added the new key beside the old one.
write("/home/ubuntu/.ssh/authorized_keys", "ssh-rsa MINE me\n" + A + "\n" + B + "\n", 0o600)
become()
assert ran == ["wait"], ran
nothing_old()
assert os.stat(root + "/etc/pileus/agent.json").st_ino == inode
# Again, as after a break: nothing more changes.
home = os.stat(root + "/home/ubuntu/.ssh/authorized_keys").st_ino
become()
assert ran == ["wait"] and os.stat(root + "/home/ubuntu/.ssh/authorized_keys").st_ino == home
nothing_old()
"#,
    );
}

/// Firmware tells no machine id, cloud-init is switched off: all of it is done here.
#[test]
fn what_no_boot_did_is_done_as_well() {
    on_a_disk(
        r#"
identity_files("/etc/pileus", "instance-a", key_a, A)
ready[0] = "address"
become()
assert ran == ["restart", "wait"], ran
nothing_old()
assert os.readlink(root + lib + "/instance").endswith("/instance-b") and there(lib + "/instances/instance-b/vendor-data.txt")
assert read(lib + "/data/instance-id") == "instance-b\n"
assert "52:54:00:00:00:0b" in read("/etc/netplan/50-cloud-init.yaml")
"#,
    );
}

/// Only the keys differ: the system's own sshd reads them again, and nobody else is disturbed.
#[test]
fn a_hook_that_fails_leaves_it_to_be_done_again() {
    on_a_disk(
        r#"
identity_files("/etc/pileus/before", "instance-a", key_a, A)
identity_files("/etc/pileus", "instance-b", key_b, B)
write("/etc/machine-id", id_b + "\n")
write("/etc/pileus/on-clone.d/10-check", "\x23!/bin/sh\necho \"$PILEUS_MODE $PILEUS_HOSTNAME\" >&2\nexit 3\n", 0o755)
try:
    become()
    assert False
except RuntimeError as err:
    assert "ended with 3: booted new" in str(err), err
assert ran == ["HUP"] and there("/etc/pileus/before"), ran
os.unlink(root + "/etc/pileus/on-clone.d/10-check")
become()
assert ran == ["wait"] and not there("/etc/pileus/before"), ran
assert not there(lib + "/instances/instance-a")
"#,
    );
}
