//! A running machine that gets more processors and memory. Memory comes and goes through a virtio-mem device
//! that is there from the start; processors are put into sockets that were empty at boot. What a machine has is
//! asked of QEMU, so it is the same for a daemon that adopted it. Whether the guest takes it is the guest's
//! affair: `guest/life.rs` asks it before and tells it after.

use std::time::Duration;

use pileus_base::{Code, Error, Result, Size};
use pileus_qmp::QmpError;
use pileus_qmp::commands::{
    CpuPlace, DeviceAdd, QomGet, QomSet, QueryHotpluggableCpus, QueryMemorySizeSummary,
};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::argv::{MORE_CPU, MORE_MEMORY};
use super::spec::Growth;
use super::vm::Vm;

/// How long a guest may take to accept memory, or to give it back.
const MEMORY_BOUND: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

/// What a machine has, and may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grown {
    /// What it was booted with.
    pub cpus: u32,
    pub memory: Size,
    pub growth: Growth,
}

impl Vm {
    /// What the machine has. A machine that was started without room has none to grow.
    pub async fn grown(&self) -> Result<Grown> {
        let places = self.client().run(&QueryHotpluggableCpus {}).await?;
        let (cpus, more) = count(&places);
        let sizes = self.client().run(&QueryMemorySizeSummary {}).await?;
        let (room, memory) = match self.more_memory("memdev").await? {
            None => (0, 0),
            Some(_) => (self.room().await?, self.more_bytes("size").await?),
        };
        Ok(Grown {
            cpus,
            memory: Size(sizes.base_memory),
            growth: Growth {
                most_cpus: places.len() as u32,
                room: Size(room),
                cpus: more,
                memory: Size(memory),
            },
        })
    }

    /// Puts one more processor in; there has to be room.
    pub async fn plug_cpu(&self) -> Result<()> {
        let places = self.client().run(&QueryHotpluggableCpus {}).await?;
        let (_, more) = count(&places);
        // QEMU tells the last place first.
        let free = places.into_iter().rev().find(|p| p.qom_path.is_none());
        let Some(place) = free else {
            return Err(Error::internal("The machine has no place for a processor"));
        };
        let add = DeviceAdd {
            driver: place.kind,
            id: format!("{MORE_CPU}{more}"),
            bus: None,
            properties: place.props,
        };
        self.client().run(&add).await?;
        Ok(())
    }

    /// Asks the guest to have so much more memory than at its boot, and waits until it does. What it has
    /// then, which may be less (it takes no more, or gives no more back).
    pub async fn set_more_memory(&self, bytes: Size) -> Result<Size> {
        let set = QomSet {
            path: device(),
            property: "requested-size".into(),
            value: bytes.bytes().into(),
        };
        self.client().run(&set).await?;
        let until = Instant::now() + MEMORY_BOUND;
        loop {
            let now = self.more_bytes("size").await?;
            if now == bytes.bytes() || Instant::now() > until {
                return Ok(Size(now));
            }
            sleep(POLL).await;
        }
    }

    async fn room(&self) -> Result<u64> {
        let get = QomGet {
            path: "/objects/more".into(),
            property: "size".into(),
        };
        number(&self.client().run(&get).await?)
    }

    async fn more_bytes(&self, property: &str) -> Result<u64> {
        match self.more_memory(property).await? {
            Some(value) => number(&value),
            None => Err(no_device()),
        }
    }

    /// A property of the device; nothing if the machine has none.
    async fn more_memory(&self, property: &str) -> Result<Option<Value>> {
        let get = QomGet {
            path: device(),
            property: property.into(),
        };
        match self.client().run(&get).await {
            Ok(value) => Ok(Some(value)),
            Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound" => Ok(None),
            Err(err) => Err(err.into()),
        }
    }
}

fn device() -> String {
    format!("/machine/peripheral/{MORE_MEMORY}")
}

fn no_device() -> Error {
    Error::internal("The machine has no device that gives memory")
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().ok_or_else(|| {
        Error::new(
            Code::QemuFailed,
            "QEMU does not say how much memory it gives",
        )
    })
}

/// Processors from the boot, and later ones.
fn count(places: &[CpuPlace]) -> (u32, u32) {
    let taken = places.iter().filter_map(|place| place.qom_path.as_deref());
    let later = |path: &str| path.contains(&format!("/{MORE_CPU}"));
    let (later, first): (Vec<_>, Vec<_>) = taken.partition(|path| later(path));
    (first.len() as u32, later.len() as u32)
}
