# The customize hook of the local build: turns the root that mmdebstrap has just unpacked into a
# bootable cloud image. mmdebstrap runs this text with `sh -c`, the root folder is $1.
# It works without loop devices or real root, so it is the same in --mode=root and in
# --mode=unshare. What it makes leaves through open files, because an unprivileged build can't
# reach the caller's folders by path:
#   100 the disk   101 the kernel   102 the initrd
# (high numbers: mmdebstrap's own must stay below 10 for its `sh -c 'cat >&N'`), opened again here as
# /proc/self/fd/N. images/src/hosts/build.rs puts the variables below in front: LABEL CMDLINE DISK_MIB
set -eu
root=$1
phase() { echo "pileus-phase: $*" >&2; }

write() { # write MODE PATH: content on stdin
    mkdir -p "$root${2%/*}"
    cat >"$root$2"
    chmod "$1" "$root$2"
}

phase "configuring the system"

write 0644 /etc/fstab <<END
LABEL=$LABEL / ext4 defaults,errors=remount-ro 0 1
END

write 0644 /etc/default/grub <<END
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="$CMDLINE"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
GRUB_DISABLE_RECOVERY=true
END

write 0644 /etc/cloud/cloud.cfg.d/90_pileus.cfg <<'END'
# The seed is the only data source: no search for a cloud's metadata service.
datasource_list: [NoCloud, None]
disable_root: true
# The archive that the image was made from keeps being used.
apt:
  preserve_sources_list: true
growpart:
  mode: auto
  devices: ['/']
  ignore_growroot_disabled: false
resize_rootfs: true
# One type of host key: an RSA key alone takes seconds to make in an emulated machine.
ssh_genkeytypes: [ed25519]
system_info:
  default_user:
    # What scripts written for Multipass expect.
    name: ubuntu
    uid: 1000
    gecos: Ubuntu
    lock_passwd: true
    groups: [adm, audio, cdrom, dialout, dip, floppy, netdev, plugdev, sudo, video]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
END

write 0644 /etc/ssh/sshd_config.d/10-pileus.conf <<'END'
# Reverse look-ups wait for a name server that may not be there.
UseDNS no
END

printf 'LANG=C.UTF-8\n' | write 0644 /etc/default/locale
printf 'localhost\n' | write 0644 /etc/hostname
write 0644 /etc/hosts <<'END'
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
END

# A machine without a NIC (a template that is being saved) must not wait for one.
write 0644 /etc/systemd/system/systemd-networkd-wait-online.service.d/10-pileus.conf <<'END'
[Service]
ExecCondition=/bin/sh -c 'ls -d /sys/class/net/*/device >/dev/null 2>&1'
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=20
END

# Upkeep runs at its time of day, not in the first minutes of a machine that may live for ten.
for timer in apt-daily apt-daily-upgrade man-db e2scrub_all fstrim dpkg-db-backup; do
    write 0644 "/etc/systemd/system/$timer.timer.d/10-pileus.conf" <<'END'
[Timer]
Persistent=false
END
done

# Nothing needs these in a virtual machine of this kind, and each costs boot time: LVM snapshots of
# e2scrub, crash dumps of firmware, GRUB's count of failed boots, SSH over a vsock that isn't there.
mkdir -p "$root/etc/systemd/system-generators"
for unit in e2scrub_reap.service systemd-pstore.service grub-common.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
ln -sf /dev/null "$root/etc/systemd/system-generators/systemd-ssh-generator"
rm -f "$root"/usr/lib/binfmt.d/python3*.conf
# The groups that cloud-init would make as ordinary ones, taking the user's gid 1000.
for group in netdev; do
    chroot "$root" groupadd --system --force "$group"
done
chroot "$root" systemctl enable --quiet systemd-networkd.service ssh.service
if [ -e "$root/lib/systemd/system/systemd-resolved.service" ]; then
    chroot "$root" systemctl enable --quiet systemd-resolved.service
fi
# Compatibility with resolv.conf of systemd-resolved; apt inside the build needs the network no more.
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

phase "making the initial RAM disk"
# Only what finds and mounts the root: it is unpacked at each boot. The modules are there for udev to
# choose from; listed in /etc/initramfs-tools/modules they would all be loaded. No SATA: its slow
# probing would hold up each boot of a machine that has the controller and no disk on it.
write 0644 /etc/initramfs-tools/conf.d/pileus <<'END'
MODULES=list
COMPRESS=lz4
FSTYPE=ext4
END
write 0755 /etc/initramfs-tools/hooks/pileus <<'END'
#!/bin/sh
[ "${1-}" != prereqs ] || exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_pci virtio_blk virtio_scsi sd_mod nvme ext4
END
kernel=$(cd "$root/boot" && ls vmlinuz-* | sort -V | tail -n 1)
version=${kernel#vmlinuz-}
chroot "$root" update-initramfs -u -k "$version" >&2

phase "cleaning up"
chroot "$root" passwd -l root >/dev/null
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old \
    "$root"/var/lib/dpkg/*-old "$root"/var/log/* "$root"/var/lib/cloud "$root"/var/tmp/* \
    "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed "$root"/run/* \
    "$root"/var/lib/dbus/machine-id "$root"/etc/.pwd.lock "$root"/etc/*-
mkdir -p "$root/var/log/journal"
# What mmdebstrap would take away after this hook, when the disk is written already: services that must
# not start, its apt and dpkg options.
rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/apt/apt.conf.d/00mmdebstrap" \
    "$root/etc/apt/apt.conf.d/99debconf" "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
for program in "$root/sbin/start-stop-daemon" "$root/usr/sbin/start-stop-daemon"; do
    if [ -e "$program.REAL" ]; then mv -f "$program.REAL" "$program"; fi
done
# Empty, not "uninitialized": systemd then gives the machine its id without running first-boot work.
: >"$root/etc/machine-id"
chmod 0444 "$root/etc/machine-id"
# The package scripts have done the work that systemd repeats when these are older than /usr.
touch "$root/usr" "$root/etc/.updated" "$root/var/.updated"

phase "writing the disk"
write 0644 /boot/grub/grub.cfg <<END
# Written when the image was made; update-grub replaces it in the running machine.
serial --unit=0 --speed=115200
terminal_output serial
set timeout=0
search --no-floppy --label --set=root $LABEL
linux /boot/$kernel root=LABEL=$LABEL $CMDLINE
initrd /boot/initrd.img-$version
boot
END
mkdir -p "$root/boot/grub/i386-pc"
cp "$root"/usr/lib/grub/i386-pc/*.mod "$root"/usr/lib/grub/i386-pc/*.lst "$root/boot/grub/i386-pc/"
chroot "$root" grub-mkimage --format=i386-pc --output=/boot/grub/i386-pc/core.img \
    --prefix='(hd0,msdos1)/boot/grub' \
    biosdisk part_msdos ext2 normal configfile linux search search_label search_fs_uuid \
    serial terminal echo test minicmd ls cat boot
cp "$root/usr/lib/grub/i386-pc/boot.img" "$root/boot/grub/i386-pc/boot.img"

disk=/proc/self/fd/100
truncate -s "${DISK_MIB}M" "$disk"
# The features that GRUB can't read are off; the storage is known to be zero, so the guest need not
# write its inode tables.
# mmdebstrap has /proc, /sys and /dev mounted below the root: a plain bind mount of it, in a mount
# namespace of its own, shows the files without them. An empty /tmp hides what mmdebstrap keeps there.
unshare --mount --propagation private sh -euc '
    mount --bind "$0" "$0/mnt"
    mount -t tmpfs -o mode=1777 tmpfs "$0/mnt/tmp"
    exec "$@"' "$root" \
    mke2fs -q -F -t ext4 -L "$LABEL" -O '^metadata_csum_seed,^orphan_file' -m 1 -J size=32 \
    -E offset=1048576,nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 \
    -d "$root/mnt" "$disk" "$(((DISK_MIB - 1) * 1024))k" >&2
core="$root/boot/grub/i386-pc/core.img"
[ "$(stat -c %s "$core")" -le $((2047 * 512)) ]
dd if="$root/boot/grub/i386-pc/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$core" of="$disk" bs=512 seek=1 conv=notrunc status=none
# One bootable Linux partition from 1 MiB to the end, and the signature.
sectors=$(((DISK_MIB - 1) * 2048))
le32() { printf "\\$(printf %o $(($1 & 255)))\\$(printf %o $(($1 >> 8 & 255)))\\$(printf %o $(($1 >> 16 & 255)))\\$(printf %o $(($1 >> 24 & 255)))"; }
{
    printf '\200\376\377\377\203\376\377\377'
    le32 2048
    le32 "$sectors"
} | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none

cat "$root/boot/$kernel" >/proc/self/fd/101
cat "$root/boot/initrd.img-$version" >/proc/self/fd/102
phase "done"
