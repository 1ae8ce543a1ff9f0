# ---- what happens to a machine that runs -----------------------------------------------------------
# Requests for moments in an instance's life: it goes on after a suspend, gets another name, a larger disk.
# identify.py uses the same steps for clones.

CLOUD_LIB = "/var/lib/cloud"
GENERATION = "/run/pileus/generation"
RNDADDENTROPY, RNDRESEEDCRNG, BLKFLSBUF = 0x40085203, 0x5207, 0x1261
# A guest that stood still for longer asks for its addresses again.
LONG_PAUSE = 60.0
# What nobody waits for lets the first commands go before.
COMMANDS_FIRST = 3.0


def attempt(function, *args):
    """For what may be missing; True if it worked."""
    try:
        function(*args)
        return True
    except (OSError, RuntimeError, ValueError, KeyError) as err:
        log("skipped:", err)
        return False


def put(path, text, mode=0o644, owner=None):
    """Replaces a file at once, without waiting for the disk."""
    temp = path + ".pileus-new"
    data = text if isinstance(text, bytes) else text.encode()
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        if owner:
            os.fchown(fd, *owner)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    finally:
        os.close(fd)
    os.rename(temp, path)


def prefer(nice, *pids):
    for pid in pids:
        if pid > 1:
            attempt(os.setpriority, os.PRIO_PROCESS, pid, nice)


def reseed(entropy):
    """The host's bytes into the kernel's generator, which then makes a new key."""
    if len(entropy) < 32:
        raise RuntimeError("too little entropy")
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)


def set_hostname(old, name):
    """In the kernel, in /etc, and in cloud-init's record, so that the next boot keeps it."""
    if not re.match(r"^[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?\Z", name):
        raise RuntimeError("not a host name")
    socket.sethostname(name)
    put("/etc/hostname", name + "\n")
    word = re.compile(r"(?<![\w.-])%s(?![\w-])" % re.escape(old))
    for path in ("/etc/hosts", CLOUD_LIB + "/data/previous-hostname", CLOUD_LIB + "/data/set-hostname"):
        text = read_text(path)
        if text:
            put(path, word.sub(name, text))


def flush_seed():
    """The seed disk was exchanged under the guest: what it has in mind of it is out of date."""
    try:
        fd = os.open("/dev/vdb", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(fd, BLKFLSBUF)
    finally:
        os.close(fd)


def grow_root():
    """The disk became larger: the partition of / and its file system follow, as cloud-init does it."""
    words = next((w for w in map(str.split, read_text("/proc/mounts").splitlines()) if w[1:2] == ["/"]), [""] * 3)
    source, kind = words[0], words[2]
    match = re.match(r"^/dev/([a-z]+)(\d*)$", source)
    if not match:
        raise RuntimeError("the root file system lies on %s, which can't be grown" % short(source, 60))
    if match.group(2):
        grow_partition("/dev/" + match.group(1), match.group(2))
    if kind == "xfs":
        run(["xfs_growfs", "/"])
    elif kind == "btrfs":
        run(["btrfs", "filesystem", "resize", "max", "/"])
    else:
        run(["resize2fs", source])


def grow_partition(disk, number):
    """The kernel may learn of the new size a moment after us."""
    for last in (False, False, True):
        done = subprocess.run(["growpart", disk, number], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        text = done.stdout.decode("utf-8", "replace")
        if done.returncode == 0:
            return
        if "NOCHANGE" not in text:
            raise RuntimeError("growpart: " + short(text.strip(), 300))
        if not last:
            time.sleep(0.3)


def grow(agent, _request):
    grow_root()
    return {"disk": report()["disk"]}, lambda: agent.send(report())


SYSTEM = "/sys/devices/system/"


def can_grow(_agent, _request):
    """How many processors this kernel is prepared for, and whether it takes memory that comes later."""
    last = re.findall(r"\d+", read_text(SYSTEM + "cpu/possible"))[-1:]
    return {"cpus": int(last[0]) + 1 if last else 0, "memory": takes_memory()}, None


def takes_memory():
    driver, online = "/sys/bus/virtio/drivers/virtio_mem", SYSTEM + "memory/auto_online_blocks"
    if not os.path.isdir(driver):
        attempt(run, ["modprobe", "virtio_mem"])
    if read_text(online).strip() == "offline":
        # As what can be given back.
        attempt(write_word, online, "online_movable")
    return os.path.isdir(driver) and read_text(online).strip() not in ("", "offline")


def write_word(path, word):
    with open(path, "w") as file:
        file.write(word)


def take_cpus(agent, request):
    """New processors are there a moment after the host put them in, and wait to be used."""
    count, until = int(request["cpus"]), time.monotonic() + 10
    while os.sysconf("SC_NPROCESSORS_ONLN") < count and time.monotonic() < until:
        for name in os.listdir(SYSTEM + "cpu"):
            switch = SYSTEM + "cpu/%s/online" % name
            if re.match(r"^cpu\d+$", name) and read_text(switch).strip() == "0":
                attempt(write_word, switch, "1")
        time.sleep(0.05)
    return {"cpus": os.sysconf("SC_NPROCESSORS_ONLN")}, lambda: agent.send(report())


def rename(agent, request):
    """Another name for the same machine. The host's seed says it too, or cloud-init would undo this."""
    name = str(request["hostname"])
    old = socket.gethostname()
    if old != name:
        set_hostname(old, name)
        flush_seed()
        os.sync()
    # Before the reply: whoever asks next is told the new name.
    agent.send(agent.hello())
    return None, None


def resumed(agent, request):
    """Time has passed in which this machine did not exist, and the host's ends of all ports are new."""
    before = time.time()
    # Everything that reacts to the clock does it now, and can wait.
    prefer(-10, os.getpid(), threading.get_native_id())
    try:
        # timesyncd sees the clock jump and asks its servers; chronyd has to be told.
        time.clock_settime(time.CLOCK_REALTIME, float(request["time"]))
        reseed(bytes.fromhex(request["entropy"]))
        if os.path.exists(GENERATION):
            # The place in time changed (a restored snapshot's does each time): programs may watch this.
            words = read_text(GENERATION).split()[:2]
            put(GENERATION, " ".join(words + [os.urandom(8).hex()]) + "\n")
        for ssh in agent.ssh.values():
            if ssh.visit != agent.visits:
                ssh.hang_up()
        agent.send(agent.hello())
    finally:
        prefer(0, os.getpid(), threading.get_native_id())
    passed = time.time() - before
    return {"passed": passed}, lambda: after_resume(agent, passed)


def after_resume(agent, passed):
    """What nobody waits for."""
    agent.send(report())
    if os.path.exists("/run/chrony/chronyd.pid"):
        attempt(run, ["chronyc", "makestep"])
    if passed < LONG_PAUSE:
        return
    time.sleep(COMMANDS_FIRST)
    # By the guest's own measure of time nothing has expired.
    for pid in pids_of("systemd-resolved.service"):
        attempt(os.kill, pid, signal.SIGUSR2)  # drops its cache
    if pids_of("systemd-networkd.service"):
        cards = [card["name"] for card in addresses() if card["addresses"]]
        attempt(run, ["networkctl", "renew", *cards])


def pids_of(unit):
    """The processes of a unit of systemd, without asking anybody."""
    for base in ("/sys/fs/cgroup", "/sys/fs/cgroup/systemd"):
        text = read_text("%s/system.slice/%s/cgroup.procs" % (base, unit))
        if text:
            return [int(pid) for pid in text.split()]
    return []


def wall(_agent, request):
    """A message to everybody who is logged in. Not by wall(1): it asks utmp who that is, where sshd no longer
    writes down anybody, and then tells nobody."""
    text = "".join(c for c in str(request["text"])[:2000] if c == "\n" or c.isprintable()).strip()
    return {"terminals": tell_terminals(text)}, None


def tell_terminals(text, places=(("/dev/pts", r"\d+"), ("/dev", r"tty1|ttyS\d+|hvc\d+"))):
    """Writes to each terminal whose user wants messages (`mesg y` lets the group write)."""
    line = "\r\n\aMessage from pileus:\r\n\r\n%s\r\n\r\n" % text.replace("\n", "\r\n")
    count = 0
    for folder, names in places:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if not re.match("^(%s)$" % names, name):
                continue
            path = os.path.join(folder, name)
            try:
                if not os.stat(path).st_mode & stat.S_IWGRP:
                    continue
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                count += os.write(fd, line.encode()) > 0
            except OSError:
                pass
            finally:
                os.close(fd)
    return count


def sync(_agent, _request):
    os.sync()
    return None, None


LIFE = {"can-grow": can_grow, "take-cpus": take_cpus, "resumed": resumed, "rename": rename, "grow": grow, "wall": wall, "sync": sync}


