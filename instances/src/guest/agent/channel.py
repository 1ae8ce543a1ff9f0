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
# The same for a clone that waits to become somebody.
QUIET_TICK = 0.02


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


