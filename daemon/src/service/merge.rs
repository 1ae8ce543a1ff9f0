//! Layers that nobody needs one by one any more become one: snapshots that were deleted leave them behind, and
//! each costs a machine a file, and a read a look. It is done in the background, for instances without a VM.
//!
//! Layers are never written, so the merged one is made beside them without anybody waiting, and nobody is
//! harmed if the instance is started, changed or deleted meanwhile. Then, in the instance's turn, the row takes
//! the new one instead of the old ones, if it still has them. A merge that was cut off leaves a file that is in
//! no row, which a start of the daemon removes ([`layers::sweep`](super::layers)).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pileus_api::InstanceState;
use pileus_base::{Reporter, Result, files};
use uuid::Uuid;

use super::Service;
use super::registry::Instance;
use super::wiring;
use crate::state::instances::{InstanceRow, Layer};

/// Fewer are not worth the writing.
const FEWEST: usize = 8;
const EVERY: Duration = Duration::from_secs(60);

/// The longest part of the instance's chain that only has to be there as a whole: no snapshot ends or branches
/// within it, and nobody else stands on it.
fn mergeable(row: &InstanceRow, shared: impl Fn(Layer) -> bool) -> Range<usize> {
    let own = &row.spec.layers;
    // Whether whatever has the `n`th layer has the next one on top of it.
    let goes_on = |n: usize| {
        let mut chains = row.snapshots.iter().map(|snapshot| &snapshot.layers);
        chains.all(|chain| match chain.iter().position(|l| *l == own[n]) {
            Some(at) => chain.get(at + 1) == Some(&own[n + 1]),
            None => true,
        })
    };
    let mut longest = 0..0;
    let mut begin = 0;
    for n in 0..own.len() {
        if shared(own[n]) {
            begin = n + 1;
            continue;
        }
        if n + 1 - begin > longest.len() {
            longest = begin..n + 1;
        }
        if n + 1 < own.len() && !goes_on(n) {
            begin = n + 1;
        }
    }
    longest
}

/// Puts `new` in the place of `run` in a chain that has it.
fn replace(chain: &mut Vec<Layer>, run: &[Layer], new: Layer) -> bool {
    let Some(at) = chain.windows(run.len()).position(|part| part == run) else {
        return false;
    };
    chain.splice(at..at + run.len(), [new]);
    true
}

/// Whether no VM has its layers open.
fn at_rest(instance: &Instance) -> bool {
    let state = instance.machine().map(|machine| machine.snapshot().state);
    matches!(state, Ok(InstanceState::Stopped | InstanceState::Suspended))
}

impl Service {
    /// Runs as long as the daemon.
    pub async fn merge_in_background(&self) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            for instance in self.parts.registry.all() {
                let name = instance.row().name;
                match self.merge_layers(&instance).await {
                    Ok(0) => {}
                    Ok(layers) => tracing::info!(instance = %name, layers, "merged into one"),
                    Err(err) => {
                        tracing::warn!(instance = %name, %err, "its layers stay as they are")
                    }
                }
            }
        }
    }

    /// How many became one.
    pub(super) async fn merge_layers(&self, instance: &Arc<Instance>) -> Result<usize> {
        let row = instance.row();
        let range = mergeable(&row, |layer| self.is_shared(layer));
        if range.len() < FEWEST || !at_rest(instance) || !self.parts.broken.is_empty() {
            return Ok(0);
        }
        let image = row.spec.image.as_ref();
        let image = image.and_then(|image| self.parts.store.get(&image.digest));
        let image = image.ok_or_else(|| wiring::no_image(&row))?;
        let layout = &self.parts.layout;
        let paths = |layers: &[Layer]| -> Vec<_> {
            layers.iter().map(|layer| layout.layer(layer.0)).collect()
        };
        let new = Layer(Uuid::new_v4());
        let run = row.spec.layers[range.clone()].to_vec();
        let target = layout.layer(new.0);
        let (below, merged) = (paths(&row.spec.layers[..range.start]), paths(&run));
        let report = Reporter::silent();
        self.parts
            .store
            .merge(&image.disk(), &below, &merged, &target, &report)
            .await?;
        if let Err(err) = files::sync_folder(&layout.layers()) {
            files::discard(&target)?;
            return Err(err);
        }
        // If that fails it is not known which of them the row has: a start of the daemon knows.
        match self.take_merged(instance, &run, new).await? {
            true => Ok(run.len()),
            false => files::discard(&target).map(|()| 0),
        }
    }

    /// Puts the new layer in the place of those that it was made of, unless something came between.
    async fn take_merged(
        &self,
        instance: &Arc<Instance>,
        run: &[Layer],
        new: Layer,
    ) -> Result<bool> {
        let _turn = instance.turn(&Reporter::silent()).await?;
        let row = instance.row();
        // Of one that was deleted for good there is no row to take it.
        let is_there = self.parts.registry.by_id(instance.id).is_some();
        let range = mergeable(&row, |layer| self.is_shared(layer));
        let mut chains = row.spec.layers[range].windows(run.len());
        if !is_there || !at_rest(instance) || !chains.any(|part| part == run) {
            return Ok(false);
        }
        instance
            .change(|row| {
                replace(&mut row.spec.layers, run, new);
                for snapshot in Arc::make_mut(&mut row.snapshots) {
                    replace(&mut snapshot.layers, run, new);
                }
            })
            .await?;
        self.drop_unused(run)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::instances::tests::row;

    fn layer(n: u8) -> Layer {
        Layer(Uuid::from_bytes([n; 16]))
    }

    fn chain(numbers: &[u8]) -> Vec<Layer> {
        numbers.iter().map(|n| layer(*n)).collect()
    }

    #[test]
    fn what_may_be_merged() {
        let all: &[u8] = &[1, 2, 3, 4, 5, 6];
        for (snapshots, shared, want) in [
            (&[][..], &[][..], 0..6),
            // On one with two, and on those that are merged.
            (&[&[1, 2][..]][..], &[][..], 2..6),
            (&[&[1, 2][..], &[1, 2, 3, 4, 5]][..], &[][..], 2..5),
            // It left the chain behind 3.
            (&[&[1, 2, 3, 9][..]][..], &[][..], 0..3),
            // It has all of it, and more.
            (&[&[1, 2, 3, 4, 5, 6, 9][..]][..], &[][..], 0..6),
            (&[][..], &[3][..], 3..6),
            (&[][..], &[1, 2, 3, 4, 5, 6][..], 0..0),
            (&[&[7, 8][..]][..], &[][..], 0..6),
        ] {
            let mut row = row("foo", 1);
            row.spec.layers = chain(all);
            let mut like = row.snapshots[0].clone();
            let made = snapshots.iter().map(|s| {
                like.layers = chain(s);
                like.clone()
            });
            row.snapshots = Arc::new(made.collect());
            let shared = |l| shared.iter().any(|n| layer(*n) == l);
            assert_eq!(mergeable(&row, shared), want, "{snapshots:?}");
        }
    }

    #[test]
    fn a_part_is_replaced_where_it_is() {
        let mut all = chain(&[1, 2, 3, 4]);
        assert!(!replace(&mut all, &chain(&[2, 4]), layer(9)));
        assert!(replace(&mut all, &chain(&[2, 3]), layer(9)));
        assert_eq!(all, chain(&[1, 9, 4]));
    }
}
