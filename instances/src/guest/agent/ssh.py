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
        # Which visit of a host it was opened in.
        self.visit = 0

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

    def hang_up(self):
        """Begins to end it; the next open waits for that."""
        child = self.child
        if child is not None and child.poll() is None:
            try:
                os.killpg(child.pid, signal.SIGTERM)
            except OSError:
                pass

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


