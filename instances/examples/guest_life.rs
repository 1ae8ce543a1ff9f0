//! The life of one real guest by hand, without a daemon and without a network: `guest_life FOLDER IMAGE
//! [firmware]`, where IMAGE is an image's folder in a store. It boots, is suspended and resumed twice, is
//! renamed, its disk grows; then a copy of its disk boots and becomes somebody else. Prints what each step
//! took, and every value that both still have in common.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pileus_base::Size;
use pileus_instances::guest::clone::{CloneMode, IdentitySpec};
use pileus_instances::guest::exec::{ExecSpec, Output, Tty};
use pileus_instances::guest::handle::Guest;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed::{self, SeedSpec};
use pileus_instances::qemu::{
    Accelerator, Boot, Disk, Growth, MachineSpec, Memory, Nic, Paths, Qemu, Vm,
};
use uuid::Uuid;

type Done<T> = Result<T, Box<dyn Error>>;
const LONG: Duration = Duration::from_secs(300);
const BOUND: Duration = Duration::from_secs(30);

/// Memory comes and goes; processors come if the guest's kernel is prepared for them.
async fn more_of_it(vm: &Vm, guest: &Guest, more: Size) -> Done<()> {
    const SHOWN: &str = "nproc; grep MemTotal /proc/meminfo";
    println!("{}", run(guest, SHOWN).await?.replace('\n', " "));
    let able = guest.can_grow(BOUND).await?;
    let began = Instant::now();
    let got = vm.set_more_memory(more).await?;
    println!("{:>8.1?} {more} more memory, got {got}", began.elapsed());
    let grown = vm.grown().await?;
    println!("the guest {able:?}, the machine {grown:?}");
    if able.cpus > grown.cpus + grown.growth.cpus {
        vm.plug_cpu().await?;
        let cpus = grown.cpus + grown.growth.cpus + 1;
        guest.take_cpus(cpus, BOUND).await?;
        println!("{:>8.1?} a processor", began.elapsed());
    }
    println!("{}", run(guest, SHOWN).await?.replace('\n', " "));
    Ok(())
}

struct Place {
    folder: PathBuf,
    image: PathBuf,
    firmware: bool,
    qemu: Qemu,
}

#[tokio::main]
async fn main() -> Done<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(folder), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: guest_life FOLDER IMAGE [firmware]".into());
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let place = Place {
        folder: folder.into(),
        image: image.into(),
        firmware: args.next().is_some(),
        qemu: Qemu::find(None, &path).await?,
    };
    let mut spec = place.spec("first", Uuid::new_v4(), vec![])?;
    let (vm, guest) = place.boot(&spec).await?;
    let mut vm = Some(vm);
    run(&guest, "true").await?;
    let kept = guest.exec(&shell("sleep 1000")).await?;
    let mut guest = guest;
    for (round, more) in [(1, 512), (2, 128)] {
        if let Some(now) = &vm {
            more_of_it(now, &guest, Size::mib(more)).await?;
            spec.growth = now.grown().await?.growth;
        }
        let boot_id = run(&guest, "cat /proc/sys/kernel/random/boot_id; date -Ins").await?;
        let file = place.folder.join("memory");
        let began = Instant::now();
        guest.sync(BOUND).await?;
        println!("{:>8.1?} sync", began.elapsed());
        let Some(now) = vm.take() else { break };
        let began = Instant::now();
        now.pause().await?;
        let stream = now.save_all(File::create(&file)?).await?;
        println!("{:>8.1?} saved, {} MiB", began.elapsed(), blocks(&file)?);
        now.quit().await?;
        drop(guest);
        tokio::time::sleep(Duration::from_secs(20)).await;

        let began = Instant::now();
        let incoming = MachineSpec {
            incoming: true,
            ..spec.clone()
        };
        let (now, _) = Vm::start(&place.qemu, &incoming, Vec::new(), None).await?;
        guest = place.guest(&spec)?;
        now.restore_all(File::open(&file)?, stream).await?;
        println!("{:>8.1?} loaded", began.elapsed());
        let began = Instant::now();
        now.resume().await?;
        let hello = guest.agent().wait_hello().await?;
        println!("{:>8.1?} hello of {}", began.elapsed(), hello.hostname);
        guest.resumed(BOUND).await?;
        println!("{:>8.1?} resumed", began.elapsed());
        let again = run(&guest, "cat /proc/sys/kernel/random/boot_id; date -Ins").await?;
        println!(
            "{:>8.1?} first command after go, round {round}",
            began.elapsed()
        );
        println!("before:\n{boot_id}after:\n{again}host: {}", host_time());
        run(&guest, "true").await?;
        println!("{:>8.1?} second command", began.elapsed());
        let began = Instant::now();
        guest.resumed(BOUND).await?;
        println!(
            "{:>8.1?} resumed again, with nothing to end",
            began.elapsed()
        );
        let left = run(&guest, "pgrep -c sshd; pgrep -fc 'sleep 1000' || :").await?;
        println!("sshd, old sessions: {}", left.replace('\n', " "));
        vm = Some(now);
    }
    drop(kept);
    let now = vm.ok_or("no machine")?;

    let began = Instant::now();
    println!("on a terminal: {:?}", warned(&guest).await?);
    println!("{:>8.1?} login, wall and its reading", began.elapsed());
    let began = Instant::now();
    guest.rename(&"other-name".parse()?, BOUND).await?;
    println!("{:>8.1?} rename", began.elapsed());
    print!(
        "{}",
        run(
            &guest,
            "hostname; cat /etc/hostname; grep -c other-name /etc/hosts"
        )
        .await?
    );
    print!("{}", run(&guest, "df -h / | tail -1").await?);
    now.resize_disk(Size::gib(6).bytes()).await?;
    let began = Instant::now();
    guest.grow(Duration::from_secs(60)).await?;
    println!("{:>8.1?} grow", began.elapsed());
    print!("{}", run(&guest, "df -h / | tail -1").await?);
    let one = guest.identity(BOUND).await?;
    run(&guest, "sudo poweroff").await?;
    now.wait().await;

    let second = place.spec("second", Uuid::new_v4(), spec.disk.layers.clone())?;
    let (now, guest) = place.boot(&second).await?;
    let before = guest.identity(BOUND).await?;
    println!("in common before identify: {:?}", common(&one, &before));
    let identity = IdentitySpec {
        instance: second.uuid.to_string(),
        hostname: "second".into(),
        machine_id: second.uuid.simple().to_string(),
        entropy: second.uuid.as_bytes().repeat(4),
        time: seconds(),
        keys: InstanceKeys::load(&place.folder.join("second"))?,
        authorized: vec![],
        timezone: None,
        nic: None,
        grow: false,
        cloud_init: false,
        standby: false,
        mode: CloneMode::Booted,
    };
    for _ in 0..2 {
        let began = Instant::now();
        let steps = guest.identify(&identity, Duration::from_secs(120)).await?;
        println!("{:>8.1?} identify: {steps:?}", began.elapsed());
    }
    let two = guest.identity(BOUND).await?;
    println!("in common: {:?}", common(&one, &two));
    println!("{} items", two.len());
    print!(
        "{}",
        run(
            &guest,
            "sudo ls -A /etc/pileus /var/lib/cloud/instances /var/log/journal; \
        cat ~/.ssh/authorized_keys; systemctl --failed --no-legend; findmnt /etc/machine-id || :"
        )
        .await?
    );
    now.quit().await?;
    Ok(())
}

impl Place {
    fn spec(&self, name: &str, uuid: Uuid, below: Vec<PathBuf>) -> Done<MachineSpec> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder)?;
        let top = folder.join("disk.qcow2");
        let base = self.image.join("disk.raw");
        let (format, backing) = match below.last() {
            Some(layer) => ("qcow2", layer.clone()),
            None => ("raw", base.clone()),
        };
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]);
        create.args([&backing, &top]);
        if below.is_empty() {
            create.arg("5G");
        }
        create.status()?;
        let keys = InstanceKeys::generate()?;
        keys.store(&folder)?;
        let id = uuid.to_string();
        let iso = seed::build(&SeedSpec {
            instance_id: &id,
            hostname: name,
            user_data: None,
            network_config: None,
            nics: &[],
            keys: &keys,
            timezone: None,
        })?;
        std::fs::write(folder.join("seed.iso"), iso)?;
        Ok(MachineSpec {
            name: name.parse()?,
            uuid,
            cpus: 1,
            memory: Size::gib(1),
            machine_type: self.qemu.machine_type.clone(),
            accelerator: Accelerator::Tcg,
            disk: Disk {
                base,
                layers: below.into_iter().chain([top]).collect(),
            },
            seed: Some(folder.join("seed.iso")),
            boot: match self.firmware {
                true => Boot::Firmware,
                false => Boot::Kernel {
                    kernel: self.image.join("kernel"),
                    initrd: Some(self.image.join("initrd")),
                    cmdline: format!(
                        "root=LABEL=pileus-root console=ttyS0 systemd.machine_id={}",
                        uuid.simple()
                    ),
                },
            },
            nic: Nic::None,
            extra_nics: Vec::new(),
            hardware: Default::default(),
            growth: Growth {
                most_cpus: 4,
                room: Size::gib(4),
                ..Growth::default()
            },
            ram: Memory::Private,
            incoming: false,
            ends_with_daemon: true,
            in_background: false,
            paths: Paths::of(&folder.join("run"), &folder),
        })
    }

    fn guest(&self, spec: &MachineSpec) -> Done<Guest> {
        let folder = self.folder.join(spec.name.as_str());
        let keys = InstanceKeys::load(&folder)?;
        Ok(Guest::connect(
            &spec.paths,
            &folder,
            keys,
            Ipv4Addr::LOCALHOST,
        ))
    }

    async fn boot(&self, spec: &MachineSpec) -> Done<(Vm, Guest)> {
        let began = Instant::now();
        let (vm, _) = Vm::start(&self.qemu, spec, Vec::new(), None).await?;
        let guest = self.guest(spec)?;
        let hello = tokio::time::timeout(LONG, guest.agent().wait_hello()).await??;
        println!(
            "{:>8.1?} hello, instance {}",
            began.elapsed(),
            hello.instance
        );
        let state = tokio::time::timeout(LONG, guest.agent().wait_cloud_init()).await??;
        println!(
            "{:>8.1?} cloud-init {:?} {:?}",
            began.elapsed(),
            state.state,
            state.errors
        );
        Ok((vm, guest))
    }
}

fn shell(line: &str) -> ExecSpec {
    ExecSpec {
        command: ["sh", "-c", line].map(str::to_owned).to_vec(),
        ..ExecSpec::default()
    }
}

async fn run(guest: &Guest, line: &str) -> Done<String> {
    let mut session = guest.exec(&shell(line)).await?;
    let mut text = String::new();
    while let Some(piece) = session.output.recv().await {
        match piece {
            Output::Stdout(bytes) | Output::Stderr(bytes) => {
                text += &String::from_utf8_lossy(&bytes)
            }
            Output::Failed(err) => return Err(err.into()),
            _ => {}
        }
    }
    Ok(text)
}

/// What somebody sees who is logged in on a terminal when a message comes.
async fn warned(guest: &Guest) -> Done<String> {
    let tty = Tty {
        term: "xterm".into(),
        cols: 80,
        rows: 24,
        modes: vec![],
    };
    let mut session = guest
        .exec(&ExecSpec {
            tty: Some(tty),
            ..shell("echo ready; sleep 3")
        })
        .await?;
    let mut text = String::new();
    let mut told = false;
    while let Some(piece) = session.output.recv().await {
        if let Output::Stdout(bytes) = piece {
            text += &String::from_utf8_lossy(&bytes);
        }
        if !told && text.contains("ready") {
            told = true;
            guest.wall("down in\ta minute\u{1b}[31m").await?;
        }
    }
    Ok(text)
}

type Items = Vec<(String, Vec<String>)>;

/// Items that have a value in both.
fn common(one: &Items, two: &Items) -> Vec<String> {
    let mut shared = Vec::new();
    for (name, values) in one {
        let other: BTreeSet<_> = two
            .iter()
            .filter(|(n, _)| n == name)
            .flat_map(|(_, v)| v)
            .collect();
        if values.iter().any(|v| other.contains(v)) {
            shared.push(name.clone());
        }
    }
    shared
}

fn blocks(file: &Path) -> Done<u64> {
    let meta = std::fs::metadata(file)?;
    Ok(std::os::unix::fs::MetadataExt::blocks(&meta) >> 11)
}

fn seconds() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |now| now.as_secs_f64())
}

fn host_time() -> String {
    let out = Command::new("date").arg("-Ins").output();
    out.map_or(String::new(), |out| {
        String::from_utf8_lossy(&out.stdout).into_owned()
    })
}
