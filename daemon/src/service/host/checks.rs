//! Whether this host has all that pileus needs: from facts to verdicts. Pure: what is looked at is
//! gathered in `service/host/facts.rs`.

use std::path::PathBuf;

use pileus_api::{Check, Verdict};
use pileus_base::{Error, Size};
use pileus_instances::qemu::Accelerator;
use pileus_instances::qemu::host::{Chosen, KvmFacts};

/// Below this an instance's disk soon can't grow.
const LITTLE_SPACE: Size = Size::gib(5);
const NO_SPACE: Size = Size::gib(1);
/// What an instance has if nobody says otherwise.
const LITTLE_MEMORY: Size = Size::gib(1);
const NO_MEMORY: Size = Size::mib(512);

/// What was found on the host.
#[derive(Debug)]
pub(super) struct Facts {
    /// Root's daemon, not a user's own.
    pub system: bool,
    pub kvm: KvmFacts,
    pub accelerator: Result<Chosen, Error>,
    /// QEMU's version.
    pub qemu: Result<String, Error>,
    /// Programs that are not there.
    pub missing: Vec<Tool>,
    pub network: Vec<Error>,
    /// Bytes free where things are stored.
    pub space: Vec<(PathBuf, Size)>,
    pub memory: Size,
    pub memory_available: Size,
    /// Why /dev/net/tun can't be opened.
    pub tun: Result<(), Error>,
    /// A system daemon's socket is open to a group; unknown if there is no socket of ours.
    pub socket_group: Option<bool>,
    /// A user's namespace has 65536 ids.
    pub full_uid_map: bool,
    /// Instances whose records can't be read, and why.
    pub broken: Vec<(String, String)>,
}

/// A program of the host that pileus starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tool {
    pub program: &'static str,
    /// Debian's and Ubuntu's package.
    pub package: &'static str,
    /// What does not work without it.
    pub purpose: &'static str,
    /// Nothing works without it.
    pub vital: bool,
}

/// All programs, for a system's daemon or a user's own.
pub(super) fn tools(system: bool) -> Vec<Tool> {
    let tool = |program, package, purpose, vital| Tool {
        program,
        package,
        purpose,
        vital,
    };
    let mut all = vec![
        tool("qemu-img", "qemu-utils", "images can't be read", true),
        tool("dnsmasq", "dnsmasq-base", "instances get no address", true),
        tool("nft", "nftables", "instances have no network", true),
        tool(
            "mmdebstrap",
            "mmdebstrap",
            "Debian images can't be made",
            false,
        ),
    ];
    if !system {
        all.push(tool("pasta", "passt", "instances have no network", true));
        all.push(tool("newuidmap", "uidmap", "images can't be made", false));
    }
    all
}

/// Judges everything, the most basic things first.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![
        virtualisation(facts),
        qemu(facts),
        programs(facts),
        network(facts),
        space(facts),
        memory(facts),
        permissions(facts),
        records(facts),
    ]
}

fn check(
    name: &str,
    verdict: Verdict,
    message: impl Into<String>,
    advice: Option<String>,
) -> Check {
    Check {
        name: name.to_owned(),
        verdict,
        message: message.into(),
        advice,
    }
}

fn good(name: &str, message: impl Into<String>) -> Check {
    check(name, Verdict::Good, message, None)
}

fn bad(name: &str, err: &Error) -> Check {
    check(
        name,
        Verdict::Bad,
        sentence(&err.message),
        err.advice.clone(),
    )
}

/// Error messages have no full stop.
fn sentence(text: &str) -> String {
    match text.ends_with('.') {
        true => text.to_owned(),
        false => format!("{text}."),
    }
}

fn virtualisation(facts: &Facts) -> Check {
    let name = "virtualisation";
    let chosen = match &facts.accelerator {
        Ok(chosen) => chosen,
        Err(err) => return bad(name, err),
    };
    let advice = match (facts.kvm.hardware, &facts.kvm.device) {
        _ if chosen.accelerator == Accelerator::Kvm => {
            return good(name, "Instances run on the processor itself (KVM).");
        }
        (true, Ok(())) => {
            let message = "Instances run emulated (TCG), about ten times slower than with KVM.";
            let advice = "KVM works here: start pileusd with `--accelerator auto` to use it.";
            return check(name, Verdict::Warning, message, Some(advice.to_owned()));
        }
        (true, Err(why)) if why.contains("ermission") => {
            "Let the user of pileusd open /dev/kvm: add it to the group `kvm`, log in anew and restart \
             pileusd."
        }
        (true, Err(_)) => "Load the kernel's module: `sudo modprobe kvm_intel` or `kvm_amd`.",
        (false, _) => {
            "Switch virtualisation on (VT-x, AMD-V) in the firmware; in a virtual machine, let its host \
             nest it."
        }
    };
    let message = chosen.warning.clone().unwrap_or_else(|| {
        "Instances run emulated (TCG), about ten times slower than with KVM.".to_owned()
    });
    check(name, Verdict::Warning, message, Some(advice.to_owned()))
}

fn qemu(facts: &Facts) -> Check {
    match &facts.qemu {
        Ok(version) => good("qemu", format!("QEMU {version} is new enough.")),
        Err(err) => bad("qemu", err),
    }
}

fn programs(facts: &Facts) -> Check {
    let missing = &facts.missing;
    if missing.is_empty() {
        return good("tools", "All programs that pileus uses are installed.");
    }
    let verdict = match missing.iter().any(|tool| tool.vital) {
        true => Verdict::Bad,
        false => Verdict::Warning,
    };
    let told = missing
        .iter()
        .map(|tool| format!("{} ({})", tool.program, tool.purpose));
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    let told: Vec<_> = told.collect();
    let advice = format!(
        "Install them, on Debian and Ubuntu: sudo apt install {}",
        packages.join(" ")
    );
    let message = format!("Not installed: {}.", told.join(", "));
    check("tools", verdict, message, Some(advice))
}

fn network(facts: &Facts) -> Check {
    let name = "network";
    match facts.network.as_slice() {
        [] => good(name, "The private network is up."),
        [only] => bad(name, only),
        several => {
            let told: Vec<_> = several.iter().map(|err| sentence(&err.message)).collect();
            let advice = several.iter().find_map(|err| err.advice.clone());
            check(name, Verdict::Bad, told.join(" "), advice)
        }
    }
}

fn space(facts: &Facts) -> Check {
    let name = "space";
    let Some((path, free)) = facts.space.iter().min_by_key(|(_, free)| *free) else {
        let message = "How much space is free can't be told.";
        return check(name, Verdict::Warning, message, None);
    };
    let message = format!("{free} are free in {}.", path.display());
    let verdict = match *free {
        free if free < NO_SPACE => Verdict::Bad,
        free if free < LITTLE_SPACE => Verdict::Warning,
        _ => return good(name, message),
    };
    let advice =
        "Free some space: `pileus purge` and `pileus image prune` give back what they can.";
    check(name, verdict, message, Some(advice.to_owned()))
}

fn memory(facts: &Facts) -> Check {
    let message = format!(
        "{} of {} memory are available.",
        facts.memory_available, facts.memory
    );
    let verdict = match facts.memory_available {
        free if free < NO_MEMORY => Verdict::Bad,
        free if free < LITTLE_MEMORY => Verdict::Warning,
        _ => return good("memory", message),
    };
    let advice = "Stop or suspend instances, or launch smaller ones (`--memory`).";
    check("memory", verdict, message, Some(advice.to_owned()))
}

fn permissions(facts: &Facts) -> Check {
    let name = "permissions";
    if let Err(err) = &facts.tun {
        return bad(name, err);
    }
    if facts.system && facts.socket_group == Some(false) {
        let message = "Only root can use this daemon: the group of its socket does not exist.";
        let advice = "Make it, add users and restart pileusd: `sudo groupadd --system pileus`, `sudo \
                      usermod -aG pileus USER`.";
        return check(name, Verdict::Warning, message, Some(advice.to_owned()));
    }
    if !facts.system && !facts.full_uid_map {
        let message = "This user has no subordinate ids, so images can't be made and instances run \
                       under the user's own id.";
        let advice = "Give the user 65536 of each and restart pileusd: `sudo usermod --add-subuids \
                      100000-165535 --add-subgids 100000-165535 USER`.";
        return check(name, Verdict::Warning, message, Some(advice.to_owned()));
    }
    good(name, "pileusd may do all that it needs to.")
}

fn records(facts: &Facts) -> Check {
    let Some((instance, why)) = facts.broken.first() else {
        return good("records", "The records of all instances can be read.");
    };
    let count = facts.broken.len();
    let message = match count {
        1 => format!("The record of instance \"{instance}\" can't be read: {why}."),
        _ => format!(
            "The records of {count} instances can't be read, \"{instance}\" among them: {why}."
        ),
    };
    let advice = "Their files are kept; `pileus server` tells where. Please report this.";
    check("records", Verdict::Bad, message, Some(advice.to_owned()))
}

#[cfg(test)]
mod tests {
    use pileus_base::Code;

    use super::*;

    fn fine() -> Facts {
        Facts {
            system: true,
            kvm: KvmFacts {
                hardware: true,
                device: Ok(()),
            },
            accelerator: Ok(Chosen {
                accelerator: Accelerator::Kvm,
                warning: None,
            }),
            qemu: Ok("10.0.2".into()),
            missing: Vec::new(),
            network: Vec::new(),
            space: vec![("/a".into(), Size::gib(50)), ("/b".into(), Size::gib(20))],
            memory: Size::gib(16),
            memory_available: Size::gib(8),
            tun: Ok(()),
            socket_group: Some(true),
            full_uid_map: true,
            broken: Vec::new(),
        }
    }

    #[test]
    fn a_good_host() {
        let all = checks(&fine());
        let names: Vec<_> = all.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "virtualisation",
                "qemu",
                "tools",
                "network",
                "space",
                "memory",
                "permissions",
                "records"
            ]
        );
        for check in all {
            assert_eq!(check.verdict, Verdict::Good, "{check:?}");
            assert!(
                check.advice.is_none() && check.message.ends_with('.'),
                "{check:?}"
            );
        }
    }

    fn tcg(warning: Option<&str>) -> Result<Chosen, Error> {
        Ok(Chosen {
            accelerator: Accelerator::Tcg,
            warning: warning.map(str::to_owned),
        })
    }

    type Change = fn(&mut Facts);

    #[test]
    fn each_lack_has_its_verdict_and_says_what_to_do() {
        let table: Vec<(&str, Verdict, &str, &str, Change)> = vec![
            (
                "virtualisation",
                Verdict::Warning,
                "slow",
                "firmware",
                |f| {
                    f.accelerator = tcg(Some("Emulated, so slow."));
                    f.kvm.hardware = false;
                    f.kvm.device = Err("not looked at".into());
                },
            ),
            (
                "virtualisation",
                Verdict::Warning,
                "slow",
                "group `kvm`",
                |f| {
                    f.accelerator = tcg(Some("Emulated, so slow."));
                    f.kvm.device = Err("/dev/kvm: Permission denied (os error 13)".into());
                },
            ),
            (
                "virtualisation",
                Verdict::Warning,
                "slow",
                "modprobe",
                |f| {
                    f.accelerator = tcg(Some("Emulated, so slow."));
                    f.kvm.device = Err("/dev/kvm: No such file or directory".into());
                },
            ),
            (
                "virtualisation",
                Verdict::Warning,
                "slower",
                "--accelerator auto",
                |f| {
                    f.accelerator = tcg(None);
                },
            ),
            ("virtualisation", Verdict::Bad, "asked for", "Enable", |f| {
                f.accelerator =
                    Err(Error::new(Code::QemuFailed, "KVM was asked for").advise("Enable it."));
            }),
            ("qemu", Verdict::Bad, "7.2.19", "backports", |f| {
                f.qemu = Err(Error::new(Code::QemuTooOld, "QEMU is version 7.2.19")
                    .advise("Take it from backports."));
            }),
            ("tools", Verdict::Bad, "nft", "nftables", |f| {
                f.missing = tools(true)
                    .into_iter()
                    .filter(|t| t.program == "nft")
                    .collect();
            }),
            (
                "tools",
                Verdict::Warning,
                "mmdebstrap",
                "apt install mmdebstrap",
                |f| {
                    f.missing = tools(true).into_iter().filter(|t| !t.vital).collect();
                },
            ),
            ("network", Verdict::Bad, "rules are gone", "Restart", |f| {
                f.network = vec![
                    Error::new(Code::NetworkFailed, "The rules are gone").advise("Restart it."),
                    Error::new(Code::NetworkFailed, "dnsmasq too"),
                ];
            }),
            (
                "space",
                Verdict::Warning,
                "4.9GiB are free in /b",
                "prune",
                |f| {
                    f.space[1].1 = Size::mib(5119);
                },
            ),
            ("space", Verdict::Bad, "1023.9MiB", "prune", |f| {
                f.space[0].1 = Size(Size::gib(1).bytes() - 1);
            }),
            (
                "memory",
                Verdict::Warning,
                "1023.0MiB of 16.0GiB",
                "--memory",
                |f| {
                    f.memory_available = Size::mib(1023);
                },
            ),
            ("memory", Verdict::Bad, "511.0MiB", "--memory", |f| {
                f.memory_available = Size::mib(511);
            }),
            ("permissions", Verdict::Bad, "tun", "modprobe tun", |f| {
                f.tun = Err(
                    Error::new(Code::TunUnavailable, "/dev/net/tun can't be opened")
                        .advise("modprobe tun"),
                );
            }),
            (
                "permissions",
                Verdict::Warning,
                "Only root",
                "groupadd",
                |f| {
                    f.socket_group = Some(false);
                },
            ),
            (
                "permissions",
                Verdict::Warning,
                "subordinate ids",
                "usermod",
                |f| {
                    f.system = false;
                    f.full_uid_map = false;
                },
            ),
            ("records", Verdict::Bad, "\"foo\"", "report", |f| {
                f.broken = vec![("foo".into(), "it is torn".into())];
            }),
            ("records", Verdict::Bad, "2 instances", "report", |f| {
                f.broken = vec![("foo".into(), "x".into()), ("bar".into(), "y".into())];
            }),
        ];
        for (name, verdict, message, advice, change) in table {
            let mut facts = fine();
            change(&mut facts);
            for check in checks(&facts) {
                if check.name != name {
                    assert_eq!(check.verdict, Verdict::Good, "{name}: {check:?}");
                    continue;
                }
                assert_eq!(check.verdict, verdict, "{check:?}");
                assert!(check.message.contains(message), "{check:?}");
                let given = check.advice.clone().unwrap_or_default();
                assert!(given.contains(advice), "{check:?}");
            }
        }
    }

    #[test]
    fn a_user_needs_other_programs() {
        let names = |system| -> Vec<_> { tools(system).iter().map(|t| t.program).collect() };
        assert!(!names(true).contains(&"pasta"));
        assert!(names(false).contains(&"pasta") && names(false).contains(&"newuidmap"));
    }
}
