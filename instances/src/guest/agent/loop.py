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
        # A template's guest at rest, and not yet somebody: what clone.py then knows.
        self.quiet = None
        # A clone with a provisional name: what it was made of.
        self.standby = None
        self.clone = None
        # How often a host has come to the agent's port.
        self.visits = 0
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
        if self.quiet is not None:
            # Nothing is told of a clone that is nobody yet, but that it is there.
            self.send(dict(self.hello(), template=True))
            return
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
            self.visits += 1
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
            ssh.visit = self.visits
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
        if what in LIFE:
            return LIFE[what](self, request)
        if what in ("quiesce", "identify", "name", "identity"):
            return self.clone_part()[what](self, request)
        if what in ("poweroff", "reboot"):
            return None, lambda: self.shut_down(what)
        raise RuntimeError("unknown request " + short(what, 40))

    def clone_part(self):
        """What only templates and clones need, from the file beside this one; it uses our names."""
        if self.clone is None:
            path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "clone.py")
            with open(path, "rb") as file:
                code = compile(file.read(), path, "exec")
            names = dict(globals(), __name__="clone")
            exec(code, names)
            self.clone = names["REQUESTS"]
        return self.clone

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
            elif self.quiet is not None:
                wait = QUIET_TICK
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
