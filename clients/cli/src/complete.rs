//! Live names for the shell's completion: asks a daemon that answers already, within a bound that
//! a person does not notice, and stays silent on any error.

use std::time::Duration;

use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use pileus_client::Client;

use crate::args::Global;
use crate::client_settings;
use crate::environment::Environment;
use crate::place::Place;
use crate::render;

const BOUND: Duration = Duration::from_millis(200);

/// Completes names of instances.
pub(crate) fn instances() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let instances = client.instances().await.ok()?;
            let candidate = |i: &pileus_api::Instance| {
                CompletionCandidate::new(i.name.as_str()).help(Some(render::state(i).into()))
            };
            Some(instances.iter().map(candidate).collect())
        })
    })
}

/// Completes names of instances and, as `INSTANCE.SNAPSHOT`, of their snapshots.
pub(crate) fn targets() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let instances = client.instances().await.ok()?;
            let snapshots = client.all_snapshots().await.unwrap_or_default();
            let instance = |i: &pileus_api::Instance| {
                CompletionCandidate::new(i.name.as_str()).help(Some(render::state(i).into()))
            };
            let snapshot = |s: &pileus_api::Snapshot| {
                let name = format!("{}.{}", s.instance, s.name);
                CompletionCandidate::new(name).help(Some(s.comment.clone().into()))
            };
            let instances = instances.iter().map(instance);
            Some(instances.chain(snapshots.iter().map(snapshot)).collect())
        })
    })
}

/// Completes names of images that can be launched.
pub(crate) fn images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let entries = client.catalog().await.ok()?;
            let candidate = |e: &pileus_api::CatalogEntry| {
                CompletionCandidate::new(&e.name)
                    .help(Some(format!("{} {}", e.os, e.release).into()))
            };
            Some(entries.iter().map(candidate).collect())
        })
    })
}

/// Completes tags and digests of images in the store.
pub(crate) fn stored_images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let images = client.images().await.ok()?;
            let names = |i: &pileus_api::Image| {
                let digest = i.digest.short().to_owned();
                let names = i.tags.iter().cloned().chain([digest]);
                let source = i.source.clone();
                names
                    .map(move |name| {
                        CompletionCandidate::new(name).help(Some(source.clone().into()))
                    })
                    .collect::<Vec<_>>()
            };
            Some(images.iter().flat_map(names).collect())
        })
    })
}

/// Completes tags of images.
pub(crate) fn tags() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let images = client.images().await.ok()?;
            let tags = |i: &pileus_api::Image| {
                let source = i.source.clone();
                let tags = i.tags.clone().into_iter();
                tags.map(move |tag| CompletionCandidate::new(tag).help(Some(source.clone().into())))
            };
            Some(images.iter().flat_map(tags).collect())
        })
    })
}

/// Completes IDs of templates.
pub(crate) fn templates() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let templates = client.templates().await.ok()?;
            let candidate = |t: &pileus_api::Template| {
                CompletionCandidate::new(&t.id).help(Some(t.image.source.clone().into()))
            };
            Some(templates.iter().map(candidate).collect())
        })
    })
}

/// Completes keys of settings.
pub(crate) fn settings() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let settings = client.settings().await.ok()?;
            let candidate = |s: &pileus_api::Setting| {
                CompletionCandidate::new(&s.key).help(Some(s.values.clone().into()))
            };
            let own = CompletionCandidate::new(client_settings::PRIMARY);
            Some(settings.iter().map(candidate).chain([own]).collect())
        })
    })
}

fn ask(
    question: impl AsyncFnOnce(Client) -> Option<Vec<CompletionCandidate>>,
) -> Vec<CompletionCandidate> {
    let answer = || {
        let place = Place::find(&given(), &Environment::of_process());
        let client = Client::new(place.socket).ok()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .ok()?;
        let bounded = async { tokio::time::timeout(BOUND, question(client)).await };
        runtime.block_on(bounded).ok()?
    };
    answer().unwrap_or_default()
}

/// The daemon that the line being completed names, as far as it stands in words of its own.
fn given() -> Global {
    let words: Vec<_> = std::env::args_os().collect();
    let after = |option: &str| {
        let at = words.iter().position(|word| word == option)?;
        words.get(at + 1).map(Into::into)
    };
    Global {
        verbose: 0,
        socket: after("--socket"),
        storage: after("--storage"),
    }
}
