#!/usr/bin/env python3
# The part of pileus's guest agent that only templates and clones need: quiesce.py, identify.py, identity.py
# and stages.py make one file, which the agent loads into itself when it is first asked for one of these.
# So an ordinary boot does not pay for it.
#
# This one: a template's guest is brought to a quiet point. All that is slow and all that would be the
# same in two clones is dealt with here; the clone's way is identify.py.

import ctypes
import glob
import hashlib
import pickletools
import shutil

MACHINE_ID = "/etc/machine-id"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
BOOT_ID_FILE = "/run/pileus/boot_id"
CLOUD_RUN = "/run/cloud-init"
NETWORKD_RUN = "/run/systemd/network"
NETPLAN = "/etc/netplan/50-cloud-init.yaml"
TIMER_STAMPS = "/var/lib/systemd/timers"
HOOKS = "/etc/pileus/on-clone.d"
# Units that wake up by the calendar: a clone's clock jumps, and all of them would fire at once.
KEPT_TIMERS = ("systemd-tmpfiles-clean.timer",)
# Started by a signal in the clone, before which they do nothing: nothing is logged under the template's
# id, no address is asked for in its name, nobody is let in by its keys.
SSHD_UNITS = ("ssh.service", "sshd.service")
JOURNALD = "systemd-journald.service"
NETWORKD = "systemd-networkd.service"

LINK_FILE = """[Match]
{match}

[Link]
Name=eth0
WakeOnLan=off
"""
NETWORK_FILE = """[Match]
{match}
Name=eth0

[Network]
DHCP=ipv4
LinkLocalAddressing=ipv6

[DHCP]
ClientIdentifier=mac
RouteMetric=100
UseMTU=true
UseHostname=false
"""

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
MS_RDONLY, MS_BIND, MNT_DETACH = 1, 4096, 2


def output(argv, timeout=60):
    """What a program printed, or "" if it failed."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=timeout).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""


def remove(*patterns):
    for pattern in patterns:
        for path in glob.glob(pattern):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                try:
                    os.unlink(path)
                except OSError as err:
                    log("not removed:", err)


def main_pid(unit):
    text = output(["systemctl", "show", "-p", "MainPID", "--value", unit]).strip()
    return int(text) if text.isdigit() else 0


def send_signal(pid, what):
    if pid > 1:
        try:
            os.kill(pid, what)
        except OSError as err:
            log("no signal to %d:" % pid, err)


# ---- what an identity consists of in files -------------------------------------------------------


class Old:
    """The values that make this machine the one it is, and the files that hold them."""

    def __init__(self, paths, settings):
        etc = paths.etc
        self.instance = str(settings.get("instance", ""))
        self.hostname = socket.gethostname()
        self.host_key = read_text(os.path.join(etc, "ssh_host_ed25519_key"))
        self.host_public = read_text("/etc/ssh/ssh_host_ed25519_key.pub").strip()
        self.client = [line for line in read_text(os.path.join(etc, "authorized_keys")).splitlines() if line.strip()]
        self.files = {}
        self.pickles = {}

    def marks(self):
        """All old values, as they occur in files; a private key line by line, however it is folded."""
        keys = [line for line in self.host_key.splitlines() if len(line) > 12 and "----" not in line]
        return [m for m in [self.instance, self.host_public, *self.client, *keys] if len(m) >= 8]

    def pattern(self):
        marks = sorted(self.marks(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def collect(self):
        """Remembers each file that holds an old value, and what a file that is deleted was."""
        found = self.pattern()
        places = ["/etc/pileus/*", "/etc/ssh/ssh_host_*", "/root/.ssh/authorized_keys",
                  "/home/*/.ssh/authorized_keys", CLOUD_RUN + "/*", CLOUD_RUN + "/.instance-id",
                  CLOUD_LIB + "/data/*", CLOUD_LIB + "/instances/*/**"]
        for place in places:
            for path in glob.glob(place, recursive=True):
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                self.remember(path, found)

    def remember(self, path, found):
        try:
            info = os.stat(path)
            if info.st_size > 4 << 20:
                return
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return
        about = (info.st_mode & 0o7777, (info.st_uid, info.st_gid))
        if path.endswith(".pkl"):
            try:
                parts = pickle_parts(data, found)
            except Exception as err:  # of another Python: cloud-init makes it anew at the next boot
                log("cannot read", path, err)
                return
            self.pickles[path] = (parts, about)
            return
        text = data.decode("utf-8", "surrogateescape")
        if found.search(text):
            self.files[path] = (text, about)


def pickle_parts(data, found):
    """A pickle cut at the strings that hold an old value: bytes as they are, such strings as str."""
    parts, start = [], 0
    ends = []
    ops = list(pickletools.genops(data))
    for index, (op, arg, at) in enumerate(ops):
        end = ops[index + 1][2] if index + 1 < len(ops) else len(data)
        if op.name == "FRAME":  # frames say their length, which changes; they are optional
            ends.append((at, end, None))
        elif isinstance(arg, str) and "UNICODE" in op.name and found.search(arg):
            ends.append((at, end, arg))
    for at, end, arg in ends:
        parts.append(data[start:at])
        if arg is not None:
            parts.append(arg)
        start = end
    parts.append(data[start:])
    return parts


def pickle_join(parts, change):
    out = []
    for part in parts:
        if isinstance(part, str):
            text = change(part).encode("utf-8", "surrogatepass")
            part = b"X" + struct.pack("<I", len(text)) + text
        out.append(part)
    return b"".join(out)


# ---- quiesce -------------------------------------------------------------------------------------


class Quiet:
    """What the template knows when it is still, for its clones."""

    def __init__(self):
        self.old = None
        self.stopped = {}
        self.login = None
        self.timers = []
        self.helper = None
        self.rehearsed = False


def wait_for_boot(agent, deadline):
    while not agent.cloud_done:
        if time.monotonic() > deadline:
            raise RuntimeError("cloud-init did not end")
        time.sleep(0.1)
    state = cloud_init_state(agent.paths.cloud)
    if state["state"] == "error":
        raise RuntimeError("cloud-init failed: " + "; ".join(state["errors"]))
    while True:
        jobs = output(["systemctl", "list-jobs", "--no-legend", "--plain"]).strip()
        if not jobs:
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the boot does not end: " + short(jobs, 200))
        time.sleep(0.3)


def stop_timers():
    text = output(["systemctl", "list-units", "--type=timer", "--state=active", "--no-legend", "--plain"])
    timers = [line.split()[0] for line in text.splitlines() if line.split()]
    timers = [t for t in timers if t not in KEPT_TIMERS]
    if timers:
        run(["systemctl", "stop", *timers])
    return timers


def network_files(directory, match):
    """What netplan makes of our network-config, under the names it uses."""
    os.makedirs(directory, mode=0o755, exist_ok=True)
    group = -1
    attempt_group = has_group("systemd-network")
    if attempt_group:
        group = grp.getgrnam("systemd-network").gr_gid
    put(directory + "/10-netplan-eth0.link", LINK_FILE.format(match=match), 0o640)
    put(directory + "/10-netplan-eth0.network", NETWORK_FILE.format(match=match), 0o640, (0, group))


def forget_identity(old):
    for path in old.files:
        if path.startswith(("/etc/ssh", "/root", "/home")) or "authorized_keys" in path or "host_" in path:
            remove(path)
    remove("/etc/ssh/ssh_host_*", "/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret",
           "/boot/efi/loader/random-seed", "/efi/loader/random-seed", "/boot/loader/random-seed",
           "/var/lib/dhcp/*", "/var/lib/NetworkManager/*lease*", "/run/systemd/netif/leases/*",
           "/root/.bash_history", "/home/*/.bash_history", "/home/*/.cache", "/root/.cache",
           "/tmp/*", "/var/tmp/*", "/var/crash/*", "/var/lib/systemd/coredump/*",
           "/var/cache/apt/*.bin", "/var/lib/apt/lists/*_*", "/run/log/journal/*")
    for path in ("/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog", "/run/utmp",
                 "/var/log/cloud-init.log", "/var/log/cloud-init-output.log",
                 "/var/log/auth.log", "/var/log/syslog", "/var/log/kern.log", "/var/log/dpkg.log"):
        if os.path.exists(path):
            attempt(os.truncate, path, 0)
    with open(MACHINE_ID, "w"):
        pass
    if os.path.isfile("/var/lib/dbus/machine-id") and not os.path.islink("/var/lib/dbus/machine-id"):
        attempt(os.truncate, "/var/lib/dbus/machine-id", 0)


STAGES_SOCKET = "/run/pileus/stages.sock"
STAGES_UNIT = "pileus-cloud-init.service"


def start_stages(deadline):
    """cloud-init, loaded and waiting for the word, in a unit of its own: what user data starts must not end
    with the agent."""
    words = read_text("/usr/bin/cloud-init", 200).split("\n", 1)[0].lstrip("#!").split()
    if not words or not os.path.exists(words[0]):
        raise RuntimeError("cloud-init's Python is not known")
    script = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "stages.py")
    os.makedirs("/run/pileus", mode=0o755, exist_ok=True)
    run(["systemd-run", "--quiet", "--collect", "--unit=" + STAGES_UNIT, "--property=KillMode=process",
         "--property=TasksMax=infinity", "--property=StandardOutput=journal+console",
         "--property=StandardError=journal+console", *words, script])
    while not os.path.exists(STAGES_SOCKET):
        if time.monotonic() > deadline:
            raise RuntimeError("cloud-init was not loaded in time")
        time.sleep(0.05)


def rehearse_login(agent):
    """One login over a pair of pipes: all that a first command needs is then in memory, and the user's own
    service manager runs. The keys live only for this."""
    name = str(agent.settings.get("user", "ubuntu"))
    etc = agent.paths.etc
    folder = "/run/pileus/rehearsal"
    os.makedirs(folder, mode=0o755, exist_ok=True)
    try:
        for key in ("host", "client"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder + "/" + key])
        ssh = agent.ssh_port("pileus.ssh.0")
        config = read_text(ssh.config()).replace(etc + "/ssh_host_ed25519_key", folder + "/host")
        config = config.replace(etc + "/authorized_keys", folder + "/client.pub")
        put(folder + "/config", "StrictModes no\n" + config, 0o600)
        os.makedirs("/run/sshd", 0o755, exist_ok=True)
        proxy = "%s -i -f %s/config" % (ssh.program(), folder)
        argv = ["ssh", "-F", "none", "-i", folder + "/client", "-o", "ProxyCommand=" + proxy,
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                "-o", "KexAlgorithms=curve25519-sha256", "-o", "Ciphers=aes128-gcm@openssh.com",
                "-o", "BatchMode=yes", name + "@rehearsal", "true"]
        run(argv, timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quiesce(agent, bound):
    """Brings the guest of a template to rest; the host stops its processors after the answer."""
    deadline = time.monotonic() + bound
    quiet = Quiet()
    wait_for_boot(agent, deadline)
    if not os.path.isdir("/run/systemd/system") or not main_pid(NETWORKD):
        raise RuntimeError("this system does not use systemd and systemd-networkd")
    for ssh in agent.ssh.values():
        ssh.end()
    attempt(run, ["modprobe", "-a", "virtio_net", "isofs"])
    quiet.timers = stop_timers()
    quiet.old = Old(agent.paths, agent.settings)
    quiet.old.collect()
    sshd = next((pid for pid in map(main_pid, SSHD_UNITS) if pid), 0)
    # From here on nothing is written to the old journal that anybody would read.
    attempt(start_stages, deadline)
    journald = main_pid(JOURNALD)
    attempt(run, ["journalctl", "--rotate"])
    send_signal(journald, signal.SIGSTOP)
    forget_identity(quiet.old)
    remove("/var/log/journal/*")
    # Who cached the machine's id: PID 1 forgets it as it executes itself anew, the others as they start.
    run(["systemctl", "daemon-reexec"])
    # After that: netplan's generator has just removed what lay there.
    network_files(NETWORKD_RUN, "Path=pci-*")
    attempt(run, ["udevadm", "control", "--reload"])
    # It reads its rules when it next has something to do.
    attempt(run, ["udevadm", "trigger", "--settle", "--action=change", "/sys/class/net/lo"])
    run(["systemctl", "restart", "systemd-logind.service", NETWORKD])
    networkd = main_pid(NETWORKD)
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3\n")
    agent.login_user(5)
    quiet.rehearsed = attempt(rehearse_login, agent)
    if not os.path.exists(HOOKS):
        attempt(os.makedirs, HOOKS, 0o755)
    quiet.stopped = {"networkd": networkd, "journald": journald, "sshd": sshd}
    quiet.login = Login(sshd)
    rehearse(agent, quiet)
    for pid in (networkd, sshd):
        send_signal(pid, signal.SIGSTOP)
    os.sync()
    agent.quiet = quiet
    return {"stopped": quiet.stopped, "timers": quiet.timers, "files": len(quiet.old.files),
            "rehearsed": quiet.rehearsed}
