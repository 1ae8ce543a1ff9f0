//! The daemon: HTTP → service (use cases) → operations → state; and recovery at start-up.
//!
//! ```text
//! http/        listeners, one file a resource, conversion only
//! service/     use cases: launch, start, stop, delete, exec, images; know nothing of HTTP
//! operations/  long work: progress, cancel, how it ended
//! state/       SQLite: one file a table
//! recover.rs   what happens at start-up, in order
//! ```
//!
//! The library exists for `main.rs` and for tests that call the API without a socket.

pub mod config;
pub mod http;
pub mod hub;
pub mod operations;
mod recover;
pub mod service;
pub mod state;

use std::sync::Arc;
use std::time::Duration;

use pileus_base::{Code, Error, Layout, Result, files};
use pileus_images::Store;
use pileus_networks::{Network, NetworkConfig, Subnet};
use tokio::net::UnixListener;

use config::Args;
use http::listener::{self, Peer};
use hub::Hub;
use operations::Operations;
use service::admission::{self, Admission};
use service::images::keep;
use service::pool::Pool;
use service::registry::{Instance, Registry};
use service::remotes;
use service::settings::Keeper;
use service::templates::Shelf;
use service::wiring::Finder;
use service::{Mode, Parts, Service};
use state::State;

/// Who alone may remove images of this daemon's store.
const STORE_KEEPER: &str = "pileusd";
/// How long a storage may be held by what is about to let it go.
const LOCK_BOUND: Duration = Duration::from_millis(1500);

/// Takes the storage for this process alone.
pub fn lock(layout: &Layout) -> Result<files::Lock> {
    for folder in [&layout.data, &layout.cache] {
        files::create_folder(folder, 0o755)?;
    }
    files::create_folder(&layout.instances(), 0o711)?;
    let deadline = std::time::Instant::now() + LOCK_BOUND;
    loop {
        if let Some(lock) = files::Lock::try_take(&layout.lock())? {
            return Ok(lock);
        }
        // Of a daemon that was killed, a child may hold it that was just about to become another program.
        if std::time::Instant::now() > deadline {
            return Err(storage_locked(layout));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn storage_locked(layout: &Layout) -> Error {
    Error::new(
        Code::StorageLocked,
        format!("Another pileusd uses the storage {}", layout.data.display()),
    )
    .advise("Use that one, end it, or give this one another folder with --storage.")
}

/// Runs the daemon until it is told to end (SIGTERM, SIGINT).
pub async fn run(args: &Args, layout: Layout, mode: Mode, lock: files::Lock) -> Result<()> {
    // Caught from here on, so that an early signal doesn't leave half a start.
    let stop = stop_signal()?;
    files::create_own_folder(&layout.run, 0o755)?;
    let group = match mode {
        Mode::System => group_id(&args.group),
        Mode::User(_) => None,
    };
    let socket = args.socket.clone().unwrap_or_else(|| layout.socket());
    let (listener, ours) = match listener::inherited()? {
        Some(listener) => (listener, false),
        None => (listener::bind(&socket, group)?, true),
    };
    let keep_layers = args.keep_layers;
    let (service, resumed) = start(args, layout, mode).await?;
    let supervisor = tokio::spawn({
        let service = service.clone();
        async move {
            recover::resume(&service, resumed).await;
            if let Err(err) = service.sweep_made_images().await {
                tracing::warn!(%err, "images that were made and not sent can't be removed");
            }
            match keep_layers {
                true => service.supervise().await,
                false => {
                    tokio::join!(service.supervise(), service.merge_in_background());
                }
            }
        }
    });
    let leases = tokio::spawn({
        let service = service.clone();
        async move { service.sweep_leases().await }
    });
    let images = tokio::spawn({
        let service = service.clone();
        async move { service.keep_images().await }
    });
    let pool = tokio::spawn({
        let service = service.clone();
        async move { service.keep_pool().await }
    });
    let templates = tokio::spawn({
        let service = service.clone();
        async move {
            if let Err(err) = service.discard_outdated().await {
                tracing::info!(%err, "templates can't be looked through");
            }
        }
    });
    tracing::info!(socket = %socket.display(), "ready");
    notify(&[sd_notify::NotifyState::Ready]);
    let served = serve(listener, service.clone(), stop).await;
    notify(&[sd_notify::NotifyState::Stopping]);
    supervisor.abort();
    leases.abort();
    images.abort();
    templates.abort();
    pool.abort();
    service.end_pool().await;
    if host_goes_down().await {
        service.suspend_all().await;
    }
    // systemd goes on listening on a socket of its own.
    if ours {
        files::remove_file(&socket)?;
    }
    leave(&service).await;
    drop(lock);
    served
}

/// Brings the parts up, bottom first.
async fn start(args: &Args, layout: Layout, mode: Mode) -> Result<(Service, Vec<Arc<Instance>>)> {
    let state = State::open(&layout.database())?;
    let hub = Hub::new();
    let (rows, broken) = recover::clean_up(&state, &layout).await?;
    let templates = Shelf::open(&layout)?;
    templates.take_back_loans().await;
    recover::sweep_layers(&layout, &rows, &broken, &templates)?;
    let settings = Keeper::load(&state, args.settings()).await?;
    let (mut images, mirror) = remotes::store_config(&args.image_host, &layout)?;
    images.budget = keep::budget(&settings.get());
    let needed = keep::Needed::by(&rows);
    images.in_use = needed.in_use();
    images.keeper = Some(STORE_KEEPER.to_owned());
    let wanted = settings.get().image_mirror;
    if let Err(err) = mirror.set(&wanted) {
        tracing::error!(%err, "the mirror of the image host can't be used");
    }
    let store = Store::open(images)?;
    let network = start_network(&args.bridge, &state, &layout, &mode).await?;
    let instances: Vec<_> = rows
        .into_iter()
        .map(|row| Instance::new(row, state.clone(), hub.clone()))
        .collect();
    let registry = Registry::default();
    for instance in &instances {
        registry.add(instance.clone());
    }
    let search = std::env::var_os("PATH").unwrap_or_default();
    let service = Service::new(Parts {
        operations: Operations::new(state.clone(), hub.clone()),
        layout,
        mode,
        state,
        hub,
        store,
        mirror,
        network: Arc::new(network),
        hypervisor: Finder::new(args.qemu.clone(), search, args.accelerator),
        registry,
        templates: Arc::new(templates),
        building: tokio::sync::Mutex::default(),
        pool: Pool::default(),
        settings,
        admission: Admission::new(admission::available),
        broken,
        attempts: service::passphrase::Attempts::default(),
        clock: jiff::Timestamp::now,
    });
    needed.ask(&service);
    Ok((service, instances))
}

/// The private network, with the subnet that it had before.
async fn start_network(
    bridge: &str,
    state: &State,
    layout: &Layout,
    mode: &Mode,
) -> Result<Network> {
    let kept = state
        .run(|tx| state::settings::get(tx, state::settings::SUBNET))
        .await?;
    let mut config = NetworkConfig::new(layout.network_run());
    bridge.clone_into(&mut config.bridge);
    if let Mode::User(entered) = mode {
        config = config.inside(entered);
    }
    config.subnet = kept.map(|text| text.parse::<Subnet>()).transpose()?;
    let network = Network::start(config).await?;
    let subnet = network.subnet().to_string();
    state
        .run(move |tx| state::settings::set(tx, state::settings::SUBNET, &subnet))
        .await?;
    Ok(network)
}

async fn serve(
    listener: UnixListener,
    service: Service,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let app = http::router(service).into_make_service_with_connect_info::<Peer>();
    // Streams (events, shells) have no end of their own, so nobody waits for them.
    tokio::select! {
        served = axum::serve(listener, app) => {
            served.map_err(|err| Error::io("Serving the API", err))
        }
        () = stop => Ok(()),
    }
}

/// On a clean end the network goes if no instance needs it; instances themselves stay.
async fn leave(service: &Service) {
    let parts = service.parts();
    // If nothing lies in it any more; another daemon of this storage makes it again.
    let _ = std::fs::remove_dir(&parts.layout.memory);
    if parts.registry.any_running() {
        tracing::info!("the instances run on; the next daemon finds them again");
        return;
    }
    if let Err(err) = parts.network.stop().await {
        tracing::warn!(%err, "the network can't be taken down");
    }
    if let Mode::User(entered) = &parts.mode
        && let Err(err) = entered.release()
    {
        tracing::warn!(%err, "the user's namespace can't be let go");
    }
}

/// Whether the daemon ends because the host does. Its guests would be killed then.
async fn host_goes_down() -> bool {
    let asked = tokio::process::Command::new("systemctl")
        .arg("is-system-running")
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    // A host without systemd ends in its own way.
    match tokio::time::timeout(Duration::from_secs(3), asked).await {
        Ok(Ok(output)) => output.stdout.trim_ascii() == b"stopping",
        _ => false,
    }
}

fn stop_signal() -> Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |err| Error::io("Catching signals", err);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending");
    })
}

/// Tells systemd; without systemd nothing happens.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(err) = sd_notify::notify(states) {
        tracing::warn!(%err, "systemd can't be told");
    }
}

fn group_id(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then_some(())?;
        fields.nth(1)?.parse().ok()
    })
}
