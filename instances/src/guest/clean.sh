# pileus: makes a guest forget who it is, so that its disk can become an image; then gives back what it doesn't
# use and powers off. Run as root by sh, from standard input. What a system doesn't have is passed over; what may
# not be left is looked for at the end. Next step: its disk is flattened (daemon/src/service/image_making/).

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL
umask 022

have() { command -v "$1" >/dev/null 2>&1; }
say() { echo "clean-up: $*"; }

# Nothing is to be logged or begun any more. The agent stays: it carries this very session.
stop_services() {
    [ -d /run/systemd/system ] || { for s in rsyslog syslog cron; do service "$s" stop; done; return; } 2>/dev/null
    units=$(systemctl list-units --plain --no-legend --type=timer --state=active 2>/dev/null | cut -d' ' -f1)
    # shellcheck disable=SC2086
    timeout 60 systemctl stop $units syslog.socket rsyslog.service syslog-ng.service cron.service \
        unattended-upgrades.service packagekit.service systemd-timesyncd.service 2>/dev/null
    timeout 60 systemctl stop systemd-journald.socket systemd-journald-dev-log.socket \
        systemd-journald-audit.socket systemd-journald-varlink.socket systemd-journald.service 2>/dev/null
}

# Its own hooks (/etc/cloud/clean.d) run too. The machine's id is emptied below: "uninitialized", which it would
# write, makes systemd do first-boot work that packages have done already.
clean_cloud_init() {
    if have cloud-init; then cloud-init clean --logs --seed; fi
    rm -rf /var/lib/cloud/instances /var/lib/cloud/instance /var/lib/cloud/data /var/lib/cloud/sem \
        /var/lib/cloud/seed
    rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init* \
        /etc/NetworkManager/system-connections/cloud-init-* /etc/systemd/network/10-cloud-init-*
}

homes() {
    echo /root
    getent passwd | while IFS=: read -r _ _ uid _ _ home _; do
        if [ "$uid" -ge 1000 ] && [ "$uid" -lt 65534 ] && [ -d "$home" ]; then echo "$home"; fi
    done
}

# The agent, and each line of somebody's authorized_keys that holds a key of ours.
forget_pileus() {
    keys=$(cat /etc/pileus/authorized_keys /etc/pileus/before/authorized_keys 2>/dev/null | awk 'NF > 1 { print $2 }')
    homes | while read -r home; do
        file=$home/.ssh/authorized_keys
        if [ ! -f "$file" ] || [ -L "$file" ] || [ -z "$keys" ]; then continue; fi
        left=$(grep -vF "$keys" "$file")
        if [ -n "$left" ]; then printf '%s\n' "$left" >"$file"; else rm -f "$file"; fi
        rmdir "$home/.ssh" 2>/dev/null
    done
    rm -f /etc/systemd/system/sysinit.target.wants/pileus-agent.service \
        /etc/systemd/system/pileus-agent.service /etc/netplan/60-pileus-later.yaml
    rm -rf /usr/local/lib/pileus /etc/pileus/before /etc/pileus/before.new
    rm -f /etc/pileus/agent.json /etc/pileus/authorized_keys /etc/pileus/ssh_host_*
    # Its owner's hooks stay.
    rmdir /etc/pileus/on-clone.d /etc/pileus 2>/dev/null
}

forget_identity() {
    rm -f /etc/ssh/ssh_host_*
    if [ -e /etc/machine-id ]; then
        : >/etc/machine-id
        chmod 0444 /etc/machine-id
    fi
    [ -L /var/lib/dbus/machine-id ] || rm -f /var/lib/dbus/machine-id
    rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /var/lib/urandom/random-seed \
        /var/lib/misc/random-seed /boot/loader/random-seed /boot/efi/loader/random-seed /efi/loader/random-seed
    name=$(hostname)
    echo localhost >/etc/hostname
    if [ -n "$name" ] && [ -f /etc/hosts ]; then
        others=$(awk -v name="$name" '
            /(^|[ \t])localhost([ \t]|$)/ { print; next }
            { for (i = 2; i <= NF; i++) if ($i == name || index($i, name ".") == 1) next; print }' /etc/hosts) &&
            printf '%s\n' "$others" >/etc/hosts
    fi
    rm -rf /var/lib/dhcp/* /var/lib/dhclient/* /var/lib/dhcpcd/*.lease* /var/lib/NetworkManager/*lease* \
        /var/lib/NetworkManager/timestamps /var/lib/NetworkManager/secret_key /var/lib/NetworkManager/seen-bssids \
        /etc/udev/rules.d/70-persistent-net.rules
    [ ! -f /etc/iscsi/initiatorname.iscsi ] || echo GenerateName=yes >/etc/iscsi/initiatorname.iscsi
    rm -f /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-
}

forget_the_past() {
    homes | while read -r home; do
        rm -f "$home"/.*_history "$home/.lesshst" "$home/.viminfo" "$home/.wget-hsts" \
            "$home/.sudo_as_admin_successful" "$home/.cache/motd.legal-displayed"
    done
    rm -rf /var/log/journal/* /run/log/journal/* /var/lib/wtmpdb/* /var/lib/lastlog/* /var/crash/* \
        /var/lib/systemd/coredump/* /var/lib/systemd/timers/stamp-* /var/spool/mail/root /var/mail/root
    find /var/log -xdev -type f \( -name '*.gz' -o -name '*.xz' -o -name '*.zst' -o -name '*.old' \
        -o -name '*.[0-9]' -o -name '*-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]' -o -name 'cloud-init*' \) -delete
    # Services find the files that they had.
    find /var/log -xdev -type f -size +0 -exec sh -c 'for f; do : >"$f"; done' sh {} +
    rm -rf /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/lib/apt/lists/* \
        /var/cache/dnf/* /var/cache/yum/* /var/cache/debconf/*-old /var/lib/dpkg/*-old
    for place in /tmp /var/tmp; do find "$place" -xdev -mindepth 1 -delete 2>/dev/null; done
}

# What the next step rests on.
look() {
    for path in /etc/ssh/ssh_host_* /etc/pileus/agent.json /etc/pileus/authorized_keys /var/lib/cloud/instance; do
        [ ! -e "$path" ] || { echo "clean-up failed: $path is still there" >&2; return 1; }
    done
    [ ! -s /etc/machine-id ] || { echo "clean-up failed: /etc/machine-id is not empty" >&2; return 1; }
}

# At once: no service ends in good order, which would write again what was removed. All file systems are
# unmounted or become read-only all the same.
POWER_OFF='
sleep 0.5; sync
if [ -d /run/systemd/system ]; then systemctl --force --no-wall poweroff; else poweroff -f; fi
sleep 30; echo o >/proc/sysrq-trigger'

main() {
    say "services are stopped"
    stop_services
    say "what belongs to pileus and cloud-init is removed"
    clean_cloud_init
    forget_pileus
    say "identity, logs and traces are removed"
    forget_identity
    forget_the_past
    look || exit 1
    sync
    if have fstrim; then fstrim -av; fi
    sync
    say "done"
    # In a session of its own, so that this one ends first.
    setsid sh -c "$POWER_OFF" >/dev/null 2>&1 &
}

# All of it is read before anything runs, and nothing that runs reads it.
main </dev/null
