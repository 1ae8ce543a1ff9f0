//! The passphrase `local.passphrase`, for scripts that call `authenticate`.
//!
//! It protects nothing: whoever can open the daemon's socket may use the daemon already (the socket's
//! mode and group decide that), and who has the right passphrase may do nothing more. It is kept well
//! all the same, because people reuse passphrases: only a salted Argon2id hash is stored, guesses are
//! slowed down and counted, and no log holds one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use pileus_base::{Code, Error, Result};

use super::{Service, blocking};
use crate::state::{self, State};

/// Where the hash is kept; not a setting that can be read.
const KEY: &str = "passphrase.hash";
/// What each attempt takes at least, right or wrong.
const DELAY: Duration = Duration::from_millis(400);
/// So many attempts are looked at in a minute, whoever makes them.
const MOST: usize = 20;
const MINUTE: Duration = Duration::from_secs(60);
/// Longer ones are a mistake.
const MAX_LENGTH: usize = 1024;

/// Counts the attempts of all clients. The lock is held through each attempt: one after the other.
#[derive(Debug, Default)]
pub struct Attempts(tokio::sync::Mutex<VecDeque<Instant>>);

/// Keeps a new passphrase; an empty one removes it.
pub(crate) async fn set(state: &State, passphrase: &str) -> Result<()> {
    if passphrase.len() > MAX_LENGTH {
        return Err(Error::new(
            Code::InvalidSetting,
            format!("Invalid setting 'local.passphrase': it has more than {MAX_LENGTH} bytes"),
        ));
    }
    let hash = match passphrase {
        "" => String::new(),
        text => {
            let text = text.to_owned();
            blocking(move || hash_of(&text)).await?
        }
    };
    state
        .run(move |tx| state::settings::set(tx, KEY, &hash))
        .await
}

/// Whether there is one.
pub(crate) async fn is_set(state: &State) -> Result<bool> {
    Ok(stored(state).await?.is_some())
}

async fn stored(state: &State) -> Result<Option<String>> {
    let hash = state.run(|tx| state::settings::get(tx, KEY)).await?;
    Ok(hash.filter(|hash| !hash.is_empty()))
}

fn hash_of(passphrase: &str) -> Result<String> {
    let hash = Argon2::default()
        .hash_password(passphrase.as_bytes())
        .map_err(|err| Error::internal(format!("The passphrase can't be hashed: {err}")))?;
    Ok(hash.to_string())
}

fn fits(passphrase: &str, hash: &str) -> Result<bool> {
    let hash = PasswordHash::new(hash)
        .map_err(|err| Error::internal(format!("The stored passphrase can't be read: {err}")))?;
    let verified = Argon2::default().verify_password(passphrase.as_bytes(), &hash);
    Ok(verified.is_ok())
}

/// Compares; an error unless it is the right one.
async fn check(state: &State, attempts: &Attempts, passphrase: &str) -> Result<()> {
    let began = Instant::now();
    let mut recent = attempts.0.lock().await;
    recent.retain(|at| at.elapsed() < MINUTE);
    if recent.len() >= MOST {
        return Err(Error::new(
            Code::WrongPassphrase,
            "Too many passphrases were tried in the last minute.",
        )
        .advise("Wait a minute and try again."));
    }
    recent.push_back(began);
    let verdict = match stored(state).await? {
        None => Err(Error::new(
            Code::WrongPassphrase,
            "Incorrect passphrase. No passphrase is set.",
        )
        .advise("Set one first: `pileus set local.passphrase`.")),
        Some(hash) if passphrase.len() <= MAX_LENGTH => {
            let passphrase = passphrase.to_owned();
            match blocking(move || fits(&passphrase, &hash)).await? {
                true => Ok(()),
                false => Err(incorrect()),
            }
        }
        Some(_) => Err(incorrect()),
    };
    tokio::time::sleep(DELAY.saturating_sub(began.elapsed())).await;
    verdict
}

fn incorrect() -> Error {
    Error::new(
        Code::WrongPassphrase,
        "Passphrase is not correct. Please try again.",
    )
}

impl Service {
    /// Says whether the passphrase is right. Nothing else follows from it.
    pub async fn authenticate(&self, passphrase: &str) -> Result<()> {
        check(&self.parts.state, &self.parts.attempts, passphrase).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (tempfile::TempDir, State) {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        (dir, state)
    }

    #[tokio::test]
    async fn right_wrong_and_none() {
        let (_dir, state) = fresh();
        let attempts = Attempts::default();
        let message = async |text: &str| {
            let err = check(&state, &attempts, text).await.unwrap_err();
            assert_eq!(err.code, Code::WrongPassphrase);
            err.message
        };
        assert_eq!(
            message("").await,
            "Incorrect passphrase. No passphrase is set."
        );
        assert!(!is_set(&state).await.unwrap());
        set(&state, "sésame, ouvre-toi").await.unwrap();
        assert!(is_set(&state).await.unwrap());
        check(&state, &attempts, "sésame, ouvre-toi").await.unwrap();
        for wrong in ["", "sesame", "sésame, ouvre-toi "] {
            assert_eq!(
                message(wrong).await,
                "Passphrase is not correct. Please try again."
            );
        }
        set(&state, "").await.unwrap();
        assert!(!is_set(&state).await.unwrap());
        assert!(message("sésame, ouvre-toi").await.contains("No passphrase"));
    }

    #[tokio::test]
    async fn only_a_salted_hash_is_kept() {
        let (_dir, state) = fresh();
        set(&state, "hunter2").await.unwrap();
        let first = stored(&state).await.unwrap().unwrap();
        set(&state, "hunter2").await.unwrap();
        let second = stored(&state).await.unwrap().unwrap();
        assert!(first.starts_with("$argon2id$") && !first.contains("hunter2"));
        assert_ne!(first, second);
        assert!(set(&state, &"x".repeat(MAX_LENGTH + 1)).await.is_err());
    }

    #[tokio::test]
    async fn guesses_are_slow_and_counted() {
        let (_dir, state) = fresh();
        set(&state, "right").await.unwrap();
        let attempts = Attempts::default();
        let began = Instant::now();
        // Also side by side.
        let (a, b) = tokio::join!(
            check(&state, &attempts, "wrong"),
            check(&state, &attempts, "right")
        );
        assert!(a.is_err() && b.is_ok());
        assert!(began.elapsed() >= DELAY);
        attempts.0.lock().await.resize(MOST, Instant::now());
        let err = check(&state, &attempts, "right").await.unwrap_err();
        assert!(err.message.contains("Too many"), "{err}");
        let Some(long_ago) = Instant::now().checked_sub(MINUTE) else {
            return;
        };
        attempts
            .0
            .lock()
            .await
            .iter_mut()
            .for_each(|at| *at = long_ago);
        assert!(check(&state, &attempts, "right").await.is_ok());
    }
}
