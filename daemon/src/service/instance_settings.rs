//! Settings of instances (`local.NAME.cpus`) and of snapshots (`local.NAME.SNAPSHOT.comment`): what each is
//! now, and what a change of it does. What can't hold at once is pending until the next boot.

use std::sync::Arc;

use pileus_api::{Autostart, InstanceState, OnCrash, Setting};
use pileus_base::{Code, Error, Reporter, Result, Size, SnapshotName};
use pileus_instances::machine::Shape;

use super::Service;
use super::order::{MAX_CPUS, MIN_MEMORY};
use super::registry::Instance;
use super::settings::{bad_value, parse_bool, unknown};
use super::snapshots;
use crate::state::instances::InstanceRow;

const MOST_COMMENT: usize = 10 << 10;

/// What may be set of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Property {
    Autostart,
    Bridged,
    Cpus,
    Disk,
    Memory,
    OnCrash,
}

impl Property {
    const ALL: [Property; 6] = [
        Property::Autostart,
        Property::Bridged,
        Property::Cpus,
        Property::Disk,
        Property::Memory,
        Property::OnCrash,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Property::Autostart => "autostart",
            Property::Bridged => "bridged",
            Property::Cpus => "cpus",
            Property::Disk => "disk",
            Property::Memory => "memory",
            Property::OnCrash => "on-crash",
        }
    }

    fn values(self) -> &'static str {
        match self {
            Property::Autostart => "last, always or never",
            Property::Bridged => {
                "true or false: a card in local.bridged-network, from the next boot on"
            }
            Property::Cpus => {
                "a number from 1 on; a running guest gets more at once if it can take them, otherwise at its next boot"
            }
            Property::Disk => "a size; a disk only grows",
            Property::Memory => {
                "a size from 512M on; a running guest gets it at once if it can, otherwise at its next boot"
            }
            Property::OnCrash => "stop or restart",
        }
    }

    /// As it was set; what is pending comes before what holds. `bridged`: the network that this means.
    fn get(self, row: &InstanceRow, bridged: &str) -> String {
        let (spec, pending) = (&row.spec, &row.spec.pending);
        match self {
            Property::Autostart => word(&spec.autostart),
            Property::Bridged => is_in(row, bridged).to_string(),
            Property::Cpus => pending.cpus.unwrap_or(spec.cpus).to_string(),
            Property::Disk => spec.disk.to_string(),
            Property::Memory => pending.memory.unwrap_or(spec.memory).to_string(),
            Property::OnCrash => word(&spec.on_crash),
        }
    }
}

/// Whether the instance has a card in a network of the host.
fn is_in(row: &InstanceRow, network: &str) -> bool {
    row.spec.extra_nics.iter().any(|nic| nic.network == network)
}

/// What a key names.
enum Key<'a> {
    Instance(&'a str, Property),
    /// Of an instance, of that snapshot: its name or its comment.
    SnapshotName(&'a str, &'a str),
    SnapshotComment(&'a str, &'a str),
}

fn parse(key: &str) -> Option<Key<'_>> {
    let parts: Vec<_> = key.strip_prefix("local.")?.split('.').collect();
    match parts[..] {
        [instance, snapshot, "name"] => Some(Key::SnapshotName(instance, snapshot)),
        [instance, snapshot, "comment"] => Some(Key::SnapshotComment(instance, snapshot)),
        [instance, property] => {
            let found = Property::ALL.into_iter().find(|p| p.as_str() == property);
            Some(Key::Instance(instance, found?))
        }
        _ => None,
    }
}

/// The word by which a choice is known in the API.
fn word<T: serde::Serialize>(choice: &T) -> String {
    let value = serde_json::to_value(choice).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn choice<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()
}

fn setting(key: String, value: String, values: &str) -> Setting {
    Setting {
        key,
        value,
        values: values.to_owned(),
    }
}

const NAMES: &str = "a name that no other snapshot of the instance has";
const COMMENTS: &str = "any text";

impl Service {
    /// The settings of all instances that are not in the trash, by name.
    pub(super) fn instance_settings(&self) -> Vec<Setting> {
        let bridged = self.parts.settings.get().bridged_network;
        let mut all = Vec::new();
        for instance in self.parts.registry.all() {
            let row = instance.row();
            if row.deleted {
                continue;
            }
            let name = &row.name;
            all.extend(Property::ALL.map(|p| {
                let key = format!("local.{name}.{}", p.as_str());
                setting(key, p.get(&row, &bridged), p.values())
            }));
            for s in row.snapshots.iter() {
                let key = |what: &str| format!("local.{name}.{}.{what}", s.name);
                all.push(setting(key("comment"), s.comment.clone(), COMMENTS));
                all.push(setting(key("name"), s.name.to_string(), NAMES));
            }
        }
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }

    pub(super) fn instance_setting(&self, key: &str) -> Result<Setting> {
        let parsed = parse(key).ok_or_else(|| unknown(key))?;
        let (Key::Instance(name, _) | Key::SnapshotName(name, _) | Key::SnapshotComment(name, _)) =
            parsed;
        let row = self
            .parts
            .registry
            .get(name)
            .map_err(|_| unknown(key))?
            .row();
        let bridged = self.parts.settings.get().bridged_network;
        let of = |snapshot: &str| snapshots::find(&row, snapshot).map_err(|_| unknown(key));
        Ok(match parsed {
            Key::Instance(_, p) => setting(key.to_owned(), p.get(&row, &bridged), p.values()),
            Key::SnapshotName(_, s) => setting(key.to_owned(), of(s)?.name.to_string(), NAMES),
            Key::SnapshotComment(_, s) => setting(key.to_owned(), of(s)?.comment.clone(), COMMENTS),
        })
    }

    pub(super) async fn set_of_instance(&self, key: &str, value: &str) -> Result<Setting> {
        match parse(key).ok_or_else(|| unknown(key))? {
            Key::Instance(name, property) => {
                let instance = self.to_be_set(name)?;
                instance.machine_soon().await?;
                let _turn = instance.usable_turn(&Reporter::silent()).await?;
                self.set_property(&instance, property, key, value).await?;
                let row = instance.row();
                let bridged = self.parts.settings.get().bridged_network;
                Ok(setting(
                    key.to_owned(),
                    property.get(&row, &bridged),
                    property.values(),
                ))
            }
            Key::SnapshotName(name, snapshot) => {
                let new: SnapshotName = value.parse()?;
                let instance = self.to_be_set(name)?;
                let _turn = instance.usable_turn(&Reporter::silent()).await?;
                self.rename_snapshot(&instance, snapshot, &new).await?;
                let key = format!("local.{name}.{new}.name");
                Ok(setting(key, new.to_string(), NAMES))
            }
            Key::SnapshotComment(name, snapshot) => {
                if value.len() > MOST_COMMENT {
                    let why = format!("a comment has {MOST_COMMENT} bytes at most");
                    return Err(bad_value(key, "…", &why));
                }
                let instance = self.to_be_set(name)?;
                let _turn = instance.usable_turn(&Reporter::silent()).await?;
                let id = snapshots::find(&instance.row(), snapshot)?.id;
                instance
                    .change(|row| {
                        let all = Arc::make_mut(&mut row.snapshots).iter_mut();
                        for found in all.filter(|s| s.id == id) {
                            value.clone_into(&mut found.comment);
                        }
                    })
                    .await?;
                Ok(setting(key.to_owned(), value.to_owned(), COMMENTS))
            }
        }
    }

    fn to_be_set(&self, name: &str) -> Result<Arc<Instance>> {
        self.parts.registry.get_usable(name).map_err(|err| {
            let reason = match err.code {
                Code::InstanceDeleted => "Instance is deleted",
                _ => "No such instance",
            };
            let message =
                format!("Cannot update instance settings; instance: {name}; reason: {reason}");
            Error::new(err.code, message)
        })
    }

    async fn set_property(
        &self,
        instance: &Arc<Instance>,
        property: Property,
        key: &str,
        value: &str,
    ) -> Result<()> {
        let bad =
            |why: &str| bad_value(key, value, why).advise(format!("Give {}.", property.values()));
        match property {
            Property::Autostart => {
                let wish: Autostart = choice(value).ok_or_else(|| bad("it is no choice"))?;
                instance.change(|row| row.spec.autostart = wish).await?;
            }
            Property::OnCrash => {
                let wish: OnCrash = choice(value).ok_or_else(|| bad("it is no choice"))?;
                instance.change(|row| row.spec.on_crash = wish).await?;
            }
            Property::Bridged => {
                let wish = parse_bool(value).ok_or_else(|| bad("it is neither yes nor no"))?;
                self.bridge(instance, wish).await?;
            }
            Property::Cpus => {
                let cpus: u32 = value
                    .parse()
                    .ok()
                    .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
                    .ok_or_else(|| bad("Need a positive integer (in decimal format)"))?;
                self.reshape(instance, Some(cpus), None).await?;
            }
            Property::Memory => {
                let memory: Size = value.parse().map_err(|err: Error| bad(&err.message))?;
                if memory < MIN_MEMORY {
                    return Err(bad("Memory less than 512M minimum not allowed"));
                }
                let memory = memory.round_up(1 << 20);
                self.reshape(instance, None, Some(memory)).await?;
            }
            Property::Disk => {
                let disk: Size = value.parse().map_err(|err: Error| bad(&err.message))?;
                self.grow(instance, disk.round_up(512), &bad).await?;
            }
        }
        Ok(())
    }

    /// Gives an instance other processors or memory: at once what a running guest can take, the rest at its
    /// next boot.
    async fn reshape(
        &self,
        instance: &Arc<Instance>,
        cpus: Option<u32>,
        memory: Option<Size>,
    ) -> Result<()> {
        let machine = instance.machine()?.clone();
        let state = machine.snapshot().state;
        let row = instance.row();
        let want = Shape {
            cpus: cpus.or(row.spec.pending.cpus).unwrap_or(row.spec.cpus),
            memory: memory
                .or(row.spec.pending.memory)
                .unwrap_or(row.spec.memory),
        };
        let now = Shape {
            cpus: row.spec.cpus,
            memory: row.spec.memory,
        };
        let has = match state {
            InstanceState::Stopped => want,
            InstanceState::Running if want != now => match machine.grow(want).await {
                Ok(has) => has,
                Err(err) => {
                    tracing::info!(instance = %row.name, %err, "it gets its new size when it boots");
                    now
                }
            },
            _ => now,
        };
        instance
            .change(|row| {
                row.spec.cpus = has.cpus;
                row.spec.memory = has.memory;
                row.spec.pending.cpus = Some(want.cpus).filter(|cpus| *cpus != has.cpus);
                row.spec.pending.memory = Some(want.memory).filter(|memory| *memory != has.memory);
            })
            .await
            .map(drop)
    }

    /// Grows the disk: at once if the instance runs, and the guest is told; a stopped one gets a larger disk
    /// on top of what it has.
    async fn grow(
        &self,
        instance: &Arc<Instance>,
        size: Size,
        bad: &(dyn Fn(&str) -> Error + Sync),
    ) -> Result<()> {
        let row = instance.row();
        let before = row.spec.disk;
        if size == before {
            return Ok(());
        }
        if size < before {
            return Err(bad("Disk can only be expanded"));
        }
        self.can_be_frozen(&row)?;
        let machine = instance.machine()?.clone();
        let state = machine.snapshot().state;
        if !matches!(state, InstanceState::Running | InstanceState::Stopped) {
            let (name, state) = (&row.name, state.as_str());
            return Err(Error::new(
                Code::WrongState,
                format!("The disk of instance '{name}' can't grow while it is {state}"),
            )
            .advise("Start or stop it first."));
        }
        instance.change(|row| row.spec.disk = size).await?;
        let grown = match state {
            InstanceState::Running => machine.grow_disk(size).await,
            _ => self.freeze_disk(instance).await.map(drop),
        };
        if grown.is_err() {
            instance.change(|row| row.spec.disk = before).await?;
        }
        grown
    }

    async fn rename_snapshot(
        &self,
        instance: &Arc<Instance>,
        snapshot: &str,
        new: &SnapshotName,
    ) -> Result<()> {
        let row = instance.row();
        let id = snapshots::find(&row, snapshot)?.id;
        if row.snapshot(new.as_str()).is_some_and(|s| s.id != id) {
            return Err(snapshots::exists(&row, new.as_str()));
        }
        instance
            .change(|row| {
                let all = Arc::make_mut(&mut row.snapshots).iter_mut();
                for found in all.filter(|s| s.id == id) {
                    found.name = new.clone();
                }
            })
            .await
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::instances::tests::row;

    #[test]
    fn keys_good_and_bad() {
        for (key, good) in [
            ("local.foo.cpus", true),
            ("local.foo.memory", true),
            ("local.foo.snapshot1.name", true),
            ("local.foo.snapshot1.comment", true),
            ("local.foo.snapshot1.cpus", false),
            ("local.foo.zone", false),
            ("local.foo", false),
            ("client.foo.cpus", false),
            ("local.a.b.c.name", false),
            ("", false),
        ] {
            assert_eq!(parse(key).is_some(), good, "{key}");
        }
    }

    #[test]
    fn what_is_pending_is_shown_as_it_was_set() {
        let mut row = row("foo", 1);
        assert_eq!(Property::Cpus.get(&row, ""), "1");
        assert_eq!(Property::Memory.get(&row, ""), "1.0GiB");
        row.spec.pending.cpus = Some(3);
        row.spec.pending.memory = Some(Size::mib(1536));
        assert_eq!(Property::Cpus.get(&row, ""), "3");
        assert_eq!(Property::Memory.get(&row, ""), "1.5GiB");
        assert_eq!(Property::Autostart.get(&row, ""), "last");
        assert_eq!(choice::<Autostart>("always"), Some(Autostart::Always));
        assert_eq!(choice::<OnCrash>("always"), None);
    }
}
