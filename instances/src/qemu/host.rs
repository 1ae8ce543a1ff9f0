//! Which QEMU this host has, and what it can run guests with. Nothing is kept here: the daemon asks
//! once and shows the warning once.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pileus_base::{Code, Error, Result};

use super::hardware::{Abilities, alias};
use super::spec::{Accelerator, AcceleratorChoice};

const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest version whose options and behaviour we rely on.
const OLDEST: (u32, u32) = (8, 2);
const ADVICE: &str = "Install QEMU 8.2 or newer: `apt install qemu-system-x86` on Debian 13 and \
                      Ubuntu 24.04; on Debian 12 take it from backports.";

/// A QEMU that is good enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    pub program: PathBuf,
    pub version: (u32, u32, u32),
    /// The first line of `--version`, which tells builds apart.
    pub build: String,
    /// What `q35` means to this build, to be kept with each new instance.
    pub machine_type: String,
}

impl Qemu {
    /// Takes `program`, or looks for it in `search` (the form of PATH), and asks it who it is.
    pub async fn find(program: Option<&Path>, search: &OsStr) -> Result<Self> {
        let program = match program {
            Some(program) => program.to_owned(),
            None => look_up(search).ok_or_else(|| {
                Error::new(Code::QemuMissing, format!("{PROGRAM} is not installed")).advise(ADVICE)
            })?,
        };
        let (version, machines) = tokio::try_join!(
            ask(&program, &["--version"]),
            ask(&program, &["-machine", "help"])
        )?;
        let build = version.lines().next().unwrap_or_default().trim().to_owned();
        let version = parse_version(&build).ok_or_else(|| {
            let what = format!("{} does not say its version: {build:?}", program.display());
            Error::new(Code::QemuFailed, what).advise(ADVICE)
        })?;
        if (version.0, version.1) < OLDEST {
            let (major, minor, micro) = version;
            let what = format!(
                "{} is version {major}.{minor}.{micro}, and pileus needs {}.{}",
                program.display(),
                OLDEST.0,
                OLDEST.1
            );
            return Err(Error::new(Code::QemuTooOld, what).advise(ADVICE));
        }
        let machine_type = parse_machine_type(&machines).ok_or_else(|| {
            Error::new(
                Code::QemuFailed,
                format!("{} knows no q35 machine", program.display()),
            )
            .advise(ADVICE)
        })?;
        Ok(Self {
            program,
            version,
            build,
            machine_type,
        })
    }

    /// What it can do beyond the usual; asked when a machine needs it.
    pub async fn abilities(&self) -> Result<Abilities> {
        let (machines, devices) = tokio::try_join!(
            ask(&self.program, &["-machine", "help"]),
            ask(&self.program, &["-device", "help"])
        )?;
        Ok(Abilities::parse(&machines, &devices))
    }
}

fn look_up(search: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(search)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(PROGRAM))
        .find(|path| {
            path.metadata()
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

async fn ask(program: &Path, args: &[&str]) -> Result<String> {
    let shown = program.display();
    let output = tokio::process::Command::new(program)
        .args(args)
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |what: String| Error::new(Code::QemuFailed, what).advise(ADVICE);
    let output = tokio::time::timeout(Duration::from_secs(20), output)
        .await
        .map_err(|_| failed(format!("{shown} {} did not end", args.join(" "))))?
        .map_err(|err| match err.kind() {
            std::io::ErrorKind::NotFound => {
                Error::new(Code::QemuMissing, format!("{shown} is not there")).advise(ADVICE)
            }
            _ => failed(format!("{shown} can't be run: {err}")).with_source(err),
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(
            failed(format!("{shown} {} failed", args.join(" "))).detail(said.trim().to_owned())
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From `QEMU emulator version 10.0.2 (Debian …)`; also `9.2.50` of a development build.
fn parse_version(line: &str) -> Option<(u32, u32, u32)> {
    let text = line.strip_prefix("QEMU emulator version ")?;
    let mut numbers = text.split([' ', '-', '+', '(']).next()?.split('.');
    let mut next = || numbers.next().map(str::parse::<u32>);
    Some((next()?.ok()?, next()?.ok()?, next().unwrap_or(Ok(0)).ok()?))
}

fn parse_machine_type(help: &str) -> Option<String> {
    alias(help, "q35")
}

/// What this host says about hardware virtualisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmFacts {
    /// `vmx` or `svm` is among the processor's flags.
    pub hardware: bool,
    /// Why `/dev/kvm` can't be opened, if it can't.
    pub device: Result<(), String>,
}

impl KvmFacts {
    /// Looks at the host. The device is only opened where the hardware is there.
    pub fn of_host() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::look(&cpuinfo, Path::new("/dev/kvm"))
    }

    fn look(cpuinfo: &str, device: &Path) -> Self {
        let hardware = cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| key.trim() == "flags")
            .any(|(_, flags)| flags.split_whitespace().any(|f| f == "vmx" || f == "svm"));
        let device = match hardware {
            false => Err("not looked at".to_owned()),
            true => OpenOptions::new()
                .read(true)
                .write(true)
                .open(device)
                .map(drop)
                .map_err(|err| format!("{}: {err}", device.display())),
        };
        Self { hardware, device }
    }

    /// Why KVM can't run a stock guest here, if it can't.
    pub fn obstacle(&self) -> Option<String> {
        match (self.hardware, &self.device) {
            // A device can be there all the same (nested, paravirtual) and fail on stock kernels.
            (false, _) => {
                Some("the processor shows no hardware virtualisation (vmx or svm)".into())
            }
            (true, Err(reason)) => Some(format!("KVM can't be used ({reason})")),
            (true, Ok(())) => None,
        }
    }
}

/// What runs the guests, and what the user should know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    pub accelerator: Accelerator,
    /// One sentence; to be shown once.
    pub warning: Option<String>,
}

/// Decides the accelerator.
pub fn choose(choice: AcceleratorChoice, facts: &KvmFacts) -> Result<Chosen> {
    let plain = |accelerator| Chosen {
        accelerator,
        warning: None,
    };
    match (choice, facts.obstacle()) {
        (AcceleratorChoice::Tcg, _) => Ok(plain(Accelerator::Tcg)),
        (_, None) => Ok(plain(Accelerator::Kvm)),
        (AcceleratorChoice::Auto, Some(why)) => Ok(Chosen {
            accelerator: Accelerator::Tcg,
            warning: Some(format!(
                "Instances run emulated (TCG), about ten times slower than with KVM: {why}."
            )),
        }),
        (AcceleratorChoice::Kvm, Some(why)) => {
            let what = format!("KVM was asked for, and {why}");
            Err(Error::new(Code::QemuFailed, what).advise(
                "Enable virtualisation in the firmware or the outer hypervisor, load the kvm \
                 module and join the group kvm; or choose the accelerator `auto` or `tcg`.",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn versions_as_builds_print_them() {
        for (line, version) in [
            (
                "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)",
                (10, 0, 2),
            ),
            ("QEMU emulator version 8.2.2", (8, 2, 2)),
            ("QEMU emulator version 9.2.50 (v9.2.0-1-g1)", (9, 2, 50)),
            ("QEMU emulator version 11.0.0-rc1", (11, 0, 0)),
        ] {
            assert_eq!(parse_version(line), Some(version), "{line}");
        }
        for line in ["", "bash 5.2", "QEMU emulator version x.y"] {
            assert_eq!(parse_version(line), None, "{line}");
        }
    }

    #[test]
    fn the_machine_behind_q35() {
        let help = "Supported machines are:\n\
            pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n\
            q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)\n\
            pc-q35-10.0          Standard PC (Q35 + ICH9, 2009)\n";
        assert_eq!(parse_machine_type(help).as_deref(), Some("pc-q35-10.0"));
        assert_eq!(parse_machine_type("none    empty machine\n"), None);
    }

    #[test]
    fn auto_falls_for_no_bare_device() {
        // A device that opens, on a processor without vmx: this very trap.
        let facts = KvmFacts::look(
            "processor\t: 0\nflags\t\t: fpu hypervisor\n",
            Path::new("/dev/null"),
        );
        let chosen = choose(AcceleratorChoice::Auto, &facts).unwrap();
        assert_eq!(chosen.accelerator, Accelerator::Tcg);
        assert!(chosen.warning.unwrap().contains("vmx"));
        let err = choose(AcceleratorChoice::Kvm, &facts).unwrap_err();
        assert_eq!(err.code, Code::QemuFailed);
        assert!(err.advice.is_some());
    }

    #[test]
    fn kvm_needs_hardware_and_device() {
        let cpuinfo = "flags : fpu vmx sse\nvmx flags : vnmi\n";
        let good = KvmFacts::look(cpuinfo, Path::new("/dev/null"));
        for choice in [AcceleratorChoice::Auto, AcceleratorChoice::Kvm] {
            let chosen = choose(choice, &good).unwrap();
            assert_eq!(
                (chosen.accelerator, chosen.warning),
                (Accelerator::Kvm, None)
            );
        }
        assert_eq!(
            choose(AcceleratorChoice::Tcg, &good).unwrap(),
            Chosen {
                accelerator: Accelerator::Tcg,
                warning: None
            }
        );
        let none = KvmFacts::look(cpuinfo, Path::new("/nowhere/kvm"));
        assert!(none.obstacle().unwrap().contains("/nowhere/kvm"));
        // `vmx flags` of a newer kernel is another line.
        assert!(!KvmFacts::look("vmx flags : vmx\n", Path::new("/dev/null")).hardware);
    }

    fn program(folder: &Path, body: &str) -> PathBuf {
        let path = folder.join(PROGRAM);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn missing_old_and_odd_programs_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let search = folder.path().as_os_str();
        let code =
            async |program: Option<&Path>| Qemu::find(program, search).await.unwrap_err().code;
        assert_eq!(code(None).await, Code::QemuMissing);
        assert_eq!(code(Some(Path::new("/no/qemu"))).await, Code::QemuMissing);
        program(
            folder.path(),
            "echo 'QEMU emulator version 7.2.19 (Debian)'",
        );
        let err = Qemu::find(None, search).await.unwrap_err();
        assert_eq!(err.code, Code::QemuTooOld);
        assert!(err.message.contains("7.2.19") && err.advice.is_some());
        program(folder.path(), "echo hello");
        assert_eq!(code(None).await, Code::QemuFailed);
        program(folder.path(), "echo broken >&2; exit 3");
        let err = Qemu::find(None, search).await.unwrap_err();
        assert_eq!(
            (err.code, err.details),
            (Code::QemuFailed, vec!["broken".to_owned()])
        );
    }
}
