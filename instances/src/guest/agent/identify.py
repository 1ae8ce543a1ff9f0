

# ---- identify ------------------------------------------------------------------------------------
# A clone becomes itself: in this order, so that nothing is reachable before it is unique. No program is
# started on the way: with code that is translated anew in each clone, each would cost a tenth of a second.

# The host gives up later.
NETWORK_BOUND = 45.0
HOOK_BOUND = 60.0
# To start what every system has; a busy host has many such guests.
SERVICES_BOUND = 120.0
# The rest follows when the guest has nothing else to do for a while, and at the latest after a time.
IDLE_FOR = 0.3
SETTLE_AFTER = 5.0
TIMERS_AFTER = 20.0
KEEP_IPC = "/run/systemd/logind.conf.d/50-pileus-fork.conf"
# While it exists, the boot hook leaves the running agent alone.
NO_RESTART = "/run/pileus/keep-agent"


class Steps:
    """Names and milliseconds of what was done."""

    def __init__(self):
        self.done = []
        self.at = time.monotonic()

    def mark(self, name):
        now = time.monotonic()
        self.done.append([name, round((now - self.at) * 1000)])
        self.at = now


def syscall(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), "%s: %s" % (what, os.strerror(ctypes.get_errno())))


def new_boot_id():
    """The kernel's own can't be changed, so another file lies over it: from the template on, because each
    mount keeps PID 1 busy. So the file is written in place."""
    text = read_text("/proc/sys/kernel/random/uuid")
    with open(BOOT_ID_FILE, "w") as file:
        os.fchmod(file.fileno(), 0o444)
        file.write(text)
    if read_text(BOOT_ID) != text:
        syscall(libc.mount(BOOT_ID_FILE.encode(), BOOT_ID.encode(), None, MS_BIND, None), "mount")


def set_machine_id(text):
    if not re.match(r"^[0-9a-f]{32}$", text):
        raise RuntimeError("not a machine id")
    put(MACHINE_ID, text + "\n", 0o444)
    dbus = "/var/lib/dbus/machine-id"
    if os.path.isfile(dbus) and not os.path.islink(dbus):
        put(dbus, text + "\n", 0o644)


class Change:
    """From the old identity's values to the new one's."""

    def __init__(self, old, request, settings):
        self.pattern = old.pattern()
        self.authorized = [str(k).strip() for k in request["authorized"]]
        if any("\n" in k for k in self.authorized) or not self.authorized:
            raise RuntimeError("a key is one line")
        self.new = {old.instance: settings["instance"], old.host_public: request["host_public"].strip()}
        self.clients = set(old.client)
        for line in old.client:
            self.new[line] = self.authorized[0]
        lines = [l for l in old.host_key.splitlines() if len(l) > 12 and "----" not in l]
        fresh = [l for l in request["host_key"].splitlines() if len(l) > 12 and "----" not in l]
        if len(lines) == len(fresh):
            self.new.update(zip(lines, fresh))
        self.rename = (old.hostname, request["hostname"]) if request.get("mode") != "full" else None

    def text(self, text):
        text = self.pattern.sub(lambda m: self.new.get(m.group(), ""), text)
        return text.replace(*self.rename) if self.rename else text

    def keys(self, text):
        """A list of keys: each line with an old key becomes one for each new key."""
        out = []
        for line in text.splitlines():
            mine = next((key for key in self.clients if key in line), None)
            out += [line.replace(mine, key) for key in self.authorized] if mine else [line]
        return "".join(line + "\n" for line in out)


def write_keys(agent, old, change, request):
    """Host keys and who may log in: for pileus's own sshd, and for the system's as a cold boot leaves them."""
    etc = agent.paths.etc
    put(etc + "/ssh_host_ed25519_key", request["host_key"], 0o600)
    put(etc + "/authorized_keys", "".join(k + "\n" for k in change.authorized))
    for path, (text, (mode, owner)) in old.files.items():
        if path.endswith("authorized_keys") and not path.startswith(etc):
            put(path, change.keys(text), mode, owner)
    if os.path.isdir("/etc/ssh"):
        remove("/etc/ssh/ssh_host_*")
        put("/etc/ssh/ssh_host_ed25519_key", request["host_key"], 0o600)
        put("/etc/ssh/ssh_host_ed25519_key.pub", request["host_public"].strip() + "\n")


def write_cloud_init(old, change):
    """cloud-init's own record of who this is: a later cold boot with this instance's seed finds it done."""
    was, now = old.instance, change.new[old.instance]
    home = CLOUD_LIB + "/instances/"
    if os.path.isdir(home + was):
        os.rename(home + was, home + now)
        link = CLOUD_LIB + "/instance"
        remove(link)
        os.symlink(home + now, link)
    for path, (text, (mode, owner)) in old.files.items():
        if path.startswith((CLOUD_LIB, CLOUD_RUN)):
            put(path.replace(home + was, home + now), change.text(text), mode, owner)
    for path, (parts, (mode, owner)) in old.pickles.items():
        put(path.replace(home + was, home + now), pickle_join(parts, change.text), mode, owner)


def forget_cloud_init(agent):
    """Leaves what a first boot finds, for cloud-init to run as in one."""
    remove(CLOUD_LIB + "/instances/*", CLOUD_LIB + "/instance", CLOUD_LIB + "/data/*", CLOUD_RUN + "/sem/*",
           *(CLOUD_RUN + "/" + name for name in (
               "status.json", "result.json", "instance-data*.json", ".instance-id", "cloud-id*",
               "combined-cloud-config.json", "network-config.json")))
    agent.cloud, agent.cloud_seen, agent.cloud_done = None, None, False


def tell_stages(word):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect(STAGES_SOCKET)
        sock.sendall(word)


def run_cloud_init():
    """By the process that waits for it, or (a fork has none) by a new one."""
    put(NO_RESTART, "")
    if attempt(tell_stages, b"run"):
        return
    remove(STAGES_SOCKET)
    start_stages(time.monotonic() + 60)
    tell_stages(b"run")


def write_network(nic, instance):
    mac = nic["mac"]
    if not re.match(r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$", mac):
        raise RuntimeError("not a MAC address")
    if os.path.isdir(os.path.dirname(NETPLAN)):
        put(NETPLAN, "network:\n  version: 2\n  ethernets:\n    eth0:\n      match:\n"
            "        macaddress: \"%s\"\n      dhcp-identifier: \"mac\"\n      dhcp4: true\n"
            "      dhcp4-overrides:\n        use-hostname: false\n"
            "      set-name: \"eth0\"\n" % mac, 0o600)
    config = {"version": 2, "ethernets": {"eth0": {
        "match": {"macaddress": mac}, "set-name": "eth0", "dhcp4": True, "dhcp-identifier": "mac",
        "dhcp4-overrides": {"use-hostname": False}}}}
    folder = CLOUD_LIB + "/instances/" + instance
    if os.path.isdir(folder):
        put(folder + "/network-config.json",
            json.dumps(config, indent=1, sort_keys=True, separators=(",", ": ")), 0o600)


def run_hooks(request):
    """What the guest's owner wants to be done in each clone, before anybody can reach it."""
    try:
        names = sorted(os.listdir(HOOKS))
    except OSError:
        return
    environment = dict(os.environ, PILEUS_INSTANCE=str(request["instance"]),
                       PILEUS_HOSTNAME=request["hostname"], PILEUS_MODE=request.get("mode", "warm"))
    environment.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    for name in names:
        path = os.path.join(HOOKS, name)
        if not os.path.isfile(path) or not os.access(path, os.X_OK) or name.startswith("."):
            continue
        try:
            done = subprocess.run([path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, env=environment, cwd="/", timeout=HOOK_BOUND)
        except (OSError, subprocess.SubprocessError) as err:
            raise RuntimeError("the hook %s failed: %s" % (path, err))
        if done.returncode != 0:
            text = done.stdout.decode("utf-8", "replace").strip()
            raise RuntimeError("the hook %s ended with %d: %s" % (path, done.returncode, short(text, 300)))


RTM_NEWROUTE_GROUPS = RTMGRP_IPV4_IFADDR | 0x40 | 0x1


class Network:
    """Watches, from before the card is let in, until it has its address, route and resolver."""

    def __init__(self):
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self.sock.bind((0, RTM_NEWROUTE_GROUPS))
        self.sock.setblocking(False)

    @staticmethod
    def ready(nic):
        found = [i for i in addresses() if i["mac"] == nic["mac"]]
        if not found:
            return "card"
        if nic["address"] not in found[0]["addresses"]:
            return "address"
        gateway = nic.get("gateway")
        if gateway:
            want = "%s\t00000000\t%08X\t" % (found[0]["name"], struct.unpack("<I", socket.inet_aton(gateway))[0])
            if want not in read_text("/proc/net/route"):
                return "route"
        dns = nic.get("dns")
        if dns and os.path.isdir("/run/systemd/resolve") and \
                "nameserver %s\n" % dns not in read_text("/run/systemd/resolve/resolv.conf"):
            return "resolver"
        return ""

    def wait(self, nic, steps, bound=NETWORK_BOUND):
        deadline = time.monotonic() + bound
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLIN)
        missing = "card"
        while True:
            now = self.ready(nic)
            if now != missing:
                steps.mark("network: " + missing)
                missing = now
            if not now:
                self.sock.close()
                return
            if time.monotonic() > deadline:
                raise RuntimeError("the network card got no %s within %d s" % (missing, bound))
            poller.poll(20 if missing == "resolver" else 100)
            Agent.empty(lambda: self.sock.recv(65536))


LOGIN_BOUND = 10.0
TCP_LISTEN = "0A"


def open_files(pid):
    """What a process has open, as far as that can be seen."""
    folder, names = "/proc/%d/fd" % pid, set()
    for fd in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            names.add(os.readlink(folder + "/" + fd))
        except OSError:
            pass
    return names


class Login:
    """The system's own sshd, which reads its keys when it executes itself anew. Meanwhile its port refuses
    connections, so that whoever may use it must be told later."""

    def __init__(self, pid):
        self.pid = pid
        self.before = self.listeners() if pid > 1 else set()
        # Given to it by PID 1, its socket never closes.
        self.closes = self.before and not {"socket:[%s]" % inode for inode in self.before} & open_files(1)

    def listeners(self):
        """Inodes of the sockets that it listens on."""
        mine = open_files(self.pid)
        table = read_text("/proc/net/tcp", 1 << 20) + read_text("/proc/net/tcp6", 1 << 20)
        words = (line.split() for line in table.splitlines())
        return {w[9] for w in words if len(w) > 9 and w[3] == TCP_LISTEN and "socket:[%s]" % w[9] in mine}

    def renew(self):
        """Also one that stands still."""
        send_signal(self.pid, signal.SIGHUP)
        send_signal(self.pid, signal.SIGCONT)

    def wait(self, bound=LOGIN_BOUND):
        """Until it listens again, as far as it did."""
        deadline = time.monotonic() + bound
        while self.closes and os.path.exists("/proc/%d" % self.pid):
            now = self.listeners()
            if now and not now & self.before:
                return
            if time.monotonic() > deadline:
                log("sshd does not listen again")
                return
            time.sleep(0.02)


def identify(agent, request):
    """Makes this clone the machine that the request describes. Returns [[step, milliseconds]]."""
    if request.get("mode") == "booted":
        return booted(agent, request)
    steps = Steps()
    # What only reacts to the news (PID 1, the resolver) can wait.
    prefer(-10, os.getpid(), threading.get_native_id())
    full = request.get("mode") == "full"
    reseed(bytes.fromhex(request["entropy"]))
    time.clock_settime(time.CLOCK_REALTIME, float(request["time"]))
    steps.mark("random and clock")
    os.makedirs("/run/pileus", mode=0o755, exist_ok=True)
    quiet = agent.quiet
    if quiet is None:
        quiet = Quiet()
        quiet.old = Old(agent.paths, agent.settings)
        quiet.old.collect()
        steps.mark("collect")
    old = quiet.old
    settings = dict(agent.settings, instance=str(request["instance"]))
    for key in ("user", "uid", "timezone"):
        if request.get(key):
            settings[key] = request[key]
    change = Change(old, request, settings)
    steps.mark("the change")
    set_machine_id(request["machine_id"])
    steps.mark("machine-id")
    new_boot_id()
    steps.mark("boot-id")
    set_hostname(old.hostname, request["hostname"])
    steps.mark("names")
    # Byte by byte what the boot hook writes, so that it has no reason to start the agent anew.
    put(agent.paths.etc + "/agent.json",
        json.dumps(settings, sort_keys=True, separators=(",", ":")) + "\n", 0o600)
    agent.settings = settings
    write_keys(agent, old, change, request)
    login = None
    if quiet.login and not request.get("cloud_init"):
        # It executes itself anew and reads the new keys, while we go on.
        login = quiet.login
        login.renew()
    steps.mark("keys")
    if request.get("cloud_init"):
        forget_cloud_init(agent)
    else:
        write_cloud_init(old, change)
    steps.mark("cloud-init's record")
    nic = request.get("nic")
    network = None
    if nic:
        nic["mac"] = nic["mac"].lower()
        write_network(nic, settings["instance"])
        # In a warm clone the template's files, which fit any card, serve until later: udevd takes a third
        # of a second to read all of its rules again when a file has changed.
        if full:
            network_files(NETWORKD_RUN, "PermanentMACAddress=" + nic["mac"])
        network = Network()
    put(GENERATION, "%s %s\n" % (settings["instance"], request["machine_id"]))
    # A template has none of them.
    if full:
        take_seeds()
    flush_seed()
    agent.set_timezone()
    steps.mark("network's files")
    # A clone that stands by gets its name later, and its hooks then.
    agent.standby = (quiet.old, request) if request.get("standby") else None
    if agent.standby is None:
        run_hooks(request)
        steps.mark("hooks")
    if full:
        restart_all(steps, nic)
    else:
        send_signal(quiet.stopped.get("networkd", 0), signal.SIGCONT)
    if request.get("grow"):
        grow_root()
        steps.mark("grow")
    prefer(0, os.getpid(), threading.get_native_id())
    if network:
        network.wait(nic, steps)
    if login:
        login.wait()
        steps.mark("logins")
    agent.quiet = None
    announce(agent)
    return {"steps": steps.done}, lambda: settle(agent, quiet, nic, bool(request.get("cloud_init")))


def name(agent, request):
    """Gives a clone that stood by its final name, and what else its launch asks for. Its ids, keys and
    network are its own already, and connections that are open stay."""
    if agent.standby is None:
        raise RuntimeError("this guest does not stand by")
    old, before = agent.standby
    steps = Steps()
    reseed(bytes.fromhex(request["entropy"]))
    time.clock_settime(time.CLOCK_REALTIME, float(request["time"]))
    request = dict(before, **request)
    cloud_init = bool(request.get("cloud_init"))
    set_hostname(before["hostname"], request["hostname"])
    settings = dict(agent.settings)
    if request.get("timezone"):
        settings["timezone"] = request["timezone"]
    put(agent.paths.etc + "/agent.json",
        json.dumps(settings, sort_keys=True, separators=(",", ":")) + "\n", 0o600)
    agent.settings = settings
    agent.set_timezone()
    steps.mark("names")
    if cloud_init:
        forget_cloud_init(agent)
    else:
        write_cloud_init(old, Change(old, request, settings))
    flush_seed()
    steps.mark("cloud-init's record")
    run_hooks(request)
    steps.mark("hooks")
    if request.get("grow"):
        grow_root()
        steps.mark("grow")
    agent.standby = None
    announce(agent)
    return {"steps": steps.done}, lambda: after_naming(cloud_init)


def announce(agent):
    """Before the reply: the host must not take what it knew of the template for this guest."""
    agent.send(agent.hello())
    agent.send(cloud_init_state(agent.paths.cloud))


def after_naming(cloud_init):
    if cloud_init:
        run_cloud_init()
    else:
        attempt(tell_stages, b"end")


def processor_times():
    """Ticks of this guest's processors so far: without work, and all."""
    ticks = [int(word) for word in read_text("/proc/stat", 4096).split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def wait_idle(length, bound):
    deadline = time.monotonic() + bound
    quiet_since = time.monotonic()
    idle, total = processor_times()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before, (idle, total) = (idle, total), processor_times()
        if idle - before[0] < 0.7 * (total - before[1]):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= length:
            return


def settle(agent, quiet, nic, cloud_init):
    """What nobody waits for."""
    agent.send(report())
    if cloud_init:
        # What it logs is to be kept from the beginning.
        send_signal(quiet.stopped.get("journald", 0), signal.SIGKILL)
        run_cloud_init()
        # As in a boot: sshd starts when cloud-init has written keys and users.
        deadline = time.monotonic() + 120
        while not users_are_made(agent.paths.cloud) and time.monotonic() < deadline:
            time.sleep(0.1)
        quiet.login.renew()
    else:
        wait_idle(IDLE_FOR, SETTLE_AFTER)
        # The one with the template's id has done nothing since; its successor reads what waits for it.
        send_signal(quiet.stopped.get("journald", 0), signal.SIGKILL)
    if not cloud_init and agent.standby is None:
        attempt(tell_stages, b"end")
    if nic:
        network_files(NETWORKD_RUN, "PermanentMACAddress=" + nic["mac"])
    os.sync()
    if quiet.timers:
        time.sleep(TIMERS_AFTER)
        for path in glob.glob(TIMER_STAMPS + "/stamp-*"):
            attempt(os.utime, path)
        attempt(run, ["systemctl", "--no-block", "start", *quiet.timers])


def restart_all(steps, nic):
    """A guest that ran under another name: those who cached something are started anew, one by one."""
    # The connections of the origin end here, and with them its user's sessions: what that user keeps in
    # shared memory, and what runs there, is part of what was forked. logind ends a user's slice, with all in it,
    # ten seconds after the last session that it knows of.
    os.makedirs(os.path.dirname(KEEP_IPC), mode=0o755, exist_ok=True)
    put(KEEP_IPC, "[Login]\nRemoveIPC=no\nUserStopDelaySec=infinity\n")
    # First: it removes what it may ten seconds after the sessions' end.
    logind = "systemd-logind.service"
    if pids_of(logind):
        run(["systemctl", "restart", logind], SERVICES_BOUND)
    run(["systemctl", "daemon-reexec"], SERVICES_BOUND)
    steps.mark("PID 1")
    run(["systemctl", "restart", *filter(pids_of, (JOURNALD, NETWORKD))], SERVICES_BOUND)
    attempt(run, ["udevadm", "control", "--reload"])
    # A card that came before its files has another name.
    for card in addresses():
        if nic and card["mac"] == nic["mac"] and card["name"] != "eth0":
            run(["udevadm", "trigger", "--settle", "--action=add", "/sys/class/net/" + card["name"]])
    # Not in the background: when it has ended, sshd listens.
    for unit in SSHD_UNITS:
        if main_pid(unit):
            attempt(run, ["systemctl", "restart", unit], SERVICES_BOUND)
            break
    steps.mark("services")


def rehearse(agent, quiet):
    """Everything that identify calls is called once, or as far as it does no harm: what Python and the
    kernel have to load or to make is then made."""
    os.makedirs("/run/pileus", mode=0o755, exist_ok=True)
    request = {"authorized": ["ssh-ed25519 x"], "host_public": "ssh-ed25519 y", "hostname": "x",
               "host_key": quiet.old.host_key}
    change = Change(quiet.old, request, {"instance": "x"})
    for text, _ in quiet.old.files.values():
        change.text(text)
        change.keys(text)
    for parts, _ in quiet.old.pickles.values():
        pickle_join(parts, change.text)
    new_boot_id()
    flush_seed()
    network = Network()
    network.ready({"mac": "x", "address": "y"})
    network.sock.close()
    report()
    agent.hello()
    cloud_init_state(agent.paths.cloud)
    json.loads(json.dumps(request))
