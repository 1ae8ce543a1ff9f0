//! Table `instances`: what each instance is made of, where its process is, and how its last start
//! went. A row that can't be read hurts that one instance: it is listed as broken, never dropped.

use std::net::Ipv4Addr;
use std::sync::Arc;

use pileus_api::{
    Autostart, CloudInit, ErrorBody, InstanceImage, InstanceState, OnCrash, Origin, Pending,
    PhaseTime, Timestamp,
};
use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, InstanceName, Mac, Result, Size, SnapshotName};
use pileus_instances::machine::Saved;
use pileus_instances::qemu::Hardware;
use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::database;

/// What the machine is made of; changes only by request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub cpus: u32,
    pub memory: Size,
    /// The guest's disk; 0 until the image is known, if the user didn't say.
    pub disk: Size,
    /// Known once the image is in the store.
    pub image: Option<InstanceImage>,
    /// Versioned machine type, so that a later QEMU keeps the same hardware.
    pub machine_type: Option<String>,
    /// The guest chooses its own kernel.
    #[serde(default)]
    pub firmware_boot: bool,
    /// Its VM ran at least once: from then on a start that fails is no reason to remove it.
    #[serde(default)]
    pub booted: bool,
    /// Where its first run came from.
    #[serde(default = "booted_cold")]
    pub origin: Origin,
    /// The layers between the image and its own disk, the lowest first. Shared, never written.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// Its disk lies in memory.
    #[serde(default)]
    pub disk_in_memory: bool,
    /// The machine as it was when it was suspended.
    #[serde(default)]
    pub suspended: Option<Saved>,
    /// Its disk is a copy of another one's: the next boot gives it an identity of its own.
    #[serde(default)]
    pub identify: bool,
    /// `disk.restored` is about to take the disk's place.
    #[serde(default)]
    pub restoring: bool,
    /// What holds from the next boot on.
    #[serde(default)]
    pub pending: Pending,
    #[serde(default)]
    pub autostart: Autostart,
    #[serde(default)]
    pub on_crash: OnCrash,
    /// The guest's time zone, if the launch named one.
    #[serde(default)]
    pub timezone: Option<String>,
    /// How many snapshots were ever taken; numbers the next one.
    #[serde(default)]
    pub snapshots_taken: u32,
    /// How many clones were ever made; numbers the next one.
    #[serde(default)]
    pub clones_made: u32,
    /// The snapshot that it stands on.
    #[serde(default)]
    pub head: Option<Uuid>,
    /// What the machine has besides the usual; decided at its launch.
    #[serde(default, skip_serializing_if = "Hardware::is_usual")]
    pub hardware: Hardware,
    /// Cards in the host's networks, besides the one in ours.
    #[serde(default)]
    pub extra_nics: Vec<ExtraNic>,
}

/// A card in a network of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraNic {
    /// The host's name of the bridge, or of a card in one.
    pub network: String,
    pub mac: Mac,
    /// The guest asks for an address.
    pub auto: bool,
}

/// A MAC address in QEMU's range that nobody else has.
pub fn random_mac() -> Mac {
    let [a, b, c, ..] = Uuid::new_v4().into_bytes();
    Mac([0x52, 0x54, 0, a, b, c])
}

/// An instance as it was: a record, and layers that are never written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRow {
    pub id: Uuid,
    pub name: SnapshotName,
    #[serde(default)]
    pub comment: String,
    pub parent: Option<Uuid>,
    pub created_at: Timestamp,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    /// The whole chain above the image, the lowest first.
    pub layers: Vec<Layer>,
    #[serde(default)]
    pub firmware_boot: bool,
    /// Its disk was a copy of another one's then, and had not been given an identity of its own yet.
    #[serde(default)]
    pub identify: bool,
    /// Devices and memory at that moment.
    #[serde(default)]
    pub saved: Option<Saved>,
}

impl Spec {
    /// What a new instance is, before its image is known.
    pub fn new(cpus: u32, memory: Size, disk: Size) -> Self {
        Self {
            cpus,
            memory,
            disk,
            image: None,
            machine_type: None,
            firmware_boot: false,
            booted: false,
            origin: booted_cold(),
            layers: Vec::new(),
            disk_in_memory: false,
            suspended: None,
            identify: false,
            restoring: false,
            pending: Pending::default(),
            autostart: Autostart::default(),
            on_crash: OnCrash::default(),
            timezone: None,
            snapshots_taken: 0,
            clones_made: 0,
            head: None,
            extra_nics: Vec::new(),
            hardware: Hardware::default(),
        }
    }

    /// The same hardware and settings for another instance, without this one's life. No two cards have
    /// one address, and no two machines one id.
    pub fn for_another(&self) -> Self {
        Self {
            image: self.image.clone(),
            machine_type: self.machine_type.clone(),
            firmware_boot: self.firmware_boot,
            autostart: self.autostart,
            on_crash: self.on_crash,
            timezone: self.timezone.clone(),
            extra_nics: self.extra_nics.iter().map(ExtraNic::for_another).collect(),
            hardware: Hardware {
                uuid: None,
                ..self.hardware.clone()
            },
            ..Self::new(self.cpus, self.memory, self.disk)
        }
    }
}

impl ExtraNic {
    fn for_another(&self) -> Self {
        Self {
            mac: random_mac(),
            ..self.clone()
        }
    }
}

/// A read-only qcow2 file that instances or templates stand on: `data/layers/ID.qcow2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layer(pub Uuid);

pub fn booted_cold() -> Origin {
    Origin::Cold { reason: None }
}

/// How the last start went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    #[serde(default)]
    pub phases: Vec<PhaseTime>,
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
    #[serde(default)]
    pub last_error: Option<ErrorBody>,
    /// Its VM ended although nobody wanted it to.
    #[serde(default)]
    pub crashed: bool,
    /// It ran when the host went down.
    #[serde(default)]
    pub cut_off: bool,
}

/// A life stage as the table knows it: the API's states, and the intent to purge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Is(InstanceState),
    Purging,
}

impl Stage {
    fn as_str(self) -> &'static str {
        match self {
            Stage::Is(state) => state.as_str(),
            Stage::Purging => "purging",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if text == "purging" {
            return Some(Stage::Purging);
        }
        InstanceState::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .map(Stage::Is)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct InstanceRow {
    pub id: Uuid,
    pub name: InstanceName,
    pub address: Ipv4Addr,
    pub mac: Mac,
    /// A small number of its own: names the tap and the user that its QEMU runs as.
    pub slot: u32,
    pub stage: Stage,
    pub deleted: bool,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    /// When it is deleted unless the lease is renewed.
    pub lease: Option<Timestamp>,
    /// When it is shut down.
    pub shutdown_at: Option<Timestamp>,
    pub spec: Spec,
    pub process: Option<ProcessId>,
    pub history: History,
    /// In the order in which they were taken. Shared, because most readers don't want them.
    pub snapshots: Arc<Vec<SnapshotRow>>,
}

impl InstanceRow {
    pub fn snapshot(&self, name: &str) -> Option<&SnapshotRow> {
        self.snapshots
            .iter()
            .find(|s| s.name.as_str().eq_ignore_ascii_case(name))
    }

    /// Every layer that it or one of its snapshots stands on.
    pub fn all_layers(&self) -> impl Iterator<Item = Layer> + '_ {
        let of_snapshots = self.snapshots.iter().flat_map(|s| &s.layers);
        self.spec.layers.iter().chain(of_snapshots).copied()
    }
}

/// A row that can't be understood.
#[derive(Debug, Clone)]
pub struct BrokenRow {
    pub id: String,
    pub name: String,
    pub why: String,
}

const COLUMNS: &str = "id, name, address, mac, slot, state, deleted, created_at, started_at, spec, \
                       process, history, lease, shutdown_at, snapshots";

/// Refuses a name that another instance has, in any case of its letters.
pub fn name_is_free(tx: &Transaction<'_>, id: Uuid, name: &InstanceName) -> Result<()> {
    let taken: Option<String> = tx
        .query_row(
            "SELECT name FROM instances WHERE name = ?1 COLLATE NOCASE AND id <> ?2",
            [name.as_str(), &id.to_string()],
            |found| found.get(0),
        )
        .optional()
        .map_err(|err| database("Reading", err))?;
    match taken {
        None => Ok(()),
        Some(taken) => Err(Error::new(
            Code::InstanceExists,
            format!("instance \"{taken}\" already exists"),
        )
        .advise("Choose another name, or delete that one with `pileus delete --purge`.")),
    }
}

/// Refuses a card whose MAC address another instance's has.
pub fn macs_are_free(tx: &Transaction<'_>, nics: &[ExtraNic]) -> Result<()> {
    if nics.is_empty() {
        return Ok(());
    }
    for row in all(tx)?.0 {
        let theirs = row.spec.extra_nics.iter().map(|nic| nic.mac);
        for mac in theirs.chain([row.mac]) {
            if nics.iter().any(|nic| nic.mac == mac) {
                return Err(Error::new(
                    Code::InvalidArgument,
                    format!(
                        "The MAC address {mac} is already used by instance '{}'",
                        row.name
                    ),
                )
                .advise("Choose another one, or none: then it is a random one."));
            }
        }
    }
    Ok(())
}

/// Whose first or further card has this MAC address, but for the instance `id`.
pub fn mac_holder(tx: &Transaction<'_>, id: Uuid, mac: Mac) -> Result<Option<InstanceName>> {
    let has = |row: &InstanceRow| {
        let mut further = row.spec.extra_nics.iter();
        row.mac == mac || further.any(|nic| nic.mac == mac)
    };
    let mut others = all(tx)?.0.into_iter().filter(|row| row.id != id);
    Ok(others.find(has).map(|row| row.name))
}

/// Whose firmware names this id, but for the instance `id`.
pub fn uuid_holder(tx: &Transaction<'_>, id: Uuid, uuid: Uuid) -> Result<Option<InstanceName>> {
    let has = |row: &InstanceRow| row.id == uuid || row.spec.hardware.uuid == Some(uuid);
    let mut others = all(tx)?.0.into_iter().filter(|row| row.id != id);
    Ok(others.find(has).map(|row| row.name))
}

/// Adds a new instance; its name, address, MAC and slot must be free.
pub fn insert(tx: &Transaction<'_>, row: &InstanceRow) -> Result<()> {
    name_is_free(tx, row.id, &row.name)?;
    tx.execute(
        &format!(
            "INSERT INTO instances ({COLUMNS}) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15)"
        ),
        params![
            row.id.to_string(),
            row.name.as_str(),
            row.address.to_string(),
            row.mac.to_string(),
            row.slot,
            row.stage.as_str(),
            row.deleted,
            row.created_at.to_string(),
            row.started_at.map(|t| t.to_string()),
            json(&row.spec)?,
            row.process.map(|p| json(&p)).transpose()?,
            json(&row.history)?,
            row.lease.map(|t| t.to_string()),
            row.shutdown_at.map(|t| t.to_string()),
            json(&*row.snapshots)?,
        ],
    )
    .map_err(|err| database("Writing", err))?;
    Ok(())
}

/// Replaces what may change of an instance.
pub fn update(tx: &Transaction<'_>, row: &InstanceRow) -> Result<()> {
    tx.execute(
        "UPDATE instances SET name = ?2, state = ?3, deleted = ?4, started_at = ?5, spec = ?6,
         process = ?7, history = ?8, lease = ?9, shutdown_at = ?10, snapshots = ?11, mac = ?12
         WHERE id = ?1",
        params![
            row.id.to_string(),
            row.name.as_str(),
            row.stage.as_str(),
            row.deleted,
            row.started_at.map(|t| t.to_string()),
            json(&row.spec)?,
            row.process.map(|p| json(&p)).transpose()?,
            json(&row.history)?,
            row.lease.map(|t| t.to_string()),
            row.shutdown_at.map(|t| t.to_string()),
            json(&*row.snapshots)?,
            row.mac.to_string(),
        ],
    )
    .map_err(|err| database("Writing", err))?;
    Ok(())
}

pub fn remove(tx: &Transaction<'_>, id: Uuid) -> Result<()> {
    tx.execute("DELETE FROM instances WHERE id = ?1", [id.to_string()])
        .map_err(|err| database("Writing", err))?;
    Ok(())
}

/// All instances by name, and the rows that can't be understood.
pub fn all(tx: &Transaction<'_>) -> Result<(Vec<InstanceRow>, Vec<BrokenRow>)> {
    let failed = |err| database("Reading", err);
    let mut statement = tx
        .prepare_cached(&format!("SELECT {COLUMNS} FROM instances ORDER BY name"))
        .map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    let (mut good, mut broken) = (Vec::new(), Vec::new());
    while let Some(row) = rows.next().map_err(failed)? {
        match parse(row) {
            Ok(row) => good.push(row),
            Err(why) => broken.push(BrokenRow {
                id: row.get(0).unwrap_or_default(),
                name: row.get(1).unwrap_or_default(),
                why,
            }),
        }
    }
    Ok((good, broken))
}

/// What new instances must keep clear of, broken rows included.
pub struct Taken {
    pub names: Vec<String>,
    pub addresses: Vec<Ipv4Addr>,
    pub slots: Vec<u32>,
}

pub fn taken(tx: &Transaction<'_>) -> Result<Taken> {
    let failed = |err| database("Reading", err);
    let mut statement = tx
        .prepare_cached("SELECT name, address, slot FROM instances")
        .map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    let mut taken = Taken {
        names: Vec::new(),
        addresses: Vec::new(),
        slots: Vec::new(),
    };
    while let Some(row) = rows.next().map_err(failed)? {
        taken.names.extend(row.get::<_, String>(0).ok());
        let address: Option<String> = row.get(1).ok();
        taken
            .addresses
            .extend(address.and_then(|a| a.parse::<Ipv4Addr>().ok()));
        taken.slots.extend(row.get::<_, u32>(2).ok());
    }
    Ok(taken)
}

fn parse(row: &Row<'_>) -> Result<InstanceRow, String> {
    fn text(row: &Row<'_>, column: &str) -> Result<String, String> {
        row.get(column).map_err(|err| format!("{column}: {err}"))
    }
    fn optional(row: &Row<'_>, column: &str) -> Result<Option<String>, String> {
        row.get(column).map_err(|err| format!("{column}: {err}"))
    }
    fn read<T: std::str::FromStr>(column: &str, text: &str) -> Result<T, String> {
        text.parse()
            .map_err(|_| format!("{column}: {text:?} can't be understood"))
    }
    fn read_json<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T, String> {
        serde_json::from_str(text).map_err(|err| format!("{column}: {err}"))
    }
    let state = text(row, "state")?;
    Ok(InstanceRow {
        id: read("id", &text(row, "id")?)?,
        name: read("name", &text(row, "name")?)?,
        address: read("address", &text(row, "address")?)?,
        mac: read("mac", &text(row, "mac")?)?,
        slot: row.get("slot").map_err(|err| format!("slot: {err}"))?,
        stage: Stage::parse(&state).ok_or_else(|| format!("state: {state:?} is unknown"))?,
        deleted: row
            .get("deleted")
            .map_err(|err| format!("deleted: {err}"))?,
        created_at: read("created_at", &text(row, "created_at")?)?,
        started_at: optional(row, "started_at")?
            .map(|t| read("started_at", &t))
            .transpose()?,
        lease: optional(row, "lease")?
            .map(|t| read("lease", &t))
            .transpose()?,
        shutdown_at: optional(row, "shutdown_at")?
            .map(|t| read("shutdown_at", &t))
            .transpose()?,
        snapshots: Arc::new(read_json("snapshots", &text(row, "snapshots")?)?),
        spec: read_json("spec", &text(row, "spec")?)?,
        process: optional(row, "process")?
            .map(|p| read_json("process", &p))
            .transpose()?,
        history: read_json("history", &text(row, "history")?)?,
    })
}

fn json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|err| Error::internal(format!("Writing a record as JSON: {err}")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::state::State;

    pub(crate) fn row(name: &str, slot: u32) -> InstanceRow {
        InstanceRow {
            id: Uuid::new_v4(),
            name: name.parse().unwrap(),
            address: Ipv4Addr::from(0x0a00_0002 + slot),
            mac: Mac([0x52, 0x54, 0, 0, 0, slot as u8]),
            slot,
            stage: Stage::Is(InstanceState::Stopped),
            deleted: false,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            lease: Some(Timestamp::UNIX_EPOCH),
            shutdown_at: Some(Timestamp::UNIX_EPOCH),
            spec: Spec {
                layers: vec![Layer(Uuid::nil())],
                ..Spec::new(1, Size::gib(1), Size::gib(5))
            },
            process: None,
            history: History::default(),
            snapshots: Arc::new(vec![SnapshotRow {
                id: Uuid::nil(),
                name: "snapshot1".parse().unwrap(),
                comment: "a \"comment\"".into(),
                parent: None,
                created_at: Timestamp::UNIX_EPOCH,
                cpus: 1,
                memory: Size::gib(1),
                disk: Size::gib(5),
                layers: vec![Layer(Uuid::nil())],
                firmware_boot: true,
                identify: true,
                saved: None,
            }]),
        }
    }

    #[tokio::test]
    async fn a_row_round_trips_and_names_are_taken_in_any_case() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        let mut one = row("foo", 1);
        let inserted = one.clone();
        state.run(move |tx| insert(tx, &inserted)).await.unwrap();
        one.stage = Stage::Purging;
        one.process = ProcessId::of(1);
        one.started_at = Some(Timestamp::UNIX_EPOCH);
        let updated = one.clone();
        state.run(move |tx| update(tx, &updated)).await.unwrap();
        let (rows, broken) = state.run(all).await.unwrap();
        assert_eq!(rows, [one]);
        assert!(broken.is_empty());
        let clash = row("FOO", 2);
        let err = state.run(move |tx| insert(tx, &clash)).await.unwrap_err();
        assert_eq!(err.code, Code::InstanceExists);
    }

    #[tokio::test]
    async fn cards_have_addresses_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        let mut one = row("foo", 1);
        let nic = |last| ExtraNic {
            network: "br0".into(),
            mac: Mac([0x52, 0x54, 0, 1, 1, last]),
            auto: true,
        };
        one.spec.extra_nics = vec![nic(1), nic(2)];
        let other = one.spec.for_another();
        assert_eq!(other.extra_nics.len(), 2);
        for (ours, theirs) in one.spec.extra_nics.iter().zip(&other.extra_nics) {
            assert_eq!(ours.network, theirs.network);
            assert_ne!(ours.mac, theirs.mac);
        }
        let first = one.mac;
        state.run(move |tx| insert(tx, &one)).await.unwrap();
        for (mac, free) in [(nic(1).mac, false), (first, false), (nic(3).mac, true)] {
            let wanted = [ExtraNic { mac, ..nic(0) }];
            let checked = state.run(move |tx| macs_are_free(tx, &wanted)).await;
            assert_eq!(checked.is_ok(), free, "{mac}");
        }
    }

    #[tokio::test]
    async fn a_row_that_can_not_be_read_hurts_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        state
            .run(|tx| {
                insert(tx, &row("good", 1))?;
                insert(tx, &row("bad", 2))?;
                tx.execute("UPDATE instances SET spec = '{' WHERE name = 'bad'", [])
                    .map_err(|err| database("Writing", err))?;
                Ok(())
            })
            .await
            .unwrap();
        let (rows, broken) = state.run(all).await.unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(broken.len(), 1);
        assert_eq!(broken[0].name, "bad");
        // Its name, address and slot stay its own.
        let taken = state.run(taken).await.unwrap();
        assert_eq!(taken.slots.len(), 2);
    }
}
