//! `pileus image pack`: an image of an instance, or of one of its snapshots. A thin clone of it is booted as
//! somebody else, cleaned up from inside and shut down; the instance itself is only held for the moment in which
//! its disk is frozen.

use std::sync::Arc;

use pileus_api::{
    Autostart, CloneRequest, InstanceState, OnCrash, OperationKind, Origin, PackRequest,
};
use pileus_base::{Code, Error, Phase, Reporter, Result, files};
use pileus_images::packed::Machine;
use pileus_images::{Image, ImageRef, overlay};
use pileus_instances::driver;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::machine::BOOT_TIMEOUT;

use super::super::admission::Start;
use super::super::archive::Export;
use super::super::given::{Given, seed_of};
use super::super::lifecycle::bound;
use super::super::registry::Instance;
use super::super::snapshots::find;
use super::super::{Service, leases, wiring};
use super::publish::Made;
use super::recipe::{About, line};
use super::throwaway::{self, Throwaway};
use crate::state::instances::InstanceRow;

impl Service {
    /// Begins to pack an instance. What is wrong with the request itself is told at once.
    pub async fn pack_instance(&self, name: &str, request: PackRequest) -> Result<Export> {
        let source = self.parts.registry.get_usable(name)?;
        source.machine_soon().await?;
        let row = source.row();
        self.can_be_frozen(&row)?;
        if let Some(snapshot) = &request.snapshot {
            find(&row, snapshot.as_str())?;
        }
        if let Some(title) = &request.title {
            line(title)?;
        }
        self.check_tag(request.tag.as_deref())?;
        if !request.keep_identity {
            // A host that can't run anything says so before anything is made.
            self.parts.hypervisor.get().await?;
        }
        let service = self.clone();
        self.making(OperationKind::PackImage, name, |report| async move {
            service.pack_now(&source, &request, &report).await
        })
        .await
    }

    async fn pack_now(
        &self,
        source: &Arc<Instance>,
        request: &PackRequest,
        report: &Reporter,
    ) -> Result<Made> {
        let (machine, from, image) = self.clone_to_pack(source, request, report).await?;
        let done = async {
            if !request.keep_identity {
                self.forget(&machine, request, report).await?;
            }
            // Its layers stay what they are until they were read.
            let _turn = machine.instance()?.turn(report).await?;
            let parts = self.parts_of(&machine, &image)?;
            let about = about(&from, request);
            let what = match &request.snapshot {
                Some(snapshot) => format!("instance {}.{snapshot}", from.name),
                None => format!("instance {}", from.name),
            };
            let mut info = self.info_of(Some(image.info()), what, &about);
            info.made_of = Some(info.source.clone());
            let stays = request.tag.is_some();
            self.publish(&parts, info, stays, report).await
        };
        let done = done.await;
        machine.end().await;
        let (image, is_new) = done?;
        Ok(Made {
            image,
            is_new,
            tag: request.tag.clone(),
        })
    }

    /// A throw-away instance on the layers that are to be packed, what it is a copy of, and the image below.
    async fn clone_to_pack(
        &self,
        source: &Arc<Instance>,
        request: &PackRequest,
        report: &Reporter,
    ) -> Result<(Throwaway, InstanceRow, Arc<Image>)> {
        let _turn = source.usable_turn(report).await?;
        report.phase(Phase::Snapshotting);
        if request.snapshot.is_none() {
            match source.machine()?.snapshot().state {
                InstanceState::Running => report
                    .warn("The instance runs: its disk is packed as it would be after a power cut"),
                InstanceState::Suspended => {
                    report.warn("Its saved memory is not packed: its disk is as after a power cut");
                }
                _ => {}
            }
        }
        let clone = CloneRequest {
            name: None,
            snapshot: request.snapshot.clone(),
        };
        let (layers, disk, from) = self.layers_for_clone(source, &clone, report).await?;
        let image = from.spec.image.as_ref();
        let image = image.and_then(|image| self.parts.store.get(&image.digest));
        let image = image.ok_or_else(|| wiring::no_image(&from))?;
        let mut spec = from.spec.for_another();
        spec.layers = layers;
        spec.disk = disk;
        spec.extra_nics.clear();
        spec.autostart = Autostart::Never;
        spec.on_crash = OnCrash::default();
        spec.identify = true;
        spec.origin = Origin::Clone {
            of: from.name.clone(),
            snapshot: request.snapshot.clone(),
        };
        let lease = leases::expiry((self.parts.clock)(), super::LEASE)?;
        let name = throwaway::name("pack")?;
        let instance = self.reserve_row(Some(name), spec, Some(lease)).await?;
        let machine = Throwaway::new(self, instance.clone());
        match self.write_files_to_pack(&instance.row()).await {
            Ok(()) => Ok((machine, from, image)),
            Err(err) => {
                machine.end().await;
                Err(err)
            }
        }
    }

    /// As for a clone, but without the source's user data: it was carried out there, and is not to be again.
    async fn write_files_to_pack(&self, row: &InstanceRow) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let disk = wiring::disk(&self.parts.layout, row);
        let top = row.spec.layers.last().map(|l| self.parts.layout.layer(l.0));
        let top = top.ok_or_else(|| Error::internal("What is packed has no layer"))?;
        let row = row.clone();
        super::super::blocking(move || {
            files::create_folder(&folder, 0o700)?;
            overlay::create_on_layer(&disk, row.spec.disk, &top)?;
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let seed = seed_of(&row, &keys, &Given::default())?;
            files::write_atomic(&folder.join(driver::SEED), &seed, 0o600)
        })
        .await
    }

    /// Boots the clone, and makes it forget who it is.
    async fn forget(
        &self,
        machine: &Throwaway,
        request: &PackRequest,
        report: &Reporter,
    ) -> Result<()> {
        let instance = machine.instance()?;
        let row = instance.row();
        let image = row.spec.image.as_ref();
        let image = image.and_then(|image| self.parts.store.get(&image.digest));
        let image = image.ok_or_else(|| wiring::no_image(&row))?;
        let promise = self.admit(row.spec.memory, Start::Cold).await?;
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        let own = self.own(instance, image)?;
        let started = own.start(timeout, Vec::new(), report.clone()).await;
        drop(promise);
        started.map_err(|mut err| {
            // What it says is for an instance that stays.
            err.advice = Some(
                "A guest that pileus can't talk to can be packed as it is: --keep-identity."
                    .to_owned(),
            );
            err
        })?;
        machine.clean_up(report).await
    }

    /// A tag that can't be given is told before the work.
    pub(super) fn check_tag(&self, tag: Option<&str>) -> Result<()> {
        match tag {
            Some(tag) => match tag.parse() {
                Ok(ImageRef::Name(_)) => Ok(()),
                _ => Err(Error::new(
                    Code::InvalidArgument,
                    format!("{tag:?} is no name for an image"),
                )
                .advise("Give letters and digits, with . _ + - / in between.")),
            },
            None => Ok(()),
        }
    }
}

/// What the image tells of itself.
fn about(from: &InstanceRow, request: &PackRequest) -> About {
    let machine = Machine {
        memory: u32::try_from(from.spec.memory.bytes() >> 20).ok(),
        cores: u8::try_from(from.spec.cpus).ok(),
        ..Machine::default()
    };
    About {
        tag: request.tag.clone(),
        title: Some(match &request.title {
            Some(title) => title.clone(),
            None => from.name.to_string(),
        }),
        machine: request.with_machine.then_some(machine),
        ..About::default()
    }
}
