#!/usr/bin/env python3
"""pileus guest agent: the guest's end of pileus's guest channel.

Runs as root in the guest, needs nothing but Python's standard library (3.6 or newer), and talks JSON
lines over one virtio-serial port. It tells how far the boot and cloud-init are and what they really
ended with, reports addresses and load, and on request starts `sshd -i` on a second port, so that the
host gets a shell without any guest network. The host's end is guest/agent.rs of pileus.

Rules: never block the boot, never spin when the host is away, never trust that a line is whole.
"""

import argparse
import errno
import fcntl
import grp
import json
import os
import pwd
import queue
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

PROTO = 1
VERSION = "1"
AGENT_PORT = "pileus.agent.0"
SSH_PORT = re.compile(r"^pileus\.ssh\.[0-9]$")
MAX_LINE = 64 * 1024
# While cloud-init works its files' times are looked at this often; afterwards never again.
BOOT_TICK = 0.1
# Without SIGIO (not a virtio port) a host that comes back is noticed after this time.
AWAY_TICK = 1.0


def read_text(path, limit=65536):
    try:
        with open(path, "rb") as f:
            return f.read(limit).decode("utf-8", "replace")
    except (OSError, IOError):
        return ""


def read_json(path):
    try:
        value = json.loads(read_text(path, 1 << 20))
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


def short(text, limit=1000):
    text = str(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def log(*words):
    print("pileus-agent:", *words, file=sys.stderr, flush=True)


class Paths:
    """Where things lie; a test gives other roots."""

    def __init__(self, args):
        self.ports = args.ports
        self.etc = args.etc
        self.cloud = args.cloud
        self.sshd = args.sshd

    def find_port(self, name):
        """The device of a port: udev's link, or by sysfs when udev has not run yet."""
        if self.ports:
            path = os.path.join(self.ports, name)
            return path if os.path.exists(path) else None
        path = "/dev/virtio-ports/" + name
        if os.path.exists(path):
            return path
        base = "/sys/class/virtio-ports"
        try:
            for entry in os.listdir(base):
                if read_text(os.path.join(base, entry, "name")).strip() == name:
                    path = "/dev/" + entry
                    if os.path.exists(path):
                        return path
        except OSError:
            pass
        return None


class Port:
    """A virtio-serial port, or a Unix socket in tests. A port has no connections: whether the host
    is there shows only as POLLHUP, and the descriptor stays good when the host goes away."""

    def __init__(self, paths, name):
        self.paths = paths
        self.name = name
        self.fd = -1
        self.sock = None
        self.torn = False
        self.lock = threading.Lock()

    def open(self, notify=False):
        """Opens the port if it is there; True if it is open."""
        if self.fd >= 0:
            return True
        path = self.paths.find_port(self.name)
        if not path:
            return False
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.sock.connect(path)
                self.sock.setblocking(False)
                self.fd = self.sock.fileno()
            else:
                self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as err:
            log("cannot open", path, err)
            self.close()
            return False
        if notify and self.sock is None:
            try:
                fcntl.fcntl(self.fd, fcntl.F_SETOWN, os.getpid())
                flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
                fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_ASYNC)
            except OSError:
                pass
        return True

    def close(self):
        if self.sock is not None:
            self.sock.close()
        elif self.fd >= 0:
            os.close(self.fd)
        self.sock = None
        self.fd = -1

    def gone(self):
        """The host left. A socket has to be made anew; a port waits for the next host."""
        if self.sock is not None:
            self.close()

    def connected(self):
        if self.fd < 0:
            return False
        poller = select.poll()
        poller.register(self.fd, select.POLLIN | select.POLLOUT)
        events = dict(poller.poll(0)).get(self.fd, 0)
        return not events & (select.POLLHUP | select.POLLERR | select.POLLNVAL)

    def read(self):
        """Bytes, b"" when the host is away, None when there is nothing now."""
        try:
            return os.read(self.fd, 65536)
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EINTR):
                return None
            return b""

    def write(self, data, timeout=5.0):
        """Writes all or gives up (host away, or not reading); a torn line is ended first."""
        with self.lock:
            if self.fd < 0:
                return False
            if self.torn:
                data = b"\n" + data
            deadline = time.monotonic() + timeout
            view = memoryview(data)
            started = False
            while view:
                try:
                    count = os.write(self.fd, view[:32768])
                    view = view[count:]
                    started = started or count > 0
                    continue
                except OSError as err:
                    if err.errno not in (errno.EAGAIN, errno.EINTR):
                        break
                left = deadline - time.monotonic()
                if left <= 0 or not self.connected():
                    break
                poller = select.poll()
                poller.register(self.fd, select.POLLOUT)
                poller.poll(min(left, 0.5) * 1000)
            self.torn = started and bool(view) or (self.torn and not started)
            return not view


# ---- what the guest is and how it does -----------------------------------------------------------


def os_release():
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        for line in read_text(path).splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.split("=", 1)[1].strip().strip("\"'")
    return ""


def version_key(name):
    """Orders like `sort -V` does for kernel names: numbers by value."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.findall(r"\d+|[^\d]+", name)]


def disk_kernel(boot="/boot"):
    """The release of the kernel that the disk's own boot loader would start."""
    try:
        found = [
            n[len("vmlinuz-"):]
            for n in os.listdir(boot)
            if n.startswith("vmlinuz-") and "rescue" not in n and not n.endswith((".old", ".bak"))
        ]
    except OSError:
        found = []
    if found:
        return max(found, key=version_key)
    for link in ("/vmlinuz", "/boot/vmlinuz"):
        try:
            name = os.path.basename(os.readlink(link))
        except OSError:
            continue
        if name.startswith("vmlinuz-"):
            return name[len("vmlinuz-"):]
    return ""


def kernel_report():
    running = os.uname().release
    disk = disk_kernel()
    return {"running": running, "disk": disk, "current": not disk or disk == running}


RTM_GETADDR, RTM_NEWADDR, NLMSG_DONE, NLMSG_ERROR = 22, 20, 3, 2
RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x10, 0x100


def addresses():
    """[{name, mac, addresses: [ip/prefix]}] of every interface but lo, asked from the kernel."""
    links = {}
    try:
        pairs = socket.if_nameindex()
    except OSError:
        pairs = []
    for index, name in pairs:
        if name != "lo":
            mac = read_text("/sys/class/net/%s/address" % name).strip()
            links[index] = {"name": name, "mac": mac, "addresses": []}
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    except OSError:
        return list(links.values())
    try:
        sock.settimeout(2)
        sock.send(struct.pack("=IHHIIBBBBi", 24, RTM_GETADDR, 0x301, 1, 0, 0, 0, 0, 0, 0))
        done = False
        while not done:
            data = sock.recv(65536)
            at = 0
            while at + 16 <= len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                if kind in (NLMSG_DONE, NLMSG_ERROR) or size < 16:
                    done = True
                    break
                if kind == RTM_NEWADDR:
                    add_address(links, data[at + 16: at + size])
                at += (size + 3) & ~3
    except OSError:
        pass
    finally:
        sock.close()
    out = [links[i] for i in sorted(links)][:64]
    for link in out:
        link["addresses"] = link["addresses"][:32]
    return out


def add_address(links, body):
    family, prefix, _flags, scope, index = struct.unpack_from("=BBBBI", body)
    if index not in links or scope == 253:
        return
    at, best = 8, None
    while at + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, at)
        if size < 4:
            break
        # IFA_LOCAL (2) is the own address where IFA_ADDRESS (1) is a peer's.
        if kind in (1, 2) and (best is None or kind == 2):
            best = body[at + 4: at + size]
        at += (size + 3) & ~3
    if best:
        try:
            text = socket.inet_ntop(family, best)
        except (ValueError, OSError):
            return
        links[index]["addresses"].append("%s/%d" % (text, prefix))


def address_watch():
    """A netlink socket that becomes readable when an address changes."""
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        sock.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
        sock.setblocking(False)
        return sock
    except OSError:
        return None


def memory():
    values = {}
    for line in read_text("/proc/meminfo").splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            values[words[0]] = int(words[1]) * 1024
    total = values.get("MemTotal", 0)
    return {"total": total, "used": max(0, total - values.get("MemAvailable", 0))}


def report():
    try:
        disk = os.statvfs("/")
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bfree * disk.f_frsize
    except OSError:
        size = free = 0
    try:
        uptime = float(read_text("/proc/uptime").split()[0])
    except (ValueError, IndexError):
        uptime = 0.0
    try:
        load = [round(x, 2) for x in os.getloadavg()]
    except OSError:
        load = []
    return {
        "type": "report",
        "interfaces": addresses(),
        "load": load,
        "memory": memory(),
        "disk": {"total": size, "used": size - free},
        "cpus": os.cpu_count() or 1,
        "uptime": uptime,
        "kernel": kernel_report(),
        "time": time.time(),
    }


# ---- cloud-init ----------------------------------------------------------------------------------

STAGES = ("init-local", "init", "modules-config", "modules-final")


def cloud_init_state(folder):
    """What cloud-init says of itself in status.json and result.json, as one message."""
    message = {"type": "cloud-init", "state": "not-started", "stage": None, "stages": {},
               "errors": [], "recoverable": [], "datasource": ""}
    if os.path.exists(os.path.join(folder, "disabled")):
        message["state"] = "disabled"
        return message
    status = read_json(os.path.join(folder, "status.json")).get("v1")
    if not isinstance(status, dict):
        return message
    message["state"] = "running"
    message["stage"] = short(status.get("stage") or "", 64) or None
    message["datasource"] = short(status.get("datasource") or "", 200)
    errors, soft, finished = [], [], True
    for name in STAGES:
        stage = status.get(name)
        if not isinstance(stage, dict):
            finished = finished and name != "modules-final"
            continue
        message["stages"][name] = {
            key: stage.get(key)
            for key in ("start", "finished")
            if isinstance(stage.get(key), (int, float))
        }
        finished = finished and isinstance(stage.get("finished"), (int, float))
        errors += ["%s: %s" % (name, e) for e in stage.get("errors") or []]
        for level, texts in sorted((stage.get("recoverable_errors") or {}).items()):
            # DEPRECATED is advice to the writer of the user data, not a fault.
            if level != "DEPRECATED":
                soft += ["%s: %s" % (name, text) for text in texts or []]
    result = read_json(os.path.join(folder, "result.json")).get("v1")
    if isinstance(result, dict):
        for error in result.get("errors") or []:
            # result.json repeats the stages' errors; keep only what is new.
            if not any(known.endswith(str(error)) for known in errors):
                errors.append(str(error))
    message["errors"] = [short(e) for e in errors[:20]]
    message["recoverable"] = [short(e) for e in soft[:20]]
    if isinstance(result, dict) and finished:
        message["stage"] = None
        message["state"] = "error" if errors else ("degraded" if soft else "done")
    return message


def modified(path):
    try:
        found = os.stat(path)
        return (found.st_mtime_ns, found.st_size, found.st_ino)
    except OSError:
        return None


def users_are_made(folder):
    """cloud-init makes users in its network stage; before its end we must not make any."""
    if os.path.exists(os.path.join(folder, "disabled")):
        return True
    status = read_json(os.path.join(folder, "status.json")).get("v1") or {}
    stage = status.get("init")
    if isinstance(stage, dict) and isinstance(stage.get("finished"), (int, float)):
        return True
    # No cloud-init in this boot at all.
    return not status and not os.path.isdir(folder)


# ---- users, keys, ssh ----------------------------------------------------------------------------


def run(argv, timeout=60):
    done = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, close_fds=True)
    try:
        out = done.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        done.kill()
        done.communicate()
        raise RuntimeError("%s did not end" % argv[0])
    if done.returncode != 0:
        raise RuntimeError("%s: %s" % (argv[0], short(out.decode("utf-8", "replace").strip(), 300)))


def write_file(path, text, mode):
    temp = path + ".pileus-new"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temp, path)


def user_by_name(name):
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def ensure_user(paths, name, uid=1000):
    """Makes sure of the login user and its sudo; returns {user, uid, home, created, note}."""
    if not re.match(r"^[a-z_][a-z0-9_-]{0,31}$", name):
        raise RuntimeError("not a user name")
    note, created = "", False
    user = user_by_name(name)
    if user is None:
        argv = ["useradd", "-m", "-s", "/bin/bash", "-c", "pileus login user"]
        try:
            taken = pwd.getpwuid(uid).pw_name
            note = "uid %d belongs to %s" % (uid, taken)
        except KeyError:
            argv += ["-u", str(uid)]
        groups = [g for g in ("adm", "sudo", "wheel", "systemd-journal") if has_group(g)]
        if groups:
            argv += ["-G", ",".join(groups)]
        if has_group(name):
            argv += ["-g", name]
        run(argv + [name])
        user = user_by_name(name)
        created = True
        if user is None:
            raise RuntimeError("useradd made no user")
    elif user.pw_uid != uid:
        note = "%s has uid %d" % (name, user.pw_uid)
    # Once an instance: who takes the rule away later does not get it back.
    marker = sudo_marker(paths, name)
    if os.path.isdir("/etc/sudoers.d") and not os.path.exists(marker):
        write_file("/etc/sudoers.d/90-pileus-" + name, name + " ALL=(ALL) NOPASSWD:ALL\n", 0o440)
        write_file(marker, "", 0o600)
    return {"user": name, "uid": user.pw_uid, "home": user.pw_dir, "created": created, "note": note}


def sudo_marker(paths, name):
    return os.path.join(paths.etc, "sudo-" + name)


def has_group(name):
    try:
        grp.getgrnam(name)
        return True
    except KeyError:
        return False


SSHD_CONFIG = """# Written by pileus-agent: the host's own way in, apart from /etc/ssh/sshd_config.
HostKey {etc}/ssh_host_ed25519_key
AuthorizedKeysFile {etc}/authorized_keys
PidFile none
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserEnvironment no
AcceptEnv *
UsePAM {pam}
PrintMotd {motd}
PrintLastLog no
X11Forwarding no
Compression no
UseDNS no
MaxSessions 1000
LoginGraceTime 60
Subsystem sftp internal-sftp
"""


class Ssh:
    """One `sshd -i` at a time on one ssh port."""

    def __init__(self, paths, name, tell, extra=()):
        self.paths = paths
        self.extra = extra
        self.tell = tell
        self.port = Port(paths, name)
        self.child = None
        self.turn = 0

    def config(self):
        path = os.path.join(self.paths.etc, "sshd_config")
        motd = "no" if "pam_motd" in read_text("/etc/pam.d/sshd") else "yes"
        pam = "yes" if os.geteuid() == 0 and os.path.exists("/etc/pam.d/sshd") else "no"
        # The first value of an option counts.
        text = "".join(str(line) + "\n" for line in self.extra)
        text += SSHD_CONFIG.format(etc=self.paths.etc, motd=motd, pam=pam)
        if read_text(path) != text:
            write_file(path, text, 0o600)
        return path

    def program(self):
        for path in (self.paths.sshd, "/usr/sbin/sshd", "/usr/bin/sshd", "/sbin/sshd"):
            if path and os.path.exists(path):
                return path
        raise RuntimeError("sshd is not installed")

    def end(self):
        """Ends the old sshd; its sessions end with it."""
        self.turn += 1
        child, self.child = self.child, None
        if child is None or child.poll() is not None:
            return
        for kill in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, kill)
                child.wait(timeout=3)
                return
            except subprocess.TimeoutExpired:
                continue
            except OSError:
                break

    def drain(self, limit=3.0):
        """Throws away what an old connection left: until the host is away, or silence."""
        deadline = time.monotonic() + limit
        quiet = 0
        while time.monotonic() < deadline:
            data = self.port.read()
            if data == b"":
                return
            if data is None:
                quiet += 1
                if quiet >= 5:
                    return
                time.sleep(0.02)
            else:
                quiet = 0

    def open(self, nonce):
        """Makes ready for a new connection; returns what then waits for the host."""
        if not re.match(r"^[0-9a-zA-Z]{8,64}$", nonce):
            raise RuntimeError("bad nonce")
        self.end()
        config, program = self.config(), self.program()
        if self.port.sock is not None:
            self.port.close()
        if not self.port.open():
            raise RuntimeError("there is no port " + self.port.name)
        if self.port.sock is None:
            self.drain()
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)
        turn = self.turn
        return lambda: self.serve(turn, nonce, program, config)

    def serve(self, turn, nonce, program, config, limit=30.0):
        """Waits for the host on the ssh port, greets it, starts sshd and waits for its end."""
        deadline = time.monotonic() + limit
        while not self.port.connected():
            if turn != self.turn or time.monotonic() > deadline:
                return
            time.sleep(0.01)
        if turn != self.turn or not self.port.write(("PILEUS-SSH %s\n" % nonce).encode()):
            return
        fd = self.port.fd
        child = subprocess.Popen([program, "-i", "-f", config], stdin=fd, stdout=fd,
                                 stderr=subprocess.DEVNULL, close_fds=True, start_new_session=True,
                                 cwd="/")
        if turn != self.turn:
            child.kill()
        self.child = child
        code = child.wait()
        if turn == self.turn:
            self.port.gone()
        self.tell({"type": "ssh", "state": "closed", "nonce": nonce, "exit": code})


# ---- the loop ------------------------------------------------------------------------------------


class Agent:
    def __init__(self, args):
        self.paths = Paths(args)
        self.port = Port(self.paths, AGENT_PORT)
        self.ssh = {}
        self.settings = read_json(os.path.join(self.paths.etc, "agent.json"))
        self.buffer = b""
        self.skipping = False
        self.online = False
        self.cloud = None
        self.cloud_seen = None
        self.cloud_done = False
        self.jobs = queue.Queue()
        self.wake_r, self.wake_w = os.pipe()
        for fd in (self.wake_r, self.wake_w):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self.wake_w)
        signal.signal(signal.SIGIO, lambda *_: None)

    def send(self, message):
        line = json.dumps(message, ensure_ascii=True, separators=(",", ":")).encode()
        if len(line) >= MAX_LINE:
            line = json.dumps({"type": message.get("type", "reply"), "id": message.get("id"),
                               "ok": False, "error": "the answer is too long"}).encode()
        return self.port.write(line + b"\n")

    def hello(self):
        boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        return {"type": "hello", "proto": PROTO, "agent": VERSION, "boot_id": boot_id,
                "hostname": socket.gethostname(), "kernel": os.uname().release,
                "machine": os.uname().machine, "python": sys.version.split()[0],
                "os": os_release(), "pid": os.getpid(), "instance": self.settings.get("instance", "")}

    def greet(self):
        self.send(self.hello())
        self.send(cloud_init_state(self.paths.cloud))
        self.send(report())

    def watch_cloud_init(self):
        if self.cloud_done:
            return
        seen = [modified(os.path.join(self.paths.cloud, name))
                for name in ("status.json", "result.json", "disabled")]
        if seen == self.cloud_seen:
            return
        self.cloud_seen = seen
        state = cloud_init_state(self.paths.cloud)
        if state != self.cloud:
            self.cloud = state
            if self.online:
                self.send(state)
            if state["state"] in ("done", "degraded", "error", "disabled"):
                self.cloud_done = True
                if self.online:
                    self.send(report())

    def handle_line(self, line):
        try:
            request = json.loads(line.decode("utf-8"))
            number, what = request["id"], request["do"]
        except (ValueError, KeyError, TypeError):
            return
        # Quick ones are answered at once, also while a slow one is at work.
        if what == "hello":
            self.greet()
            self.send({"type": "reply", "id": number, "ok": True})
        elif what == "ping":
            self.send({"type": "reply", "id": number, "ok": True, "time": time.time()})
        elif what == "report":
            answer = report()
            self.send(answer)
            self.send({"type": "reply", "id": number, "ok": True})
        elif self.jobs.qsize() < 64:
            self.jobs.put((number, what, request))
        else:
            self.send({"type": "reply", "id": number, "ok": False, "error": "too busy"})

    def work(self):
        """The slow requests, one after the other, beside the loop."""
        while True:
            number, what, request = self.jobs.get()
            after = None
            reply = {"type": "reply", "id": number, "ok": True}
            try:
                extra, after = self.perform(what, request)
                reply.update(extra or {})
            except Exception as err:  # one bad request must not end the agent
                reply.update({"ok": False, "error": short(err, 500)})
            self.send(reply)
            if after is not None:
                threading.Thread(target=self.guarded, args=(after,), daemon=True).start()

    @staticmethod
    def guarded(function):
        try:
            function()
        except Exception as err:
            log("failed:", err)

    def perform(self, what, request):
        if what == "ssh-open":
            user = self.login_user(float(request.get("wait", 60)))
            ssh = self.ssh_port(str(request.get("port", "pileus.ssh.0")))
            return {"login": user}, ssh.open(str(request.get("nonce", "")))
        if what == "ssh-close":
            for ssh in self.ssh.values():
                ssh.end()
            return None, None
        if what == "ensure-user":
            return {"login": self.login_user(float(request.get("wait", 60)))}, None
        if what == "set-keys":
            keys = [str(k) for k in request.get("keys", [])]
            if any("\n" in k for k in keys):
                raise RuntimeError("a key is one line")
            write_file(os.path.join(self.paths.etc, "authorized_keys"),
                       "".join(k + "\n" for k in keys), 0o644)
            return None, None
        if what == "set-time":
            time.clock_settime(time.CLOCK_REALTIME, float(request["unix"]))
            return None, None
        if what in ("poweroff", "reboot"):
            return None, lambda: self.shut_down(what)
        raise RuntimeError("unknown request " + short(what, 40))

    def ssh_port(self, name):
        if not SSH_PORT.match(name):
            raise RuntimeError("not an ssh port")
        if name not in self.ssh:
            self.ssh[name] = Ssh(self.paths, name, self.send, self.settings.get("sshd", ()))
        return self.ssh[name]

    def login_user(self, wait):
        name = str(self.settings.get("user", "ubuntu"))
        if os.geteuid() != 0:  # a test
            me = pwd.getpwuid(os.getuid())
            return {"user": me.pw_name, "uid": me.pw_uid, "home": me.pw_dir}
        if self.settings.get("user_managed", True) is False:
            user = pwd.getpwnam(name)
            return {"user": name, "uid": user.pw_uid, "home": user.pw_dir}
        deadline = time.monotonic() + max(0.0, min(wait, 600.0))
        # In a later boot the user is there already.
        known = user_by_name(name) and os.path.exists(sudo_marker(self.paths, name))
        # pam_nologin refuses everybody but root until the boot has come far enough.
        while not (known or users_are_made(self.paths.cloud)) or os.path.exists("/run/nologin"):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return ensure_user(self.paths, name, int(self.settings.get("uid", 1000)))

    @staticmethod
    def shut_down(what):
        if os.path.isdir("/run/systemd/system"):
            run(["systemctl", "--no-block", what])
        else:
            run(["shutdown", "-h" if what == "poweroff" else "-r", "now"])

    def take(self, data):
        """Cuts the stream in lines; a line that is too long is skipped to its end."""
        self.buffer += data
        while True:
            line, found, rest = self.buffer.partition(b"\n")
            if not found:
                break
            self.buffer = rest
            if not self.skipping and line.strip():
                self.handle_line(line)
            self.skipping = False
        if len(self.buffer) > MAX_LINE:
            self.buffer, self.skipping = b"", True

    def went_away(self):
        self.online = False
        self.buffer, self.skipping = b"", False
        self.port.gone()

    def set_timezone(self):
        """Once an instance, and before cloud-init's config stage: a zone of the user data wins."""
        zone = str(self.settings.get("timezone", ""))
        marker = os.path.join(self.paths.etc, "timezone-set")
        if not zone or os.geteuid() != 0 or os.path.exists(marker):
            return
        file = os.path.join("/usr/share/zoneinfo", zone)
        try:
            if ".." not in zone and os.path.isfile(file):
                temp = "/etc/localtime.pileus-new"
                if os.path.lexists(temp):
                    os.unlink(temp)
                os.symlink(file, temp)
                os.rename(temp, "/etc/localtime")
                if os.path.exists("/etc/timezone"):
                    write_file("/etc/timezone", zone + "\n", 0o644)
            write_file(marker, zone + "\n", 0o600)
        except OSError as err:
            log("cannot set the time zone:", err)

    def loop(self):
        self.set_timezone()
        threading.Thread(target=self.work, daemon=True).start()
        watch = address_watch()
        poller = select.poll()
        poller.register(self.wake_r, select.POLLIN)
        if watch is not None:
            poller.register(watch.fileno(), select.POLLIN)
        while True:
            if not self.online and self.port.open(notify=True) and self.port.connected():
                self.online = True
                self.greet()
            # A port whose host is away always polls as ready: then only SIGIO and time count.
            port_fd = self.port.fd if self.online else -1
            if port_fd >= 0:
                poller.register(port_fd, select.POLLIN)
            if not self.cloud_done:
                wait = BOOT_TICK
            elif self.online:
                wait = None
            else:
                wait = AWAY_TICK
            events = poller.poll(None if wait is None else wait * 1000)
            if port_fd >= 0:
                poller.unregister(port_fd)
            for fd, _ in events:
                if fd == self.wake_r:
                    self.empty(lambda: os.read(self.wake_r, 4096))
                elif fd == port_fd:
                    data = self.port.read()
                    if data == b"":
                        self.went_away()
                    elif data:
                        self.take(data)
                elif watch is not None and fd == watch.fileno():
                    self.empty(lambda: watch.recv(65536))
                    if self.online:
                        self.send(report())
            self.watch_cloud_init()

    @staticmethod
    def empty(read):
        try:
            while read():
                pass
        except OSError:
            pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ports", help="folder of the ports (tests)")
    parser.add_argument("--etc", default="/etc/pileus")
    parser.add_argument("--cloud", default="/run/cloud-init")
    parser.add_argument("--sshd", default="")
    Agent(parser.parse_args()).loop()


if __name__ == "__main__":
    main()
