//! The keys of one instance: a client key (who may log in) and a host key (which guest it is). Both
//! are made here on the host, so both ends can be pinned before the guest has booted once.
//!
//! Next: `seed.rs` carries the guest's halves into the guest, `ssh.rs` uses the host's halves.

use std::path::Path;

use pileus_base::{Error, Result, files};
use rand::TryRngCore;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::ssh_key::{LineEnding, PrivateKey, PublicKey};

const CLIENT_FILE: &str = "client_key";
const HOST_FILE: &str = "host_key";
/// An ed25519 key in OpenSSH's format has about 400 bytes.
const MAX_KEY: u64 = 16 * 1024;

/// Client and host key of an instance.
#[derive(Clone)]
pub struct InstanceKeys {
    client: PrivateKey,
    host: PrivateKey,
}

impl InstanceKeys {
    /// Makes a new pair of keys.
    pub fn generate() -> Result<Self> {
        Ok(Self {
            client: ed25519("pileus")?,
            host: ed25519("pileus-host")?,
        })
    }

    /// Writes both keys below the instance's folder, readable by the owner alone.
    pub fn store(&self, folder: &Path) -> Result<()> {
        for (name, key) in [(CLIENT_FILE, &self.client), (HOST_FILE, &self.host)] {
            files::write_atomic(&folder.join(name), openssh(key)?.as_bytes(), 0o600)?;
        }
        Ok(())
    }

    /// Reads the keys of an instance's folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<PrivateKey> {
            let path = folder.join(name);
            let text = files::read_bounded(&path, MAX_KEY)?;
            PrivateKey::from_openssh(text).map_err(|err| {
                Error::internal(format!("{} is not a private key: {err}", path.display()))
            })
        };
        Ok(Self {
            client: read(CLIENT_FILE)?,
            host: read(HOST_FILE)?,
        })
    }

    pub fn client(&self) -> &PrivateKey {
        &self.client
    }

    /// The host key as the guest must show it.
    pub fn host_public(&self) -> &PublicKey {
        self.host.public_key()
    }

    /// One line for `authorized_keys`.
    pub fn client_public_line(&self) -> Result<String> {
        public_line(self.client.public_key())
    }

    /// One line for `known_hosts` (without names) or `ssh_host_ed25519_key.pub`.
    pub fn host_public_line(&self) -> Result<String> {
        public_line(self.host.public_key())
    }

    /// The guest's host key file.
    pub fn host_private_text(&self) -> Result<String> {
        openssh(&self.host)
    }
}

// Private keys never get into a log.
impl std::fmt::Debug for InstanceKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InstanceKeys").finish_non_exhaustive()
    }
}

fn ed25519(comment: &str) -> Result<PrivateKey> {
    let mut seed = [0; 32];
    rand::rngs::OsRng
        .try_fill_bytes(&mut seed)
        .map_err(|err| Error::internal(format!("The system gave no random bytes: {err}")))?;
    let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
    key.set_comment(comment);
    Ok(key)
}

fn openssh(key: &PrivateKey) -> Result<String> {
    key.to_openssh(LineEnding::LF)
        .map(|text| text.to_string())
        .map_err(|err| Error::internal(format!("A key can't be written: {err}")))
}

fn public_line(key: &PublicKey) -> Result<String> {
    key.to_openssh()
        .map_err(|err| Error::internal(format!("A public key can't be written: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_distinct_private_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let keys = InstanceKeys::generate().unwrap();
        keys.store(dir.path()).unwrap();
        for name in [CLIENT_FILE, HOST_FILE] {
            let meta = std::fs::metadata(dir.path().join(name)).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{name}");
        }
        let back = InstanceKeys::load(dir.path()).unwrap();
        assert_eq!(back.host_public(), keys.host_public());
        assert_eq!(
            back.client_public_line().unwrap(),
            keys.client_public_line().unwrap()
        );
        assert_ne!(back.client().public_key(), back.host_public());
        let other = InstanceKeys::generate().unwrap();
        assert_ne!(other.host_public(), keys.host_public());
        assert!(!format!("{keys:?}").contains("PRIVATE"));
    }

    #[test]
    fn openssh_reads_our_key() {
        let dir = tempfile::tempdir().unwrap();
        let keys = InstanceKeys::generate().unwrap();
        keys.store(dir.path()).unwrap();
        let out = std::process::Command::new("ssh-keygen")
            .arg("-y")
            .arg("-f")
            .arg(dir.path().join(CLIENT_FILE))
            .output();
        let Ok(out) = out else {
            eprintln!("SKIPPED: ssh-keygen is not installed");
            return;
        };
        assert_eq!(
            String::from_utf8(out.stdout).unwrap().trim(),
            keys.client_public_line().unwrap()
        );
    }

    #[test]
    fn a_damaged_key_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        InstanceKeys::generate().unwrap().store(dir.path()).unwrap();
        std::fs::write(dir.path().join(HOST_FILE), "nonsense").unwrap();
        assert!(InstanceKeys::load(dir.path()).is_err());
    }
}
