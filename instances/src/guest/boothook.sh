#!/bin/sh
# pileus: puts the guest agent in place and starts it. cloud-init runs this at every boot in its
# network stage; it must be quick, must not wait for anything, and must not fail the boot.
umask 077
dir=/usr/local/lib/pileus
etc=/etc/pileus
python=
for path in /usr/bin/python3 /usr/local/bin/python3 /usr/libexec/platform-python; do
    if [ -x "$path" ]; then python=$path; break; fi
done
[ -n "$python" ] || { echo "pileus: no Python 3, no agent" >&2; exit 0; }
mkdir -p "$dir" "$etc"
chmod 755 "$dir" "$etc"

# put MODE PATH: replaces PATH by standard input; true if that changed it.
put() {
    cat >"$2.new" || return 1
    chmod "$1" "$2.new"
    if [ -f "$2" ] && [ "$(cat "$2")" = "$(cat "$2.new")" ]; then rm -f "$2.new"; return 1; fi
    mv -f "$2.new" "$2"
}

# A copy of another instance's disk: who that was is kept until the agent has made it somebody else.
if [ -f "$etc/agent.json" ]; then
    case $(cat "$etc/agent.json") in
    *'"instance":"@INSTANCE@"'*) ;;
    *)
        rm -rf "$etc/before" "$etc/before.new"
        mkdir "$etc/before.new" &&
            cp -p "$etc/agent.json" "$etc/authorized_keys" "$etc/ssh_host_ed25519_key" "$etc/before.new/" &&
            mv "$etc/before.new" "$etc/before"
        ;;
    esac
fi

changed=
put 755 "$dir/agent.py" <<'END-OF-PILEUS-FILE' && changed=1
@AGENT@
END-OF-PILEUS-FILE
put 755 "$dir/clone.py" <<'END-OF-PILEUS-FILE' && changed=1
@CLONE@
END-OF-PILEUS-FILE
put 755 "$dir/stages.py" <<'END-OF-PILEUS-FILE' && changed=1
@STAGES@
END-OF-PILEUS-FILE
put 600 "$etc/agent.json" <<'END-OF-PILEUS-FILE' && changed=1
@SETTINGS@
END-OF-PILEUS-FILE
put 600 "$etc/ssh_host_ed25519_key" <<'END-OF-PILEUS-FILE'
@HOST_KEY@
END-OF-PILEUS-FILE
put 644 "$etc/authorized_keys" <<'END-OF-PILEUS-FILE'
@AUTHORIZED@
END-OF-PILEUS-FILE

# Where the user data may make users, cloud-init makes the login user last, and another one would have
# its id by then. Made now, as cloud-init would make it; it finds it there and adds keys and sudo.
login=@LOGIN@
if [ -n "$login" ] && ! getent passwd "$login" >/dev/null && ! getent passwd 1000 >/dev/null; then
    # What the image's configuration says last counts, as it does for cloud-init.
    told() { cat /etc/cloud/cloud.cfg /etc/cloud/cloud.cfg.d/*.cfg 2>/dev/null | sed -n "s/^ *$1: *//p" | tail -n 1; }
    groups=
    for group in $(told groups | tr -d '[]' | tr ',' ' '); do
        getent group "$group" >/dev/null && groups=$groups${groups:+,}$group
    done
    gecos=$(told gecos)
    useradd -m -u 1000 -U -s /bin/bash -c "$gecos" ${groups:+-G "$groups"} "$login" || :
fi

# cloud-init sets up the cards of a first boot; one that came later is for us.
plan=/etc/netplan/60-pileus-later.yaml
later=
for mac in @EXTRA@; do
    grep -qsi "$mac" /etc/netplan/50-cloud-init.yaml || later="$later $mac"
done
if [ -n "$later" ] && command -v netplan >/dev/null; then
    number=0
    {
        echo 'network: {version: 2, ethernets: {'
        for mac in $later; do
            number=$((number + 1))
            echo "later$number: {match: {macaddress: \"$mac\"}, dhcp4: true, optional: true," \
                "dhcp4-overrides: {route-metric: 200, use-hostname: false}},"
        done
        echo '}}'
    } | put 600 "$plan" && systemd-run --no-block --collect netplan apply
else
    rm -f "$plan"
fi

# cloud-init runs for a clone whose agent is at work already.
[ -e /run/pileus/keep-agent ] && exit 0

if [ -d /run/systemd/system ]; then
    unit=/etc/systemd/system/pileus-agent.service
    [ -e "$unit" ] && known=1 || known=
    if put 644 "$unit" <<END-OF-PILEUS-FILE
[Unit]
Description=pileus guest agent
DefaultDependencies=no
After=local-fs.target
Before=shutdown.target
Conflicts=shutdown.target

[Service]
ExecStart=$python -I -S $dir/agent.py
Restart=always
RestartSec=1
TasksMax=infinity

[Install]
WantedBy=sysinit.target
END-OF-PILEUS-FILE
    then
        mkdir -p /etc/systemd/system/sysinit.target.wants
        chmod 755 /etc/systemd/system/sysinit.target.wants
        ln -sf "$unit" /etc/systemd/system/sysinit.target.wants/pileus-agent.service
        [ -z "$known" ] || systemctl daemon-reload
        changed=1
    fi
    if [ -n "$changed" ]; then
        systemctl --no-block restart pileus-agent.service
    else
        systemctl --no-block start pileus-agent.service
    fi
else
    # No systemd: a plain process of this boot, one at a time.
    pid=$(cat /run/pileus-agent.pid 2>/dev/null)
    if [ -z "$pid" ] || ! kill -0 "$pid" 2>/dev/null; then
        setsid "$python" -I -S "$dir/agent.py" </dev/null >/dev/null 2>&1 &
        echo $! >/run/pileus-agent.pid
    fi
fi
exit 0
