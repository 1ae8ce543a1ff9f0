//! Which images stay: tags, removing, and the budget that the store is kept within.
//!
//! ```text
//!   a person   ─▶ remove, prune                      a person's word; what is used stays
//!   the store  ─▶ make_room, before an image comes   the budget (settings `local.images.*`)
//!   `keep_images`, now and then and after purges     the same
//! ```
//!
//! Next step: `images/src/collect.rs`.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use pileus_api::{Event, ImageDetails, ImagePruneQuery, PruneReply, PrunedImage, TagRequest};
use pileus_base::{Code, Digest, Error, Result};
use pileus_images::{Budget, Image, ImageRef, InUse, Listed, Removed, Store};

use super::{age, not_here};
use crate::service::settings::Settings;
use crate::service::{Parts, Service, blocking};
use crate::state::instances::InstanceRow;

/// Fewer digits of a digest are more likely a name.
const LEAST_DIGITS: usize = 4;
/// How often the budget is looked at.
const EVERY: Duration = Duration::from_secs(60);
/// Until an instance that was purged has let its image go.
const LET_GO: Duration = Duration::from_secs(1);

/// The image of the store that is meant by a tag, a digest or its first digits, or the source that it came from.
pub(super) fn find(store: &Store, name: &str) -> Result<Arc<Image>> {
    let get = |digest: &Digest| store.get(digest).ok_or_else(|| not_here(name));
    if let Some(digest) = store.tags()?.get(name) {
        return get(digest);
    }
    let listed = store.list()?;
    let digits = digits(name);
    if let Some(digits) = &digits {
        let begins = |image: &&Listed| image.info.digest.hex().starts_with(digits);
        let mut matching = listed.iter().filter(begins);
        match (matching.next(), matching.next()) {
            (Some(image), None) => return get(&image.info.digest),
            (Some(_), Some(_)) => {
                return Err(Error::new(
                    Code::InvalidArgument,
                    format!("{name} is the beginning of several images' digests"),
                )
                .advise("Give more digits."));
            }
            _ => {}
        }
    }
    let is_source = |image: &&Listed| {
        let source = image.info.source.as_str();
        source == name || source.split_once(':').is_some_and(|(_, rest)| rest == name)
    };
    let newest = listed
        .iter()
        .filter(is_source)
        .max_by_key(|image| image.info.created);
    newest.map_or_else(|| Err(not_here(name)), |image| get(&image.info.digest))
}

/// The same for an image that may be damaged: then it is known by its digest only.
pub(super) fn find_digest(store: &Store, name: &str) -> Result<Digest> {
    let found = find(store, name).map(|image| image.digest().clone());
    let (Err(err), Some(digits)) = (&found, digits(name)) else {
        return found;
    };
    if err.code != Code::ImageNotFound {
        return found;
    }
    let mut matching = store.digests()?;
    matching.retain(|digest| digest.hex().starts_with(&digits));
    match (matching.pop(), matching.pop()) {
        (Some(digest), None) => Ok(digest),
        _ => found,
    }
}

/// The digits that a digest begins with, if it can be one.
fn digits(name: &str) -> Option<String> {
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    let hex = digits.bytes().all(|b| b.is_ascii_hexdigit());
    (hex && (LEAST_DIGITS..=64).contains(&digits.len())).then(|| digits.to_ascii_lowercase())
}

/// An error if that can't be a tag; told before anything is sent. The store has the last word.
pub(super) fn check_tag(tag: &str) -> Result<()> {
    match tag.parse() {
        Ok(ImageRef::Name(name)) if !name.contains('/') => Ok(()),
        _ => Err(Error::new(
            Code::InvalidName,
            format!("{tag:?} can't be an image's tag"),
        )
        .advise("Give letters, digits, and . _ + - in between; not what looks like a digest.")),
    }
}

impl Service {
    /// Gives an image a name.
    pub async fn tag_image(&self, tag: String, request: &TagRequest) -> Result<ImageDetails> {
        check_tag(&tag)?;
        let image = self.stored_image(&request.image).await?;
        let digest = image.digest().clone();
        let (store, to) = (self.parts.store.clone(), digest.clone());
        blocking(move || store.tag(&tag, &to)).await?;
        self.images_changed();
        self.image(&digest.to_string()).await
    }

    pub async fn untag_image(&self, tag: String) -> Result<()> {
        let store = self.parts.store.clone();
        blocking(move || store.untag(&tag)).await?;
        self.images_changed();
        Ok(())
    }

    /// Removes an image that nobody uses; one with tags only by `force`.
    pub async fn remove_image(&self, name: &str, force: bool) -> Result<()> {
        let (store, name) = (self.parts.store.clone(), name.to_owned());
        // Not held: one that is can't be removed.
        let digest = blocking(move || find_digest(&store, &name)).await?;
        self.must_be_unused(&digest)?;
        let store = self.parts.store.clone();
        blocking(move || match force {
            true => store.remove_with_tags(&digest),
            false => store.remove(&digest),
        })
        .await?;
        self.images_changed();
        Ok(())
    }

    fn must_be_unused(&self, digest: &Digest) -> Result<()> {
        let used = |by: &str, advice: &str| {
            Err(Error::new(
                Code::ImageInUse,
                format!("image {} is used by {by}", digest.short()),
            )
            .advise(advice))
        };
        if let Some(users) = self.users_of_images().get(digest) {
            let what = match users.as_slice() {
                [one] => format!("instance '{one}'"),
                users => format!("the instances {}", users.join(", ")),
            };
            return used(&what, "`pileus delete --purge` removes instances for good.");
        }
        let templates = self.parts.templates.all();
        if let Some(template) = templates.iter().find(|t| t.key.image == *digest) {
            let what = format!("template {}", template.id);
            return used(&what, "`pileus template delete` removes templates.");
        }
        Ok(())
    }

    /// Removes images that nobody uses, or tells which would go.
    pub async fn prune_images(&self, query: ImagePruneQuery) -> Result<PruneReply> {
        let older_than = query.older_than.as_deref().map(|text| {
            age::parse(text).ok_or_else(|| {
                Error::new(Code::InvalidArgument, format!("{text:?} is no age"))
                    .advise("Give a number with s, m, h, d or w behind it, such as 30d.")
            })
        });
        let bounds = Bounds {
            older_than: older_than.transpose()?,
            keep_bytes: query.keep_bytes,
            now: (self.parts.clock)(),
        };
        let in_use = self.digests_in_use();
        let store = self.parts.store.clone();
        let dry_run = query.dry_run;
        let removed = blocking(move || match (dry_run, bounds.are_none()) {
            (false, true) => store.prune(&in_use),
            _ => bounds.carry_out(&store, &in_use, dry_run),
        })
        .await?;
        if !dry_run && !removed.is_empty() {
            self.images_changed();
        }
        Ok(PruneReply {
            removed: removed.into_iter().map(told).collect(),
        })
    }

    /// Keeps the store within its budget, as long as the daemon runs: now and then, and when instances went.
    pub async fn keep_images(&self) {
        let mut events = self.parts.hub.subscribe();
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                event = events.recv() => match event {
                    Ok(Event::InstancePurged { .. }) => tokio::time::sleep(LET_GO).await,
                    _ => continue,
                },
            }
            self.tidy_images().await;
        }
    }

    async fn tidy_images(&self) {
        let store = self.parts.store.clone();
        match blocking(move || store.tidy()).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(_) => self.images_changed(),
            Err(err) => tracing::warn!(%err, "the store's budget can't be kept"),
        }
    }

    /// The budget has changed: it holds from now on.
    pub(in crate::service) fn image_budget_changed(&self) {
        self.parts
            .store
            .set_budget(budget(&self.parts.settings.get()));
        let service = self.clone();
        tokio::spawn(async move {
            let store = service.parts.store.clone();
            let keep = service.digests_in_use();
            match blocking(move || store.collect(&keep, 0)).await {
                Ok(removed) if removed.is_empty() => {}
                Ok(_) => service.images_changed(),
                Err(err) => tracing::warn!(%err, "the store's new budget can't be kept"),
            }
        });
    }
}

fn told(removed: Removed) -> PrunedImage {
    PrunedImage {
        digest: removed.info.digest,
        source: removed.info.source,
        freed: removed.freed,
    }
}

/// What the settings say of the store's budget.
pub(crate) fn budget(settings: &Settings) -> Budget {
    Budget {
        min_free: settings.images.min_free.bytes(),
        max_bytes: settings.images.max_size.map(|size| size.bytes()),
        max_age: settings.images.max_age,
    }
}

/// What a person wants of a prune.
struct Bounds {
    older_than: Option<Duration>,
    keep_bytes: Option<u64>,
    now: pileus_api::Timestamp,
}

impl Bounds {
    fn are_none(&self) -> bool {
        self.older_than.is_none() && self.keep_bytes.is_none()
    }

    /// The least recently used first, as long as one is too old or all are too large.
    fn carry_out(
        &self,
        store: &Store,
        in_use: &HashSet<Digest>,
        dry_run: bool,
    ) -> Result<Vec<Removed>> {
        let mut images = store.list()?;
        images.sort_by(|a, b| (a.last_used, &a.info.digest).cmp(&(b.last_used, &b.info.digest)));
        let mut total: u64 = images.iter().map(|image| image.allocated.bytes()).sum();
        let mut removed = Vec::new();
        for image in images {
            let spared = in_use.contains(&image.info.digest) || !image.tags.is_empty();
            if spared || !self.is_over(&image, total) {
                continue;
            }
            let freed = match dry_run {
                true => image.allocated,
                false => match store.remove(&image.info.digest) {
                    Ok(freed) => freed,
                    // Somebody took it up, or away, meanwhile.
                    Err(err) if matches!(err.code, Code::ImageInUse | Code::ImageNotFound) => {
                        continue;
                    }
                    Err(err) => return Err(err),
                },
            };
            total = total.saturating_sub(freed.bytes());
            removed.push(Removed {
                info: image.info,
                freed,
            });
        }
        Ok(removed)
    }

    fn is_over(&self, image: &Listed, total: u64) -> bool {
        let unused = self.now.duration_since(image.last_used);
        let unused = Duration::try_from(unused).unwrap_or_default();
        let too_old = self.older_than.is_some_and(|age| unused > age);
        let too_much = self.keep_bytes.is_some_and(|most| total > most);
        self.are_none() || too_old || too_much
    }
}

/// Tells the store which images instances and templates stand on, also while none of them is held. The store is there
/// before those are: until then it is what the rows say.
pub(crate) struct Needed {
    rows: HashSet<Digest>,
    parts: OnceLock<Weak<Parts>>,
}

impl Needed {
    pub fn by(rows: &[InstanceRow]) -> Arc<Self> {
        let images = rows.iter().filter_map(|row| row.spec.image.as_ref());
        Arc::new(Self {
            rows: images.map(|image| image.digest.clone()).collect(),
            parts: OnceLock::new(),
        })
    }

    pub fn in_use(self: &Arc<Self>) -> InUse {
        let needed = self.clone();
        InUse(Arc::new(move || needed.now()))
    }

    /// From here on the service knows.
    pub fn ask(&self, service: &Service) {
        // Set once, at the start.
        let _ = self.parts.set(Arc::downgrade(&service.parts));
    }

    fn now(&self) -> HashSet<Digest> {
        match self.parts.get().and_then(Weak::upgrade) {
            Some(parts) => Service { parts }.digests_in_use(),
            None => self.rows.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_the_beginning_of_a_digest() {
        for (name, wanted) in [
            ("ABCD", Some("abcd")),
            ("sha256:abcd", Some("abcd")),
            ("abc", None),
            ("sha256:abc", None),
            ("debian", None),
            ("", None),
        ] {
            assert_eq!(digits(name).as_deref(), wanted, "{name}");
        }
        assert!(digits(&"a".repeat(64)).is_some());
        assert!(digits(&"a".repeat(65)).is_none());
    }
}
