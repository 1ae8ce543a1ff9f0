//! An image from an empty disk: a CD or a kernel is booted beside it, installs a system without anybody's help,
//! and powers the machine off. There is no agent to talk to; the console tells what happens
//! (`pileus logs NAME`).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pileus_api::{Digest, InstanceName};
use pileus_base::{Code, Error, Phase, Reporter, Result, ResultExt, Size, files};
use pileus_images::{Image, ImageRef, overlay};
use pileus_instances::driver::{DirectBoot, Host, QemuDriver, RunningVm, SEED, Setup, Wiring};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::machine::{Driver, Vm, VmEvent};
use pileus_instances::qemu::hardware::Hardware;
use pileus_instances::qemu::{Accelerator, Confinement};

use super::super::admission::Start;
use super::super::given::{Given, seed_of};
use super::super::{Service, blocking, images, leases, wiring};
use super::publish::{Made, Parts};
use super::recipe::{About, Install, Medium};
use super::throwaway::Throwaway;
use crate::http::listener::Peer;
use crate::state::instances::{InstanceRow, Spec};

/// Of a kernel or an initrd.
const MOST_KERNEL: u64 = 1 << 30;
const TRIM_EVERY: Duration = Duration::from_secs(5);
const BLANK: &str = "blank.raw";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

/// An installation whose files are open.
pub(super) struct Opened {
    install: Install,
    source: Source,
}

enum Source {
    Iso(File),
    /// It has to be fetched.
    Remote(ImageRef, Option<Digest>),
    Kernel(File, Option<File>),
}

impl Service {
    /// Opens its files with the caller's rights.
    pub(super) fn open_install(&self, install: Install, peer: Peer) -> Result<Opened> {
        let open = |path: &Path| match images::open_as(&self.parts.mode, peer, path)? {
            Some(file) => Ok(file),
            None => File::open(path).map_err(|err| no_file(path, &err)),
        };
        let source = match &install.medium {
            Medium::Iso { iso, checksum } => match iso.contains("://") {
                true => match iso.parse()? {
                    ImageRef::File(path) => Source::Iso(open(&path)?),
                    other => Source::Remote(other, checksum.clone()),
                },
                false if iso.starts_with('/') && checksum.is_none() => {
                    Source::Iso(open(Path::new(iso))?)
                }
                false => {
                    return Err(Error::new(
                        Code::InvalidArgument,
                        format!(
                            "{iso:?} is no absolute path and no address, or a file with a checksum"
                        ),
                    ));
                }
            },
            Medium::Kernel { kernel, initrd, .. } => {
                let initrd = initrd.as_deref().map(open).transpose()?;
                Source::Kernel(open(kernel)?, initrd)
            }
        };
        Ok(Opened { install, source })
    }

    pub(super) async fn install_now(
        &self,
        name: InstanceName,
        opened: Opened,
        about: About,
        report: &Reporter,
    ) -> Result<Made> {
        let Opened { install, source } = opened;
        // Held until the end: QEMU reads it.
        let (medium, _held) = self.medium(&source, report).await?;
        let lease = leases::expiry((self.parts.clock)(), super::LEASE)?;
        let spec = Spec::new(install.cpus, install.memory, install.disk);
        let instance = self.reserve_row(Some(name), spec, Some(lease)).await?;
        let machine = Throwaway::new(self, instance.clone());
        let row = instance.row();
        let done = async {
            report.phase(Phase::Configuring);
            self.write_install(&row, &source, &install).await?;
            let _promise = self.admit(install.memory, Start::Cold).await?;
            self.run_install(&row, &install, medium, report).await?;
            let folder = self.parts.layout.instance(row.id);
            let parts = Parts {
                base: folder.join(BLANK),
                layers: vec![wiring::disk(&self.parts.layout, &row)],
            };
            let what = match &install.medium {
                Medium::Iso { .. } => "recipe from an ISO",
                Medium::Kernel { .. } => "recipe from a kernel",
            };
            let mut info = self.info_of(None, what.to_owned(), &about);
            info.recipe.clone_from(&about.recipe);
            info.made_of = about
                .recipe
                .as_ref()
                .map(|recipe| format!("an empty disk by the recipe {recipe}"));
            let stays = about.tag.is_some();
            self.publish(&parts, info, stays, report).await
        };
        let done = done.await;
        machine.end().await;
        let (image, is_new) = done?;
        Ok(Made {
            image,
            is_new,
            tag: about.tag,
        })
    }

    /// Where QEMU finds the CD, and what keeps it there.
    async fn medium(
        &self,
        source: &Source,
        report: &Reporter,
    ) -> Result<(Option<PathBuf>, Option<Arc<Image>>)> {
        match source {
            Source::Iso(file) => {
                let length = file.metadata().io("Looking at the ISO")?.len();
                if length == 0 || length % 512 != 0 {
                    return Err(Error::new(
                        Code::BadImage,
                        format!("The ISO is not whole: it has {length} bytes"),
                    ));
                }
                Ok((
                    Some(format!("/proc/self/fd/{}", file.as_raw_fd()).into()),
                    None,
                ))
            }
            Source::Remote(address, checksum) => {
                let store = &self.parts.store;
                let image = store.obtain(address, checksum.as_ref(), report).await?;
                Ok((Some(image.disk()), Some(image)))
            }
            Source::Kernel(..) => Ok((None, None)),
        }
    }

    /// An empty disk, a seed, and copies of the kernel's files, which QEMU's user must be able to read.
    async fn write_install(
        &self,
        row: &InstanceRow,
        source: &Source,
        install: &Install,
    ) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let disk = wiring::disk(&self.parts.layout, row);
        let given = Given {
            user_data: install.user_data.clone(),
            network_config: None,
        };
        let mut copies = Vec::new();
        if let Source::Kernel(kernel, initrd) = source {
            copies.push((
                folder.join(KERNEL),
                kernel.try_clone().io("Reading the kernel")?,
            ));
            if let Some(initrd) = initrd {
                copies.push((
                    folder.join(INITRD),
                    initrd.try_clone().io("Reading the initrd")?,
                ));
            }
        }
        let row = row.clone();
        blocking(move || {
            files::create_folder(&folder, 0o700)?;
            let blank = folder.join(BLANK);
            let what = format!("Creating {}", blank.display());
            let file = files::create_private(&blank)?;
            file.set_len(row.spec.disk.bytes()).io(what)?;
            overlay::create(&disk, row.spec.disk, &blank)?;
            for (path, from) in copies {
                copy(from, &path)?;
            }
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let seed = seed_of(&row, &keys, &given)?;
            files::write_atomic(&folder.join(SEED), &seed, 0o600)
        })
        .await
    }

    /// Boots the machine and waits until its guest has powered it off.
    async fn run_install(
        &self,
        row: &InstanceRow,
        install: &Install,
        cdrom: Option<PathBuf>,
        report: &Reporter,
    ) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let direct_boot = match &install.medium {
            Medium::Iso { .. } => None,
            Medium::Kernel {
                initrd, cmdline, ..
            } => Some(DirectBoot {
                kernel: folder.join(KERNEL),
                initrd: initrd.as_ref().map(|_| folder.join(INITRD)),
                cmdline: cmdline.clone(),
            }),
        };
        let setup = Setup {
            name: row.name.clone(),
            id: row.id,
            cpus: row.spec.cpus,
            memory: row.spec.memory,
            machine_type: None,
            base: folder.join(BLANK),
            direct_boot,
            run: self.parts.layout.instance_run(row.id),
            folder,
            mac: row.mac,
            hardware: Hardware {
                cdrom,
                ..Hardware::default()
            },
            extra_nics: Vec::new(),
            address: row.address,
            ends_with_daemon: true,
            machine_id: None,
        };
        let reboots = setup.direct_boot.is_none();
        let wiring = InstallWiring {
            service: self.clone(),
            row: row.clone(),
        };
        let driver = QemuDriver::new(setup, Arc::new(wiring));
        report.phase(Phase::Starting);
        let mut vm = driver.start(false, report).await?;
        report.phase(Phase::Provisioning);
        let off = wait_for_end(&driver, &mut vm, reboots, report);
        let off = match tokio::time::timeout(install.timeout, off).await {
            Ok(off) => off,
            Err(_) => Err(Error::new(
                Code::StepFailed,
                format!(
                    "The installation did not power its machine off within {} s",
                    install.timeout.as_secs()
                ),
            )
            .advise("Give the recipe a larger `timeout`, or the system a power-off at its end.")),
        };
        let off = off.map_err(|err| match err.code {
            Code::Cancelled => err,
            _ => with_console(&driver, err),
        });
        // One that is off already does not mind.
        vm.kill().await;
        drop(vm);
        driver.release().await;
        off
    }
}

fn with_console(driver: &QemuDriver, mut err: Error) -> Error {
    let tail = driver.console_tail();
    if !tail.is_empty() {
        err = err.detail("The console's last lines:");
        err.details.extend(tail);
    }
    err
}

async fn wait_for_end(
    driver: &QemuDriver,
    vm: &mut RunningVm,
    reboots: bool,
    report: &Reporter,
) -> Result<()> {
    let stopped = |why: String| Error::new(Code::GuestStopped, why);
    let mut trim = tokio::time::interval(TRIM_EVERY);
    loop {
        tokio::select! {
            event = vm.next() => match event {
                VmEvent::Exited { reason: None } => return Ok(()),
                VmEvent::Exited { reason: Some(reason) } => {
                    return Err(stopped(format!("The machine that was being installed ended: {reason}")));
                }
                VmEvent::Panicked => {
                    return Err(stopped("The kernel of the machine that was being installed panicked".into()));
                }
                VmEvent::Reset if !reboots => {
                    return Err(stopped("The kernel rebooted its machine where it should have powered it off".into())
                        .advise("It would begin again: have it end with `poweroff -f`."));
                }
                VmEvent::DiskError { no_space: true, .. } => {
                    return Err(Error::new(Code::NoSpace, "The host's disk is full: the installation can't go on"));
                }
                VmEvent::DiskError { reason, .. } => {
                    return Err(Error::new(Code::Io, format!("The host could not read or write the disk: {reason}")));
                }
                VmEvent::Reset | VmEvent::Shutdown { .. } | VmEvent::Guest(_) => {}
            },
            _ = trim.tick() => driver.trim_console(),
            () = report.cancelled() => {
                return Err(Error::new(Code::Cancelled, "The operation was cancelled"));
            }
        }
    }
}

/// A file that QEMU's user may read: its folder is ours alone.
fn copy(from: File, to: &Path) -> Result<()> {
    use std::io::Read;
    let what = format!("Copying to {}", to.display());
    let mut file = files::create_private(to)?;
    let copied = std::io::copy(&mut from.take(MOST_KERNEL + 1), &mut file).io(&what)?;
    if copied == 0 || copied > MOST_KERNEL {
        return Err(Error::new(
            Code::BadImage,
            format!(
                "A kernel or an initrd has 1 byte to {} of them",
                Size(MOST_KERNEL)
            ),
        ));
    }
    files::set_mode(to, 0o444)
}

fn no_file(path: &Path, err: &std::io::Error) -> Error {
    let code = match err.kind() {
        std::io::ErrorKind::NotFound => Code::ImageNotFound,
        std::io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        _ => Code::Io,
    };
    Error::new(code, format!("Opening {}: {err}", path.display()))
}

/// The machine's place in the network; it has no task, so nothing else of an instance's.
struct InstallWiring {
    service: Service,
    row: InstanceRow,
}

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

impl Wiring for InstallWiring {
    fn host(&self) -> Later<'_, Result<Arc<Host>>> {
        Box::pin(self.service.parts().hypervisor.get())
    }

    fn plug(&self) -> Later<'_, Result<OwnedFd>> {
        Box::pin(async {
            let network = &self.service.parts().network;
            network.attach(&wiring::nic(&self.row)).await
        })
    }

    fn unplug(&self) -> Later<'_, ()> {
        Box::pin(async {
            let network = &self.service.parts().network;
            if let Err(err) = network.detach(&wiring::nic(&self.row)) {
                tracing::warn!(instance = %self.row.name, %err, "its network entry can't be removed");
            }
        })
    }

    fn layers(&self) -> Vec<PathBuf> {
        vec![wiring::disk(&self.service.parts().layout, &self.row)]
    }

    fn confinement(&self, accelerator: Accelerator) -> Option<Confinement> {
        wiring::confinement(&self.service.parts().mode, self.row.slot, accelerator)
    }
}
