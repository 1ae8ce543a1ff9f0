//! Settings: what may be set, what each value means, and what holds now. They apply at once.

use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use pileus_api::Setting;
use pileus_base::{Code, Error, Result, Size};

use super::Service;
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
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            warm: WarmMode::Auto,
            warm_pool: 1,
            warm_budget: Size::gib(16),
            warm_in_memory: false,
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

const KEYS: [Key; 4] = [
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
    pub fn settings(&self) -> Vec<Setting> {
        let now = self.parts.settings.get();
        KEYS.iter().map(|key| shown(key, &now)).collect()
    }

    pub fn setting(&self, name: &str) -> Result<Setting> {
        Ok(shown(find(name)?, &self.parts.settings.get()))
    }

    pub async fn set(&self, name: &str, value: &str) -> Result<Setting> {
        let key = find(name)?;
        let mut settings = self.parts.settings.get();
        if !(key.set)(&mut settings, value) {
            return Err(Error::new(
                Code::InvalidArgument,
                format!("Invalid setting '{name}={value}': {value:?} is not possible"),
            )
            .advise(format!("Give {}.", key.values)));
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
        Ok(shown(key, &changed))
    }
}

fn find(name: &str) -> Result<&'static Key> {
    KEYS.iter().find(|key| key.name == name).ok_or_else(|| {
        Error::new(
            Code::SettingNotFound,
            format!("Unrecognized settings key: '{name}'"),
        )
        .advise("`pileus get --keys` lists all keys.")
    })
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
        ] {
            let key = find(name).unwrap();
            assert_eq!(
                (key.set)(&mut Settings::default(), value),
                good,
                "{name}={value}"
            );
        }
        assert_eq!(
            find("local.cold").err().unwrap().code,
            Code::SettingNotFound
        );
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
