

# ---- a copy of another one's disk ----------------------------------------------------------------
# identify, for a guest that has just booted from such a copy, with a seed and a card of its own. The boot
# itself makes most of it new: cloud-init finds another instance's seed, and PID 1 is told the machine's id
# (a boot by firmware tells it nothing). So this looks first, and does what is left.

OTHER_SEEDS = ("/boot/efi/loader/random-seed", "/efi/loader/random-seed", "/boot/loader/random-seed")
RANDOM_SEED = "/var/lib/systemd/random-seed"
LEASES = ("/var/lib/dhcp/*lease*", "/var/lib/NetworkManager/*lease*", "/var/lib/NetworkManager/secret_key")
# Names by which storage knows this machine: the last part is chosen by chance.
ISCSI, NVME_ID, NVME_NAME = "/etc/iscsi/initiatorname.iscsi", "/etc/nvme/hostid", "/etc/nvme/hostnqn"


def former(agent):
    """Whose disk this is a copy of. The boot hook has kept what it wrote over."""
    place = agent.paths.etc + "/before"
    if os.path.isdir(place):
        return Old(argparse.Namespace(etc=place), read_json(place + "/agent.json"))
    # It did not run: then the copy still has all of it.
    return Old(agent.paths, agent.settings)


def take_machine_id(wanted):
    """True if those who read it at their start have read another one."""
    if read_text(MACHINE_ID).strip() != wanted:
        if os.path.ismount(MACHINE_ID):
            libc.umount2(MACHINE_ID.encode(), MNT_DETACH)
        set_machine_id(wanted)
        return True
    dbus = "/var/lib/dbus/machine-id"
    if os.path.isfile(dbus) and not os.path.islink(dbus) and read_text(dbus).strip() != wanted:
        put(dbus, wanted + "\n", 0o644)
    return False


def differs(path, text):
    return read_text(path).strip() != text.strip()


def take_keys(agent, old, request):
    """True if the system's own sshd has to read its keys again."""
    etc = agent.paths.etc
    authorized = [str(key).strip() for key in request["authorized"]]
    if any("\n" in key for key in authorized) or not authorized:
        raise RuntimeError("a key is one line")
    if differs(etc + "/ssh_host_ed25519_key", request["host_key"]):
        put(etc + "/ssh_host_ed25519_key", request["host_key"], 0o600)
    if differs(etc + "/authorized_keys", "\n".join(authorized)):
        put(etc + "/authorized_keys", "".join(key + "\n" for key in authorized))
    for path in ["/root/.ssh/authorized_keys", *glob.glob("/home/*/.ssh/authorized_keys")]:
        text = read_text(path, 1 << 20)
        new = swap_keys(text, old.client, authorized)
        if new != text:
            about = os.stat(path)
            put(path, new, about.st_mode & 0o7777, (about.st_uid, about.st_gid))
    system = "/etc/ssh/ssh_host_ed25519_key"
    if not os.path.isdir("/etc/ssh") or not differs(system, request["host_key"]):
        return False
    remove("/etc/ssh/ssh_host_*")
    put(system, request["host_key"], 0o600)
    put(system + ".pub", request["host_public"].strip() + "\n")
    return True


def swap_keys(text, old, new):
    """A list of keys with the old one's lines gone, and the new one's in their place if they are not there."""
    core = lambda key: " ".join(key.split()[:2])
    gone = [core(key) for key in old if key not in new]
    if not any(key in text for key in gone):
        return text
    out = []
    for line in text.splitlines():
        mine = next((key for key in gone if key in line), None)
        if mine is None:
            out.append(line)
            continue
        for key in map(core, new):
            if not any(key in other for other in text.splitlines() + out):
                out.append(line.replace(mine, key))
    return "".join(line + "\n" for line in out)


def take_record(old, request, settings):
    """cloud-init's record: its own of this boot, or the copied one made over if it did not run."""
    link, new = CLOUD_LIB + "/instance", settings["instance"]
    try:
        now = os.path.basename(os.readlink(link))
    except OSError:
        return
    if now == old.instance != new:
        old.collect()
        write_cloud_init(old, Change(old, request, settings))
        now = new
    for folder in glob.glob(CLOUD_LIB + "/instances/*"):
        if os.path.basename(folder) not in (now, new):
            remove(folder)


def take_seeds():
    """What the next boot would begin with, and what was drawn once, as on the other machine. A fork's disk has it too."""
    remove(*OTHER_SEEDS)
    if os.path.exists(RANDOM_SEED):
        put(RANDOM_SEED, os.urandom(512), 0o600)
    # Is made anew when it is needed. What it encrypted is lost to a copy in any case: it holds the machine's id.
    remove("/var/lib/systemd/credential.secret")


def take_secrets():
    """What was drawn by chance, once, on the other machine."""
    take_seeds()
    booted_at = next((int(l.split()[1]) for l in read_text("/proc/stat", 1 << 20).splitlines() if l.startswith("btime ")), 0)
    remove(*(path for pattern in LEASES for path in glob.glob(pattern) if os.stat(path).st_mtime < booted_at))
    text = read_text(ISCSI)
    if text:
        put(ISCSI, re.sub(r"(?m)^(InitiatorName=\S+:)[0-9a-f]+\s*$", lambda m: m.group(1) + os.urandom(6).hex(), text), 0o600)
    if os.path.exists(NVME_ID) or os.path.exists(NVME_NAME):
        uuid = read_text("/proc/sys/kernel/random/uuid").strip()
        put(NVME_ID, uuid + "\n")
        put(NVME_NAME, "nqn.2014-08.org.nvmexpress:uuid:%s\n" % uuid)


def take_network(nic, instance):
    """True if the card can't come up, because the copy is set up for the other one's."""
    nic["mac"] = nic["mac"].lower()
    if not Network.ready(nic) or nic["mac"] in read_text(NETPLAN) or not pids_of(NETWORKD):
        return False
    write_network(nic, instance)
    network_files(NETWORKD_RUN, "PermanentMACAddress=" + nic["mac"])
    return True


def booted(agent, request):
    """Returns [[step, milliseconds]]. May be asked again after it was interrupted."""
    steps = Steps()
    reseed(bytes.fromhex(request["entropy"]))
    time.clock_settime(time.CLOCK_REALTIME, float(request["time"]))
    os.makedirs("/run/pileus", mode=0o755, exist_ok=True)
    old = former(agent)
    settings = dict(agent.settings, instance=str(request["instance"]))
    for key in ("user", "uid", "timezone"):
        if request.get(key):
            settings[key] = request[key]
    steps.mark("random and clock")
    other = take_machine_id(request["machine_id"])
    steps.mark("machine-id")
    if socket.gethostname() != request["hostname"]:
        set_hostname(socket.gethostname(), request["hostname"])
    keys = take_keys(agent, old, request)
    steps.mark("names and keys")
    take_record(old, request, settings)
    # Byte by byte what the boot hook writes, so that it has no reason to start the agent anew.
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    if differs(agent.paths.etc + "/agent.json", text):
        put(agent.paths.etc + "/agent.json", text + "\n", 0o600)
    agent.settings = settings
    steps.mark("cloud-init's record")
    take_secrets()
    put(GENERATION, "%s %s\n" % (settings["instance"], request["machine_id"]))
    steps.mark("secrets")
    nic = request.get("nic")
    network = Network() if nic else None
    logins = []
    lost = bool(nic) and take_network(nic, settings["instance"])
    if other or lost:
        restart_all(steps, nic)
    elif keys:
        logins = [Login(pid) for pid in map(main_pid, SSHD_UNITS) if pid > 1]
        for login in logins:
            login.renew()
    remove(*(path for path in glob.glob("/var/log/journal/*")
             if re.match(r"^[0-9a-f]{32}$", os.path.basename(path)) and not path.endswith(request["machine_id"])))
    steps.mark("journals")
    run_hooks(request)
    steps.mark("hooks")
    if request.get("grow"):
        grow_root()
        steps.mark("grow")
    if network:
        network.wait(nic, steps)
    for login in logins:
        login.wait()
    remove(agent.paths.etc + "/before")
    announce(agent)
    return {"steps": steps.done}, lambda: (os.sync(), agent.send(report()))
