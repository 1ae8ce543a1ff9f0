//! The whole way of an image, with real guests: built by a recipe, verified, brought to a second storage,
//! launched there and used; an instance of it packed again. And a disk made by a kernel and an initrd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pileus_testkit::{Daemon, Need, Options, need};

const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Tun,
    Need::Guest,
    Need::Program("zstd"),
    Need::Program("tar"),
];

/// What makes the guest itself.
const IDENTITY: &str =
    "cat /etc/machine-id; cat /etc/ssh/ssh_host_*_key.pub | cut -d' ' -f2 | sort";

fn write(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path.display().to_string()
}

/// Built, packed, verified, imported on a second storage, launched and used.
#[test]
fn guest_images_are_made_and_travel() {
    if !need(&NEEDS) {
        return;
    }
    let here = Daemon::start(Options::real());
    let folder = here.folder().to_owned();
    write(&folder, "site/deep/index.html", "<p>made</p>\n");
    write(&folder, "one.txt", "one file\n");
    let script = folder.join("site/run.sh");
    fs::write(&script, "#!/bin/sh\necho runs\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode).unwrap();
    let recipe = write(
        &folder,
        "recipe.yaml",
        "\
from: build:debian-13
user-data: |
  #cloud-config
  write_files: [{path: /etc/from-user-data, content: it ran}]
timeout: 15m
title: Tests' own
version: '7'
steps:
  - name: files
    copy: {from: site, to: /srv/}
  - copy: {from: one.txt, to: /opt/new/name.txt}
  - name: script
    env: {GREETING: 'hello, $HOME \"x\"'}
    run: |
      test \"$(id -u)\" = 0
      echo \"$GREETING\" > /srv/greeting
      cat > /srv/stdin
      logger 'a line that tells too much'
      echo secret > /root/.bash_history
      dd if=/dev/urandom of=/root/junk bs=1M count=64 status=none
      sync
      rm /root/junk
      /srv/site/run.sh
  - run: 'open(\"/srv/python\", \"w\").write(\"yes\")'
    shell: python3 -I
machine: {memory: 768, cores: 1}
",
    );
    let file = folder.join("built.tar.zst").display().to_string();
    let built = here.run(&["image", "build", &recipe, &file, "--tag", "own"]);
    built.ok_with_words();
    eprintln!("{}", built.stderr);
    assert!(built.stderr.contains("runs"), "{}", built.stderr);
    assert!(built.stderr.contains("clean-up: done"), "{}", built.stderr);
    assert_eq!(here.run(&["list"]).ok(), "No instances found.\n");
    let size = fs::metadata(&file).unwrap().len();
    assert!(
        size < 400 << 20,
        "{size} bytes: what was removed is still there"
    );
    here.run(&["image", "verify", "own"]).ok_with_words();

    // Another storage, where nothing of it is known.
    let there = Daemon::start(Options::default());
    let copy = there.folder().join("x.tar.zst");
    fs::copy(&file, &copy).unwrap();
    let copy = copy.display().to_string();
    there
        .run(&["image", "import", &copy, "--tag", "own"])
        .ok_with_words();
    there.run(&["image", "verify", "own"]).ok_with_words();
    std::thread::scope(|scope| {
        // Both boot by firmware; side by side they take no longer.
        scope.spawn(|| {
            there
                .run(&["launch", "own", "--name", "web", "--timeout", "900"])
                .ok_with_words()
        });
        scope.spawn(|| {
            here.run(&["launch", "own", "--name", "web", "--timeout", "900"])
                .ok_with_words()
        });
    });
    for daemon in [&there, &here] {
        looks_as_made(daemon);
    }
    let (this, other) = (here.script("web", IDENTITY), there.script("web", IDENTITY));
    assert_ne!(this, other);
    assert_eq!(this.lines().count(), other.lines().count());
    assert!(
        this.lines().zip(other.lines()).all(|(a, b)| a != b),
        "{this}{other}"
    );
    assert_eq!(there.exec("web", &["hostname"]), "web\n");

    packed_again(&here, &there, &this);
}

/// What the steps did is there, and nothing of the machine that they ran in.
fn looks_as_made(daemon: &Daemon) {
    let files = "cd /srv; cat site/deep/index.html greeting python; echo; site/run.sh; cat /opt/new/name.txt \
                 /etc/from-user-data; echo; stat -c '%u %a' site site/run.sh /opt/new/name.txt; wc -c < stdin";
    assert_eq!(
        daemon.script("web", files),
        "<p>made</p>\nhello, $HOME \"x\"\nyes\nruns\none file\nit ran\n0 755\n0 755\n0 644\n0\n"
    );
    let memory = daemon.exec("web", &["awk", "/MemTotal/ {print $2}", "/proc/meminfo"]);
    let memory: u64 = memory.trim().parse().unwrap();
    assert!((600 << 10..800 << 10).contains(&memory), "{memory} KiB");
    // The name of the machine that it was made in, and what was said there.
    let traces = "journalctl --no-pager -q | grep -c 'tells too much' || :; \
                  grep -rlE 'tells too much|build-[0-9a-f]{8}|pack-[0-9a-f]{8}' /etc /var /root /home /opt /usr/local \
                  2>/dev/null || :; cat /root/.bash_history 2>/dev/null || :";
    assert_eq!(daemon.script("web", traces), "0\n");
    let told = daemon.exec("web", &["cloud-init", "status"]);
    assert_eq!(told.trim(), "status: done");
    let keys = "cat /home/ubuntu/.ssh/authorized_keys /root/.ssh/authorized_keys /etc/pileus/authorized_keys \
                2>/dev/null | grep -o 'AAAA[^ ]*' | sort -u | wc -l";
    assert_eq!(
        daemon.script("web", keys),
        "1\n",
        "keys of another machine are left"
    );
    let boots = daemon.script("web", "journalctl --list-boots -q | wc -l");
    assert_eq!(boots, "1\n");
}

/// An instance that ran, with a snapshot of its own, becomes an image that is again somebody else.
fn packed_again(here: &Daemon, there: &Daemon, before: &str) {
    here.script("web", "echo kept > /srv/kept; sync");
    here.run(&["stop", "web"]).ok();
    here.run(&["snapshot", "web", "-n", "before"]).ok();
    let file = here.folder().join("packed.tar.zst").display().to_string();
    let packed = here.run(&["image", "pack", "web.before", &file, "--timeout", "900"]);
    packed.ok_with_words();
    let all = here.run(&["list", "--format", "json"]).json();
    assert_eq!(all["list"].as_array().unwrap().len(), 1);
    assert_eq!(here.state("web"), "Stopped");
    let copy = there.folder().join("packed.tar.zst").display().to_string();
    fs::copy(&file, &copy).unwrap();
    there
        .run(&["launch", &copy, "--name", "again", "--timeout", "900"])
        .ok_with_words();
    assert_eq!(there.script("again", "cat /srv/kept"), "kept\n");
    let now = there.script("again", IDENTITY);
    assert!(
        before.lines().all(|old| now.lines().all(|new| old != new)),
        "{before}{now}"
    );
    let traces = "grep -rlE 'pack-[0-9a-f]{8}' /etc /var /root /home /usr/local 2>/dev/null || :";
    assert_eq!(there.script("again", traces), "");
    assert_eq!(there.exec("again", &["hostname"]), "again\n");
}

/// A step that fails ends the build with its words; the machine stays only if that is wished.
#[test]
fn guest_steps_that_fail() {
    if !need(&NEEDS) {
        return;
    }
    let here = Daemon::start(Options::real());
    let text = "from: build:debian-13\ntimeout: 15m\nsteps:\n  - {name: bad, run: 'echo said before; exit 7'}\n  - run: touch /never\n";
    let recipe = write(here.folder(), "recipe.yaml", text);
    let out = here.folder().join("x.tar.zst").display().to_string();
    let failed = here.run(&["image", "build", &recipe, &out, "--keep-on-error"]);
    let told = failed.fails_with(2);
    for word in [
        "step 1 (bad) failed",
        "exit code 7",
        "said before",
        "step-failed",
    ] {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert!(!Path::new(&out).exists());
    let list = here.run(&["list", "--format", "json"]).json();
    let name = list["list"][0]["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("build-") && told.contains(&name), "{told}");
    assert_eq!(here.exec(&name, &["echo", "there"]), "there\n");
    here.run(&["delete", "--purge", &name]).ok();
}

/// What lies beside the tests' image.
fn beside_the_image(daemon: &Daemon, name: &str) -> PathBuf {
    let images = daemon.storage().join("data/images");
    let found = fs::read_dir(images).unwrap().flatten();
    let mut found = found.map(|entry| entry.path().join(name));
    found.find(|path| path.exists()).unwrap()
}

/// A file in the form of an initrd's, in front of others.
fn initrd_with(name: &str, content: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, mode, content) in [(name, 0o100_755, content), ("TRAILER!!!", 0, "")] {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        bytes.extend(b"070701");
        for field in fields {
            bytes.extend(format!("{field:08x}").bytes());
        }
        bytes.extend(name.bytes().chain([0]));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(content.bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// An installer: it writes to the disk and powers off.
const INSTALL: &str = "\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modprobe virtio_pci
modprobe virtio_blk
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 1; done
echo 'it was installed' > /text
dd if=/text of=/dev/vda bs=512 seek=9
sync
echo installed
poweroff -f
";

/// The installer's kernel and initrd, in the daemon's folder.
fn installer(here: &Daemon) {
    let mut initrd = initrd_with("install", INSTALL);
    initrd.extend(fs::read(beside_the_image(here, "initrd")).unwrap());
    fs::create_dir_all(here.folder().join("cd")).unwrap();
    fs::write(here.folder().join("cd/initrd"), initrd).unwrap();
    let kernel = beside_the_image(here, "kernel");
    fs::copy(kernel, here.folder().join("cd/vmlinuz")).unwrap();
}

/// An empty disk, on which the installer ran, became an image.
fn installs(here: &Daemon, from: &str) {
    let text = format!("from: {from}\ndisk: 16M\nmachine: {{memory: 768}}\ntimeout: 10m\n");
    let recipe = write(here.folder(), "recipe.yaml", &text);
    let out = here.folder().join("x.tar.zst").display().to_string();
    here.run(&["image", "build", &recipe, &out]).ok_with_words();
    let read = format!("zstd -dqc {out} | tar -xO disk.img | dd bs=512 skip=9 count=1 status=none");
    let read = Command::new("sh").args(["-c", &read]).output().unwrap();
    assert!(read.stdout.starts_with(b"it was installed\n"), "{read:?}");
    assert_eq!(here.run(&["list"]).ok(), "No instances found.\n");
}

#[test]
fn guest_kernels_install() {
    if !need(&NEEDS) {
        return;
    }
    let here = Daemon::start(Options::real());
    installer(&here);
    installs(
        &here,
        "{kernel: cd/vmlinuz, initrd: cd/initrd, cmdline: console=ttyS0 rdinit=/install}",
    );
}

/// By firmware, from a disc with a boot loader.
#[test]
fn guest_discs_install() {
    if !need(&[&NEEDS[..], &[Need::Program("genisoimage")]].concat()) {
        return;
    }
    let here = Daemon::start(Options::real());
    installer(&here);
    let cd = here.folder().join("cd");
    for part in [
        "/usr/lib/ISOLINUX/isolinux.bin",
        "/usr/lib/syslinux/modules/bios/ldlinux.c32",
    ] {
        let name = Path::new(part).file_name().unwrap();
        fs::copy(part, cd.join(name)).unwrap_or_else(|err| panic!("{part}: {err}"));
    }
    let loader = "serial 0\ndefault install\nlabel install\n  kernel vmlinuz\n  \
                  append initrd=initrd console=ttyS0 rdinit=/install\n";
    fs::write(cd.join("isolinux.cfg"), loader).unwrap();
    let made = Command::new("genisoimage")
        .args([
            "-quiet",
            "-rational-rock",
            "-b",
            "isolinux.bin",
            "-c",
            "boot.cat",
        ])
        .args([
            "-no-emul-boot",
            "-boot-load-size",
            "4",
            "-boot-info-table",
            "-o",
        ])
        .args([&here.folder().join("installer.iso"), &cd])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    installs(&here, "{iso: installer.iso}");
}
