//! Budgets: what goes, in which order, and what never does.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use pileus_base::{Code, Digest, Reporter};
use pileus_images::{Image, InUse, Store};
use proptest::prelude::*;

use crate::support::*;

/// An image of its own with about `kib` of data, last used `age` seconds ago.
async fn image(fixture: &Fixture, number: u32, kib: usize, age: u64) -> Arc<Image> {
    let mut bytes = vec![0; 1 << 20];
    bytes[..kib << 10].fill(1);
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    let reference = fixture.file("new", &bytes);
    let image = fixture
        .store
        .obtain(&reference, None, &Reporter::silent())
        .await
        .unwrap();
    set_age(fixture.store.root(), image.digest(), age);
    image
}

fn set_age(root: &Path, digest: &Digest, seconds: u64) {
    let used = root.join(digest.hex()).join("used");
    let used = std::fs::File::options().write(true).open(used).unwrap();
    used.set_modified(SystemTime::now() - Duration::from_secs(seconds))
        .unwrap();
}

fn there(store: &Store) -> HashSet<Digest> {
    let all = store.list().unwrap();
    all.into_iter().map(|image| image.info.digest).collect()
}

#[tokio::test]
async fn nothing_goes_while_the_budget_is_kept() {
    let fixture = Fixture::new();
    image(&fixture, 1, 64, 1_000_000).await;
    assert!(
        fixture
            .store
            .collect(&HashSet::new(), 0)
            .unwrap()
            .is_empty()
    );
    assert!(fixture.store.tidy().unwrap().is_empty());
}

#[tokio::test]
async fn for_more_than_there_is_all_go_that_may_and_the_host_lacks_space() {
    let needed: Arc<Mutex<HashSet<Digest>>> = Arc::default();
    let asked = needed.clone();
    let fixture = Fixture::with(|config| {
        config.in_use = InUse(Arc::new(move || asked.lock().unwrap().clone()));
    });
    let held = image(&fixture, 1, 64, 500).await;
    let kept = image(&fixture, 2, 64, 400).await.digest().clone();
    let tagged = image(&fixture, 3, 64, 300).await.digest().clone();
    let in_use = image(&fixture, 4, 64, 200).await.digest().clone();
    let young = image(&fixture, 5, 64, 100).await.digest().clone();
    let old = image(&fixture, 6, 64, 600).await.digest().clone();
    fixture.store.tag("mine", &tagged).unwrap();
    needed.lock().unwrap().insert(in_use.clone());
    let keep = HashSet::from([kept.clone()]);
    let removed = fixture.store.collect(&keep, u64::MAX / 2).unwrap();
    let order: Vec<_> = removed
        .iter()
        .map(|gone| gone.info.digest.clone())
        .collect();
    assert_eq!(order, [old, young]);
    assert!(removed.iter().all(|gone| gone.freed.bytes() >= 64 << 10));
    let stay = HashSet::from([held.digest().clone(), kept, tagged, in_use]);
    assert_eq!(there(&fixture.store), stay);
    let err = fixture
        .store
        .make_room(u64::MAX / 2, &Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::NoSpace);
    fixture.assert_clean();
}

#[tokio::test]
async fn what_is_too_old_goes_once_it_is_released() {
    let fixture = Fixture::with(|config| {
        config.budget.max_age = Some(Duration::from_secs(3600));
    });
    let old = image(&fixture, 1, 64, 4000).await;
    let young = image(&fixture, 2, 64, 3000).await;
    assert!(fixture.store.tidy().unwrap().is_empty());
    let digest = old.digest().clone();
    drop(old);
    let removed = fixture.store.tidy().unwrap();
    assert_eq!(removed[0].info.digest, digest);
    assert_eq!(
        there(&fixture.store),
        HashSet::from([young.digest().clone()])
    );
}

#[tokio::test]
async fn room_is_made_by_the_budget_before_an_image_comes_in() {
    let fixture = Fixture::with(|config| config.budget.max_bytes = Some(1 << 20));
    let first = image(&fixture, 1, 512, 10).await.digest().clone();
    let report = Reporter::silent();
    fixture.store.make_room(100 << 10, &report).await.unwrap();
    assert!(there(&fixture.store).contains(&first));
    fixture.store.make_room(768 << 10, &report).await.unwrap();
    assert!(there(&fixture.store).is_empty());
    // One that is larger than all of the budget comes in all the same.
    fixture.store.make_room(8 << 20, &report).await.unwrap();
}

#[tokio::test]
async fn after_a_full_disk_it_is_told_whether_another_try_is_worth_it() {
    // What is to stay free is more than there is: all go.
    let fixture = Fixture::with(|config| config.budget.min_free = 1 << 60);
    assert!(!fixture.store.relieve(0).await.unwrap());
    drop(image(&fixture, 1, 64, 10).await);
    assert!(fixture.store.relieve(0).await.unwrap());
    assert!(there(&fixture.store).is_empty());
}

#[tokio::test]
async fn a_store_with_a_keeper_is_emptied_by_it_alone() {
    let fixture = Fixture::with(|config| config.keeper = Some("pileusd".into()));
    let digest = image(&fixture, 1, 64, 10).await.digest().clone();
    let other = Store::open(config(fixture.store.root())).unwrap();
    let err = other.remove(&digest).unwrap_err();
    assert_eq!(err.code, Code::PermissionDenied);
    assert!(
        other
            .collect(&HashSet::new(), u64::MAX / 2)
            .unwrap()
            .is_empty()
    );
    assert!(other.prune(&HashSet::new()).is_err());
    let mut third = config(fixture.store.root());
    third.keeper = Some("other".into());
    assert_eq!(Store::open(third).unwrap_err().code, Code::StorageLocked);
    fixture.store.remove(&digest).unwrap();
}

#[derive(Debug, Clone)]
struct Wanted {
    kib: usize,
    age: u64,
    held: bool,
    tagged: bool,
    kept: bool,
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let often = prop::bool::weighted(0.2);
    (4_usize..512, 1_u64..1000, often, often, often).prop_map(|(kib, age, held, tagged, kept)| {
        Wanted {
            kib,
            age,
            held,
            tagged,
            kept,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Against a model that removes the oldest until the rest fits.
    #[test]
    fn the_least_recently_used_go_until_the_rest_fits(
        wishes in prop::collection::vec(wanted(), 1..7),
        max_kib in 0_u64..1500,
        need_kib in 0_u64..300,
    ) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let fixture = Fixture::with(|config| {
                config.budget.max_bytes = Some(max_kib << 10);
                config.budget.min_free = 0;
            });
            // Beside: the budget is kept while images come in.
            let other = Fixture::new();
            let (mut held, mut keep, mut model) = (Vec::new(), HashSet::new(), Vec::new());
            for (number, wish) in wishes.iter().enumerate() {
                let image = image(&other, number as u32, wish.kib, wish.age).await;
                model.push((wish.clone(), image.digest().clone(), image.allocated().bytes()));
            }
            for (wish, digest, _) in &model {
                let name = digest.hex();
                std::fs::rename(other.store.root().join(name), fixture.store.root().join(name)).unwrap();
                if wish.held { held.push(fixture.store.get(digest).unwrap()); }
                if wish.tagged { fixture.store.tag(&format!("t{}", wish.age), digest).unwrap(); }
                if wish.kept { keep.insert(digest.clone()); }
            }
            model.sort_by_key(|(wish, _, _)| std::cmp::Reverse(wish.age));
            let ages: HashSet<_> = model.iter().map(|(wish, _, _)| wish.age).collect();
            if ages.len() < model.len() {
                // The order of those of the same moment is nobody's promise.
                return;
            }
            let mut total: u64 = model.iter().map(|(_, _, size)| size).sum();
            let mut expected = Vec::new();
            for (wish, digest, size) in &model {
                if total + (need_kib << 10) <= max_kib << 10 { break; }
                if !(wish.held || wish.tagged || wish.kept) {
                    total -= size;
                    expected.push(digest.clone());
                }
            }
            let removed = fixture.store.collect(&keep, need_kib << 10).unwrap();
            let removed: Vec<_> = removed.into_iter().map(|gone| gone.info.digest).collect();
            assert_eq!(removed, expected);
        });
    }
}
