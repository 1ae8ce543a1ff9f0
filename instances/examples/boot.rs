//! Boots an image by hand, without a daemon: `boot FOLDER IMAGE [firmware]`, where IMAGE holds
//! disk.raw, vmlinuz, initrd.img and cmdline, and FOLDER gets the overlay, the logs and the sockets.
//! Prints events with their times; Enter presses the power button, `r` reboots, `q` quits.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use pileus_base::Size;
use pileus_instances::qemu::{
    Accelerator, Boot, Disk, MachineSpec, Memory, Nic, Paths, Qemu, Vm, VmEvent,
};
use tokio::io::{AsyncBufReadExt, BufReader};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(folder), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: boot FOLDER IMAGE [firmware]".into());
    };
    let (folder, image) = (PathBuf::from(folder), PathBuf::from(image));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let qemu = Qemu::find(None, &path).await?;
    let overlay = folder.join("disk.qcow2");
    let base = image.join("disk.raw");
    std::fs::create_dir_all(&folder)?;
    Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &overlay])
        .arg("5G")
        .status()?;
    let boot = match args.next() {
        Some(_) => Boot::Firmware,
        None => Boot::Kernel {
            kernel: image.join("vmlinuz"),
            initrd: Some(image.join("initrd.img")),
            cmdline: std::fs::read_to_string(image.join("cmdline"))?
                .trim()
                .to_owned(),
        },
    };
    let seed = folder.join("seed.img");
    let spec = MachineSpec {
        name: "by-hand".parse()?,
        uuid: uuid::Uuid::new_v4(),
        cpus: 2,
        memory: Size::gib(1),
        machine_type: qemu.machine_type.clone(),
        accelerator: Accelerator::Tcg,
        disk: Disk {
            base,
            layers: vec![overlay],
        },
        seed: seed.exists().then_some(seed),
        boot,
        nic: Nic::None,
        extra_nics: Vec::new(),
        hardware: Default::default(),
        growth: Default::default(),
        ram: Memory::Private,
        incoming: false,
        ends_with_daemon: false,
        in_background: false,
        paths: Paths::of(&folder.join("run"), &folder),
    };
    let started = Instant::now();
    let (vm, mut events) = Vm::start(&qemu, &spec, Vec::new(), None).await?;
    println!("{:?} QEMU answers", started.elapsed());
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let mut listening = true;
    loop {
        tokio::select! {
            event = events.recv() => {
                let event = event?;
                println!("{:?} {event:?}", started.elapsed());
                if matches!(event, VmEvent::Exited(_)) {
                    return Ok(());
                }
            }
            line = input.next_line(), if listening => match line?.as_deref() {
                Some("r") => vm.reset().await?,
                Some("q") => drop(vm.quit().await?),
                Some(_) => vm.powerdown().await?,
                None => listening = false,
            }
        }
    }
}
