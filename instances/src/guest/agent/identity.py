

# ---- identity ------------------------------------------------------------------------------------
# Each value that must differ between two clones, for `verify-unique`. Secrets only as SHA-256.
# Not told: the SMBIOS UUID, which is part of the saved machine and can't differ.


def print_of(data):
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def bus_machine_id(name):
    text = output(["busctl", "call", name, "/", "org.freedesktop.DBus.Peer", "GetMachineId"], 10)
    found = re.search(r'"([0-9a-f]{32})"', text)
    return [found.group(1)] if found else []


def identity():
    items = {}
    lines = lambda text: [l.strip() for l in text.splitlines() if l.strip()]
    items["machine-id"] = lines(read_text(MACHINE_ID))
    items["machine-id of D-Bus"] = lines(read_text("/var/lib/dbus/machine-id"))
    items["machine-id of PID 1"] = bus_machine_id("org.freedesktop.systemd1")
    items["machine-id of systemd-networkd"] = bus_machine_id("org.freedesktop.network1")
    items["machine-id of systemd-logind"] = bus_machine_id("org.freedesktop.login1")
    items["journal"] = current_journal()
    items["boot-id"] = lines(read_text(BOOT_ID))
    items["hostname"] = sorted({socket.gethostname(), read_text("/etc/hostname").strip()})
    links = addresses()
    items["MAC"] = [i["mac"] for i in links]
    items["IPv4"] = [a for i in links for a in i["addresses"] if ":" not in a]
    items["IPv6"] = [a for i in links for a in i["addresses"] if ":" in a] + link_local()
    leases = "".join(read_text(p) for p in glob.glob("/run/systemd/netif/leases/*"))
    items["DHCP client id"] = re.findall(r"^CLIENTID=(\S+)", leases, re.M)
    states = "".join(read_text(p) for p in glob.glob("/run/systemd/netif/links/*"))
    items["DHCP DUID"] = sorted(set(re.findall(r"^DHCP6_CLIENT_DUID=(\S+)", states, re.M)))
    for path in sorted(glob.glob("/etc/ssh/ssh_host_*_key.pub")):
        items["host key " + os.path.basename(path)] = [print_of(read_text(path).split()[1])]
    for path in sorted(glob.glob("/etc/ssh/ssh_host_*_key") + ["/etc/pileus/ssh_host_ed25519_key"]):
        items["private key " + path] = [print_of(read_text(path))]
    for path in ["/etc/pileus/authorized_keys", "/root/.ssh/authorized_keys", *glob.glob("/home/*/.ssh/authorized_keys")]:
        items["authorized keys " + path] = [print_of(l) for l in lines(read_text(path))]
    items["instance-id"] = lines(read_text(CLOUD_LIB + "/data/instance-id")) + lines(read_text(CLOUD_RUN + "/.instance-id"))
    data = read_json(CLOUD_RUN + "/instance-data.json").get("v1")
    items["instance-id told by cloud-init"] = [str(data.get("instance_id"))] if isinstance(data, dict) else []
    try:
        items["instance-id folder"] = [os.path.basename(os.readlink(CLOUD_LIB + "/instance"))]
    except OSError:
        pass
    items["random of the kernel"] = [print_of(os.urandom(32))]
    items["random of a new process"] = lines(output(["cat", "/proc/sys/kernel/random/uuid"]))
    seed = "/var/lib/systemd/random-seed"
    if os.path.exists(seed):
        with open(seed, "rb") as file:
            items["random seed"] = [print_of(file.read())]
    items["generation"] = [print_of(read_text(GENERATION))] if os.path.exists(GENERATION) else []
    return {"items": {name[:64]: [short(v, 200) for v in values[:32]] for name, values in items.items() if values},
            "clock": time.time()}


def current_journal():
    """The id under which journald writes now; a fork keeps its origin's old journal beside it."""
    found = glob.glob("/var/log/journal/*/system.journal") + glob.glob("/run/log/journal/*/system.journal")
    found.sort(key=lambda path: modified(path) or (0,))
    return [os.path.basename(os.path.dirname(path)) for path in found[-1:]]


def link_local():
    """addresses() leaves these out, because nobody far can use them."""
    out = []
    for line in read_text("/proc/net/if_inet6").splitlines():
        words = line.split()
        if len(words) == 6 and words[3] == "20":
            out.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])) + "/64")
    return out


# What the agent's loop may ask for: (agent, request) -> (answer, what to do after it).
REQUESTS = {
    "quiesce": lambda agent, request: (quiesce(agent, min(600.0, float(request.get("bound", 120)))), None),
    "identify": lambda agent, request: identify(agent, request),
    "name": lambda agent, request: name(agent, request),
    "identity": lambda agent, request: (identity(), None),
}
