//! What the user gave to cloud-init: kept in the instance's folder, because seeds are made anew, for each
//! boot and for copies of the instance.

use std::path::Path;

use pileus_base::{Result, files};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed::{self, SeedNic, SeedSpec};

use crate::state::instances::InstanceRow;

/// In the instance's folder.
pub(super) const USER_DATA: &str = "user-data";
pub(super) const NETWORK_CONFIG: &str = "network-config";
const MOST: u64 = 16 << 20;

/// Checked when it was given, and passed on byte by byte.
#[derive(Debug, Clone, Default)]
pub(super) struct Given {
    pub user_data: Option<Vec<u8>>,
    pub network_config: Option<Vec<u8>>,
}

impl Given {
    /// Reads what an instance was given.
    pub fn load(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            let there = path.exists();
            there.then(|| files::read_bounded(&path, MOST)).transpose()
        };
        Ok(Self {
            user_data: read(USER_DATA)?,
            network_config: read(NETWORK_CONFIG)?,
        })
    }

    pub fn store(&self, folder: &Path) -> Result<()> {
        for (name, bytes) in [
            (USER_DATA, &self.user_data),
            (NETWORK_CONFIG, &self.network_config),
        ] {
            if let Some(bytes) = bytes {
                files::write_atomic(&folder.join(name), bytes, 0o600)?;
            }
        }
        Ok(())
    }
}

/// The seed of an instance: its own network card, and those of the others that it shall set up itself.
pub(super) fn seed_of(row: &InstanceRow, keys: &InstanceKeys, given: &Given) -> Result<Vec<u8>> {
    let mut nics = vec![SeedNic {
        mac: row.mac.to_string(),
        // User data may need the network: packages, includes.
        optional: false,
    }];
    let auto = row.spec.extra_nics.iter().filter(|nic| nic.auto);
    nics.extend(auto.map(|nic| SeedNic {
        mac: nic.mac.to_string(),
        optional: true,
    }));
    seed::build(&SeedSpec {
        instance_id: &row.id.to_string(),
        hostname: row.name.as_str(),
        user_data: given.user_data.as_deref(),
        network_config: given.network_config.as_deref(),
        nics: &nics,
        keys,
        timezone: row.spec.timezone.as_deref(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Given::load(dir.path()).unwrap().user_data.is_none());
        let given = Given {
            user_data: Some(b"#!/bin/sh\n\xff".to_vec()),
            network_config: Some(b"version: 2\n".to_vec()),
        };
        given.store(dir.path()).unwrap();
        let kept = Given::load(dir.path()).unwrap();
        assert_eq!(kept.user_data, given.user_data);
        assert_eq!(kept.network_config, given.network_config);
    }
}
