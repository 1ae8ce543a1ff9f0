//! Images that are made on this machine from Debian's signed archive, with mmdebstrap. Works as root
//! and, through subordinate ids, as an ordinary user; needs neither loop devices nor mounts.
//!
//! The recipe itself, what is in the image and why, is `images/recipe/customize.sh`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use futures_util::future::{BoxFuture, FutureExt, ready};
use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, files};
use sha2::Digest as _;
use tokio::process::Command;

use super::apt::Mirror;
use super::{About, CatalogEntry, Host, Item, Origin};
use crate::fetch;
use crate::format::Work;
use crate::image::Draft;
use crate::reference::ImageRef;
use crate::stage::Stage;
use crate::tool::{self, Bounds};

const CUSTOMIZE: &str = include_str!("../../recipe/customize.sh");
const REMOTE: &str = "build";
const LABEL: &str = "pileus-root";
const CONSOLE: &str = "console=ttyS0";
/// Room for what is installed (some 350 MB) and a little more; the root grows with the disk.
const DISK_MIB: u64 = 1024;
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where mmdebstrap finds the files that we opened for the hook; see there for why so high.
const FIRST_FD: i32 = 100;
const BUILD_TIME: Duration = Duration::from_secs(45 * 60);

const PACKAGES: &[&str] = &[
    // Boot
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "lz4",
    "zstd",
    "grub-pc-bin",
    "grub2-common",
    "systemd-sysv",
    "udev",
    "kmod",
    "e2fsprogs",
    // Cloud
    "cloud-init",
    "cloud-guest-utils",
    "netplan.io",
    "systemd-resolved",
    "openssh-server",
    "python3",
    "sshfs",
    // What a person expects to find
    "bash-completion",
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "iputils-ping",
    "less",
    "libpam-systemd",
    "nano",
    "procps",
    "sudo",
    "tzdata",
    "vim-tiny",
];

/// Where in the build mmdebstrap says which line, in percent of the usual time.
const MILESTONES: &[(&str, u64)] = &[
    ("I: running apt-get update", 2),
    ("I: downloading packages", 6),
    ("I: extracting archives", 9),
    ("I: installing essential", 15),
    ("I: installing remaining", 25),
    ("I: running --customize-hook", 80),
    ("pileus-phase: making the initial", 82),
    ("pileus-phase: cleaning", 88),
    ("pileus-phase: writing the disk", 90),
    ("pileus-phase: done", 99),
];

#[derive(Debug)]
struct Release {
    name: &'static str,
    suite: &'static str,
    version: &'static str,
    aliases: &'static [&'static str],
}

/// The first one is the default.
const RELEASES: &[Release] = &[
    Release {
        name: "debian-13",
        suite: "trixie",
        version: "13",
        aliases: &["debian", "trixie", "default"],
    },
    Release {
        name: "debian-12",
        suite: "bookworm",
        version: "12",
        aliases: &["bookworm"],
    },
];

/// What is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    suite: &'static str,
}

/// The host `build:`.
#[derive(Debug, Default)]
pub struct BuildHost;

impl Host for BuildHost {
    fn name(&self) -> &str {
        REMOTE
    }

    fn catalog(&self, _: bool) -> BoxFuture<'_, Result<Vec<CatalogEntry>>> {
        let entries = RELEASES.iter().map(|release| CatalogEntry {
            remote: REMOTE.into(),
            name: release.name.into(),
            aliases: release.aliases.iter().map(|a| (*a).into()).collect(),
            supported: true,
            digest: None,
            about: about(release),
        });
        ready(Ok(entries.collect())).boxed()
    }

    fn resolve<'a>(
        &'a self,
        reference: &'a ImageRef,
        _: &'a Reporter,
    ) -> BoxFuture<'a, Result<Option<Item>>> {
        let name = match reference {
            ImageRef::On { remote, name } if remote == REMOTE => name,
            ImageRef::Name(name) => name,
            _ => return ready(Ok(None)).boxed(),
        };
        let release = RELEASES
            .iter()
            .find(|release| release.name == name || release.aliases.contains(&name.as_str()));
        ready(Ok(release.map(item))).boxed()
    }
}

fn about(release: &Release) -> About {
    About {
        os: "Debian".into(),
        release: release.version.into(),
        title: format!("Debian {} ({})", release.version, release.suite),
        codename: release.suite.into(),
        version: String::new(),
        arch: "x86_64".into(),
    }
}

fn item(release: &Release) -> Item {
    // Another recipe makes another image, also under the same name.
    let mut hash = sha2::Sha256::new();
    hash.update(CUSTOMIZE);
    hash.update(PACKAGES.join(","));
    let recipe = Digest::from_bytes(hash.finalize().into());
    Item {
        key: format!("build:{}:{}", release.name, recipe.short()),
        source: format!("build:{}", release.name),
        origin: Origin::Build(Recipe {
            suite: release.suite,
        }),
        expected: None,
        about: about(release),
    }
}

/// The kernel command line of the images that are made here.
pub(crate) fn cmdline() -> String {
    format!("root=LABEL={LABEL} {CONSOLE}")
}

/// Makes the image in the stage's draft: disk, kernel and initrd. Returns the disk's digest.
pub(crate) async fn make(
    stage: &Stage,
    work: &Work<'_>,
    recipe: &Recipe,
    report: &Reporter,
) -> Result<Digest> {
    report.phase(Phase::BuildingImage);
    work.check_room_for(2 << 30)?;
    let draft = stage.draft();
    let root = rustix::process::geteuid().is_root();
    let temp = temp_folder(stage, root, &work.tools.scratch)?;
    let mirror = super::apt::mirror(&work.tools.etc);
    let mut command = mmdebstrap(work, recipe, root, mirror.as_ref());
    command.env("TMPDIR", &temp).current_dir("/");
    command
        .fd_mappings(outputs(&draft)?)
        .map_err(|err| Error::internal("Passing files to mmdebstrap failed").with_source(err))?;
    let bounds = Bounds {
        time: BUILD_TIME,
        // In our namespaces all of it ends, and its mounts go, when it is killed; asked to end it
        // would not even hear. Where it made its own it takes away its folders itself.
        grace: Duration::from_secs(if root { 0 } else { 20 }),
        ..Bounds::default()
    };
    let mut on_line = |line: &str| {
        if let Some((_, percent)) = MILESTONES.iter().find(|(begin, _)| line.starts_with(begin)) {
            report.progress(*percent, Some(100));
        }
        if let Some(text) = log_line(line) {
            report.log(text);
        }
    };
    let done = tool::run(command, work.stage, bounds, report, &mut on_line, &|| {
        work.check_space()
    })
    .await?;
    if !done.status.success() {
        let advice = if root {
            "Its last lines are below; the network or the package archive is the usual cause."
        } else {
            "Its last lines are below; without root it needs subordinate ids (/etc/subuid, \
             /etc/subgid, the package uidmap)."
        };
        return Err(done
            .failed("Making the image with mmdebstrap")
            .advise(advice));
    }
    report.phase(Phase::VerifyingImage);
    fetch::hash(&draft.disk(), report).await
}

/// The lines that mean something to a person; the recipe's own text is echoed by mmdebstrap.
fn log_line(line: &str) -> Option<&str> {
    if let Some(text) = line.strip_prefix("pileus-phase: ") {
        return Some(text);
    }
    if line.starts_with("I: running --customize-hook") {
        return None;
    }
    ["I: ", "E: ", "W: "]
        .iter()
        .any(|p| line.starts_with(p))
        .then_some(line)
}

/// Root's build works in the stage. Another user's build runs under subordinate ids, which can't
/// pass through a private home, so it gets a folder in a place that is open to all.
fn temp_folder(stage: &Stage, root: bool, scratch: &Path) -> Result<PathBuf> {
    if root {
        let temp = stage.path("tmp");
        files::create_folder(&temp, 0o700)?;
        return Ok(temp);
    }
    let temp = scratch.join(format!("pileus-build-{}", stage.id()));
    stage.adopt_scratch(&temp)?;
    Ok(temp)
}

/// The three files that the hook writes. Their folder is private enough; the hook's user, whoever
/// that is outside, must be able to open them again for writing.
fn outputs(draft: &Draft) -> Result<Vec<FdMapping>> {
    let paths = [draft.disk(), draft.kernel(), draft.initrd()];
    let mut mappings = Vec::new();
    for (path, child_fd) in paths.iter().zip(FIRST_FD..) {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .io(format_args!("Creating {}", path.display()))?;
        files::set_mode(path, 0o666)?;
        mappings.push(FdMapping {
            parent_fd: OwnedFd::from(file),
            child_fd,
        });
    }
    Ok(mappings)
}

fn mmdebstrap(work: &Work<'_>, recipe: &Recipe, root: bool, mirror: Option<&Mirror>) -> Command {
    // Root's mmdebstrap mounts in the namespace that it is in, and its processes outlive it. In
    // namespaces of their own, mounts and processes are gone as soon as this program is, also when it
    // is killed. Without root mmdebstrap makes them itself.
    let mut command = if root {
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation=private",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args(["--mount-proc", "--"])
            .arg(&work.tools.mmdebstrap);
        command
    } else {
        Command::new(&work.tools.mmdebstrap)
    };
    let hook = format!("LABEL={LABEL} CMDLINE='{CONSOLE}' DISK_MIB={DISK_MIB}\n{CUSTOMIZE}");
    command
        .arg(if root {
            "--mode=root"
        } else {
            "--mode=unshare"
        })
        .args([
            "--variant=minbase",
            "--format=null",
            "--architectures=amd64",
        ])
        .arg(format!("--include={}", PACKAGES.join(",")))
        // The root is thrown away once the hook has written the disk.
        .arg("--skip=cleanup")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-include=/usr/share/doc/*/copyright")
        .arg(format!("--customize-hook={hook}"))
        .args([recipe.suite, "-"]);
    if let Some(mirror) = mirror {
        command.args(deb_lines(recipe.suite, mirror));
    }
    command
}

fn deb_lines(suite: &str, mirror: &Mirror) -> Vec<String> {
    let deb = |uri: &str, suite: &str| format!("deb [signed-by={KEYRING}] {uri} {suite} main");
    let mut lines = vec![
        deb(&mirror.archive, suite),
        deb(&mirror.archive, &format!("{suite}-updates")),
    ];
    if let Some(security) = &mirror.security {
        lines.push(deb(security, &format!("{suite}-security")));
    }
    lines
}

/// Whether the programs that a build needs are there: told before the work begins.
pub(crate) fn check_host(work: &Work<'_>) -> Result<()> {
    if !Path::new(KEYRING).exists() {
        return Err(Error::new(
            Code::ToolMissing,
            "The keys of Debian's archive are not installed",
        )
        .advise("Install them, on Debian and Ubuntu: sudo apt install debian-archive-keyring"));
    }
    for (program, package) in [
        (work.tools.mmdebstrap.as_path(), "mmdebstrap"),
        (Path::new("mke2fs"), "e2fsprogs"),
    ] {
        let found = program.is_absolute() && program.exists()
            || tool::PATH
                .split(':')
                .any(|dir| Path::new(dir).join(program).exists());
        if !found {
            return Err(Error::new(
                Code::ToolMissing,
                format!("The program {} is not installed", program.display()),
            )
            .advise(format!(
                "Install it, on Debian and Ubuntu: sudo apt install {package}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_and_aliases_lead_to_items() {
        let report = Reporter::silent();
        for (text, suite) in [
            ("default", Some("trixie")),
            ("debian", Some("trixie")),
            ("build:trixie", Some("trixie")),
            ("build:debian-12", Some("bookworm")),
            ("other:debian-12", None),
            ("noble", None),
        ] {
            let reference = text.parse().unwrap();
            let item = BuildHost.resolve(&reference, &report).await.unwrap();
            let got = item.map(|item| match item.origin {
                Origin::Build(recipe) => recipe.suite,
                _ => "",
            });
            assert_eq!(got, suite, "{text}");
        }
    }

    #[test]
    fn the_mirror_of_the_machine_is_used_for_all_suites() {
        let mirror = Mirror {
            archive: "http://a.invalid/d".into(),
            security: Some("http://s.invalid/d".into()),
        };
        let lines = deb_lines("trixie", &mirror);
        assert_eq!(lines.len(), 3);
        assert!(lines[1].ends_with("http://a.invalid/d trixie-updates main"));
        assert!(lines[2].ends_with("http://s.invalid/d trixie-security main"));
    }
}
