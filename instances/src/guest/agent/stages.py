#!/usr/bin/env python3
"""cloud-init's stages for a clone with user data, by cloud-init's own code in one process.

The template starts this before it is saved and lets it load all of cloud-init; in a clone it is told to run
or to end by one word on its socket. Next: identify.py, which tells it."""

import importlib
import os
import random
import socket
import sys

SOCKET = "/run/pileus/stages.sock"
MODULE_LISTS = ("cloud_init_modules", "cloud_config_modules", "cloud_final_modules")
# Loaded by name in the course of the stages.
MORE = ("cloudinit.sources.DataSourceNoCloud", "cloudinit.net.netplan", "cloudinit.net.networkd",
        "cloudinit.net.sysconfig", "cloudinit.net.eni", "cloudinit.net.activators", "cloudinit.distros.debian",
        "cloudinit.config.schema", "cloudinit.handlers.boot_hook", "cloudinit.handlers.cloud_config",
        "cloudinit.handlers.jinja_template", "cloudinit.handlers.shell_script", "cloudinit.mergers.m_dict",
        "cloudinit.mergers.m_list", "cloudinit.mergers.m_str", "cloudinit.reporting.handlers",
        "jsonschema", "jinja2", "email.mime.text", "email.mime.multipart", "netplan", "pickle", "configobj")


class Stage:
    """In place of cloud-init's agreement with systemd, which has begun all of its services already."""

    experienced_any_error = False
    first_exception = ""
    systemd_exit_code = 0

    def __init__(self, *_):
        pass

    def __call__(self, _name):
        return self

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        if error is not None:
            Stage.first_exception = Stage.first_exception or repr(error)
        Stage.experienced_any_error = Stage.experienced_any_error or error is not None
        return True


def load():
    """Imports what the stages will need; what this cloud-init does not have is left out."""
    from cloudinit.cmd import main
    from cloudinit import safeyaml, util
    wanted = list(MORE)
    try:
        config = safeyaml.load(util.load_text_file("/etc/cloud/cloud.cfg"))
        for key in MODULE_LISTS:
            for entry in config.get(key) or []:
                name = entry[0] if isinstance(entry, list) else entry
                wanted.append("cloudinit.config.cc_" + str(name).replace("-", "_"))
    except Exception as err:
        print("stages: no list of modules:", err, file=sys.stderr)
    for name in wanted:
        try:
            importlib.import_module(name)
        except Exception:
            pass
    try:
        from cloudinit.config import schema
        schema.get_schema()
    except Exception:
        pass
    return main


def run(main):
    """All stages, as a boot runs them."""
    if hasattr(main, "all_stages"):
        main.socket.SocketSync = Stage
        main.socket.sd_notify = lambda *_: None
        return main.main(["cloud-init", "--all-stages"])
    saved = os.dup(1), os.dup(2)
    for args in (["init", "--local"], ["init"], ["modules", "--mode=config"], ["modules", "--mode=final"]):
        # Each stage lays its own tee over these.
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        main.main(["cloud-init", *args])
    return 0


def wait(server):
    """The one word of the agent."""
    while True:
        peer, _ = server.accept()
        with peer:
            word = peer.recv(16)
        if word in (b"run", b"end"):
            return word


if __name__ == "__main__":
    stages = load()
    try:
        os.unlink(SOCKET)
    except OSError:
        pass
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    door.bind(SOCKET)
    os.chmod(SOCKET, 0o600)
    door.listen(1)
    if wait(door) == b"end":
        os._exit(0)
    door.close()
    # Python's own generator was set up before the machine was saved.
    random.seed()
    sys.exit(run(stages))
