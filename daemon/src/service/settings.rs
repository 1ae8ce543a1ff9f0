//! Settings: what may be set, what each value means, and what holds now. They apply at once.

use std::str::FromStr;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use pileus_api::Setting;
use pileus_base::{Code, Error, Result, Size};

use super::images::age;
use super::{Service, passphrase};
use crate::state::{self, State};

/// When templates are made and used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmMode {
    /// Made by themselves after the second launch of a shape.
    Auto,
    /// Used, but only made when asked for.
    Manual,
    /// Neither made nor used.
    Off,
}

impl WarmMode {
    fn as_str(self) -> &'static str {
        match self {
            WarmMode::Auto => "auto",
            WarmMode::Manual => "manual",
            WarmMode::Off => "off",
        }
    }
}

impl FromStr for WarmMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [WarmMode::Auto, WarmMode::Manual, WarmMode::Off]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| {
                Error::new(Code::InvalidArgument, format!("{text:?} is not possible"))
                    .advise("Choose auto, manual or off.")
            })
    }
}

const MIRROR: &str = "local.image.mirror";
/// The settings of the image store's budget begin so.
const IMAGES: &str = "local.images.";
/// A bound that is none.
const NONE: &str = "none";
/// Has a keeper of its own: only whether it is set can be read.
const PASSPHRASE: &str = "local.passphrase";

/// Yes and no in every spelling that users know.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Some(true),
        "false" | "off" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// What the settings say, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub warm: WarmMode,
    /// Clones that stand by.
    pub warm_pool: u32,
    /// Bytes that all templates may take.
    pub warm_budget: Size,
    /// Templates' memories lie on a tmpfs.
    pub warm_in_memory: bool,
    /// What `bridged` stands for: a network of the host, or nothing.
    pub bridged_network: String,
    /// Whether folders of the host may be mounted.
    pub privileged_mounts: bool,
    /// A copy of the image host that is asked instead of it; checked by the one who uses it.
    pub image_mirror: String,
    /// What the image store is kept within.
    pub images: ImageBudget,
}

/// What images may take; those that nobody needs go, the least recently used first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageBudget {
    /// Of the file system, for others.
    pub min_free: Size,
    /// All images together.
    pub max_size: Option<Size>,
    /// How long an image that nobody uses stays.
    pub max_age: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            warm: WarmMode::Auto,
            warm_pool: 1,
            warm_budget: Size::gib(16),
            warm_in_memory: false,
            bridged_network: String::new(),
            privileged_mounts: true,
            image_mirror: String::new(),
            images: ImageBudget {
                min_free: Size::gib(1),
                max_size: None,
                max_age: None,
            },
        }
    }
}

struct Key {
    name: &'static str,
    values: &'static str,
    get: fn(&Settings) -> String,
    /// False if the value can't be understood.
    set: fn(&mut Settings, &str) -> bool,
}

const KEYS: [Key; 11] = [
    Key {
        name: "local.bridged-network",
        values: "the name of a network (`pileus networks`), or nothing",
        get: |s| s.bridged_network.clone(),
        set: |s, value| {
            // As the kernel names interfaces.
            let fits = value.len() < 16 && !value.contains(|c: char| c == '/' || c.is_whitespace());
            if fits {
                value.clone_into(&mut s.bridged_network);
            }
            fits
        },
    },
    Key {
        name: "local.driver",
        values: "qemu",
        get: |_| "qemu".to_owned(),
        set: |_, value| value == "qemu",
    },
    Key {
        name: MIRROR,
        values: "an https:// address, or nothing",
        get: |s| s.image_mirror.clone(),
        set: |s, value| {
            value.clone_into(&mut s.image_mirror);
            true
        },
    },
    Key {
        name: "local.images.max-age",
        values: "an age, such as 30d, or none",
        get: |s| s.images.max_age.map_or_else(|| NONE.to_owned(), age::show),
        set: |s, value| match value {
            NONE => {
                s.images.max_age = None;
                true
            }
            value => age::parse(value)
                .map(|age| s.images.max_age = Some(age))
                .is_some(),
        },
    },
    Key {
        name: "local.images.max-size",
        values: "a size, such as 40GiB, or none",
        get: |s| {
            s.images
                .max_size
                .map_or_else(|| NONE.to_owned(), |size| size.to_string())
        },
        set: |s, value| match value {
            NONE => {
                s.images.max_size = None;
                true
            }
            value => value
                .parse()
                .map(|size| s.images.max_size = Some(size))
                .is_ok(),
        },
    },
    Key {
        name: "local.images.min-free",
        values: "a size, such as 1GiB",
        get: |s| s.images.min_free.to_string(),
        set: |s, value| value.parse().map(|size| s.images.min_free = size).is_ok(),
    },
    Key {
        name: "local.privileged-mounts",
        values: "true or false",
        get: |s| s.privileged_mounts.to_string(),
        set: |s, value| {
            parse_bool(value)
                .map(|on| s.privileged_mounts = on)
                .is_some()
        },
    },
    Key {
        name: "local.warm",
        values: "auto, manual or off",
        get: |s| s.warm.as_str().to_owned(),
        set: |s, value| value.parse().map(|mode| s.warm = mode).is_ok(),
    },
    Key {
        name: "local.warm-budget",
        values: "a size, such as 16GiB",
        get: |s| s.warm_budget.to_string(),
        set: |s, value| value.parse().map(|size| s.warm_budget = size).is_ok(),
    },
    Key {
        name: "local.warm-memory",
        values: "disk or tmpfs",
        get: |s| if s.warm_in_memory { "tmpfs" } else { "disk" }.to_owned(),
        set: |s, value| {
            s.warm_in_memory = match value {
                "disk" => false,
                "tmpfs" => true,
                _ => return false,
            };
            true
        },
    },
    Key {
        name: "local.warm-pool",
        values: "a number from 0 to 16",
        get: |s| s.warm_pool.to_string(),
        set: |s, value| match value.parse() {
            Ok(number) if number <= 16 => {
                s.warm_pool = number;
                true
            }
            _ => false,
        },
    },
];

/// The settings in memory; the database keeps them.
pub struct Keeper(RwLock<Settings>);

impl Keeper {
    /// Reads them. One that can't be understood (an older or newer daemon's) has its default.
    pub async fn load(state: &State, defaults: Settings) -> Result<Self> {
        let settings = state
            .run(move |tx| {
                let mut settings = defaults;
                for key in &KEYS {
                    if let Some(value) = state::settings::get(tx, key.name)?
                        && !(key.set)(&mut settings, &value)
                    {
                        tracing::warn!(key = key.name, value, "a setting can't be understood");
                    }
                }
                Ok(settings)
            })
            .await?;
        Ok(Self(RwLock::new(settings)))
    }

    pub fn get(&self) -> Settings {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Service {
    /// All settings by name: the daemon's own, then those of instances and snapshots.
    pub async fn settings(&self) -> Result<Vec<Setting>> {
        let now = self.parts.settings.get();
        let mut all: Vec<_> = KEYS.iter().map(|key| shown(key, &now)).collect();
        all.push(self.passphrase_setting().await?);
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all.extend(self.instance_settings());
        Ok(all)
    }

    pub async fn setting(&self, name: &str) -> Result<Setting> {
        if name == PASSPHRASE {
            return self.passphrase_setting().await;
        }
        match find(name) {
            Some(key) => Ok(shown(key, &self.parts.settings.get())),
            None => self.instance_setting(name),
        }
    }

    /// Changes a setting, in the database and then here.
    pub async fn set(&self, name: &str, value: &str) -> Result<Setting> {
        if name == PASSPHRASE {
            passphrase::set(&self.parts.state, value).await?;
            return self.passphrase_setting().await;
        }
        let Some(key) = find(name) else {
            return self.set_of_instance(name, value).await;
        };
        let mut settings = self.parts.settings.get();
        if !(key.set)(&mut settings, value) {
            return Err(
                bad_value(name, value, &format!("{value:?} is not possible"))
                    .advise(format!("Give {}.", key.values)),
            );
        }
        if name == MIRROR {
            self.parts.mirror.set(value)?;
        }
        // Kept in the form in which it is shown.
        let text = (key.get)(&settings);
        self.parts
            .state
            .run(move |tx| state::settings::set(tx, key.name, &text))
            .await?;
        let changed = {
            let mut held = self
                .parts
                .settings
                .0
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            // Another setting may have changed meanwhile: only this one is taken over.
            (key.set)(&mut held, value);
            held.clone()
        };
        self.settings_changed();
        if name.starts_with(IMAGES) {
            self.image_budget_changed();
        }
        Ok(shown(key, &changed))
    }

    async fn passphrase_setting(&self) -> Result<Setting> {
        let set = passphrase::is_set(&self.parts.state).await?;
        Ok(Setting {
            key: PASSPHRASE.to_owned(),
            value: set.to_string(),
            values: "a passphrase, or nothing; it is never shown".to_owned(),
        })
    }
}

fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

pub(super) fn unknown(name: &str) -> Error {
    Error::new(
        Code::SettingNotFound,
        format!("Unrecognized settings key: '{name}'"),
    )
    .advise("`pileus get --keys` lists all keys.")
}

pub(super) fn bad_value(name: &str, value: &str, why: &str) -> Error {
    Error::new(
        Code::InvalidSetting,
        format!("Invalid setting '{name}={value}': {why}"),
    )
}

fn shown(key: &Key, settings: &Settings) -> Setting {
    Setting {
        key: key.name.to_owned(),
        value: (key.get)(settings),
        values: key.values.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_that_is_shown_can_be_set() {
        let mut settings = Settings::default();
        for key in &KEYS {
            let shown = (key.get)(&settings);
            assert!((key.set)(&mut settings, &shown), "{} {shown}", key.name);
        }
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn values_good_and_bad() {
        for (name, value, good) in [
            ("local.warm", "manual", true),
            ("local.warm", "on", false),
            ("local.warm-pool", "16", true),
            ("local.warm-pool", "17", false),
            ("local.warm-pool", "-1", false),
            ("local.warm-budget", "1.5G", true),
            ("local.warm-budget", "much", false),
            ("local.warm-memory", "tmpfs", true),
            ("local.warm-memory", "", false),
            ("local.privileged-mounts", "Off", true),
            ("local.privileged-mounts", "maybe", false),
            ("local.bridged-network", "eth0", true),
            ("local.bridged-network", "", true),
            ("local.bridged-network", "a/b", false),
            ("local.driver", "qemu", true),
            ("local.driver", "lxd", false),
            ("local.images.min-free", "2G", true),
            ("local.images.min-free", "0", true),
            ("local.images.min-free", "none", false),
            ("local.images.max-size", "40GiB", true),
            ("local.images.max-size", "none", true),
            ("local.images.max-size", "", false),
            ("local.images.max-age", "30d", true),
            ("local.images.max-age", "none", true),
            ("local.images.max-age", "30", false),
        ] {
            let key = find(name).unwrap();
            assert_eq!(
                (key.set)(&mut Settings::default(), value),
                good,
                "{name}={value}"
            );
        }
        assert!(find("local.cold").is_none());
    }

    #[tokio::test]
    async fn an_unknown_value_in_the_database_is_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        state
            .run(|tx| {
                state::settings::set(tx, "local.warm", "sometimes")?;
                state::settings::set(tx, "local.warm-pool", "3")
            })
            .await
            .unwrap();
        let settings = Keeper::load(&state, Settings::default())
            .await
            .unwrap()
            .get();
        assert_eq!((settings.warm, settings.warm_pool), (WarmMode::Auto, 3));
    }
}
