//! The task against a scripted VM, with time that jumps.

use std::sync::Mutex as StdMutex;
use std::time::Duration;

use pileus_api::{CloudInit, CloudInitStatus};
use tokio::sync::mpsc;

use super::*;

/// What the scripted VM does when it is told to.
struct Script {
    events: StdMutex<Option<mpsc::UnboundedReceiver<VmEvent>>>,
    calls: Arc<StdMutex<Vec<&'static str>>>,
    /// The call that fails once.
    fails: Arc<StdMutex<Option<&'static str>>>,
    /// Where a resumed VM takes its events from.
    again: Arc<StdMutex<Option<mpsc::UnboundedSender<VmEvent>>>>,
}

struct FakeVm {
    events: mpsc::UnboundedReceiver<VmEvent>,
    calls: Arc<StdMutex<Vec<&'static str>>>,
}

impl Script {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }

    /// Fails as often as the test says.
    fn may_fail(&self, call: &'static str) -> Result<()> {
        self.note(call);
        match self.fails.lock().unwrap().take_if(|fails| *fails == call) {
            Some(_) => Err(Error::new(Code::QemuFailed, "told to fail")),
            None => Ok(()),
        }
    }
}

fn saved() -> Saved {
    Saved {
        at: Timestamp::UNIX_EPOCH,
        file: SavedFile::Suspended,
        stream: crate::qemu::Stream::Plain,
        bytes: 1,
        machine_type: "pc-q35-10.0".into(),
        qemu: "10.0.2".into(),
        accelerator: crate::qemu::Accelerator::Tcg,
        cpus: 1,
        memory: Size::gib(1),
        firmware_boot: false,
        extra_nics: Vec::new(),
        growth: Default::default(),
    }
}

impl Driver for Script {
    type Vm = FakeVm;

    fn name(&self) -> pileus_base::InstanceName {
        "foo".parse().unwrap()
    }

    async fn start_empty(&self, _saved: &Saved) -> Result<FakeVm> {
        self.may_fail("start-empty")?;
        let (events, source) = mpsc::unbounded_channel();
        *self.again.lock().unwrap() = Some(events);
        Ok(FakeVm {
            events: source,
            calls: self.calls.clone(),
        })
    }

    async fn load(&self, _vm: &FakeVm, _saved: &Saved) -> Result<()> {
        self.may_fail("load")
    }

    async fn save(&self, _vm: &FakeVm) -> Result<Saved> {
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.may_fail("save")?;
        Ok(saved())
    }

    async fn unsave(&self, _vm: &FakeVm) -> Result<()> {
        self.may_fail("unsave")
    }

    fn forget(&self, _saved: &Saved) {
        self.note("forget");
    }

    async fn freeze(&self, _vm: &FakeVm, _freeze: Freeze) -> Result<Frozen> {
        self.note("freeze");
        Ok(Frozen {
            saved: None,
            paused: Duration::ZERO,
        })
    }

    async fn identify(&self, _vm: &FakeVm, _report: &Reporter) -> Result<()> {
        match *self.fails.lock().unwrap() {
            Some("identify") => Err(Error::new(Code::IdentityFailed, "told to fail")),
            _ => Ok(()),
        }
    }

    async fn start(&self, _firmware: bool, _report: &Reporter) -> Result<FakeVm> {
        self.calls.lock().unwrap().push("start");
        let events = self.events.lock().unwrap().take();
        let events = events.ok_or_else(|| Error::new(Code::QemuFailed, "no second start"))?;
        Ok(FakeVm {
            events,
            calls: self.calls.clone(),
        })
    }

    async fn release(&self) {
        self.calls.lock().unwrap().push("release");
    }

    fn console_tail(&self) -> Vec<String> {
        vec!["last words".into()]
    }

    fn trim_console(&self) {}
}

impl Vm for FakeVm {
    type Guest = ();

    fn process(&self) -> ProcessId {
        ProcessId {
            pid: 1,
            start_time: 1,
        }
    }

    fn guest(&self) {}

    async fn power_down(&self) -> Result<()> {
        self.calls.lock().unwrap().push("power-down");
        Ok(())
    }

    async fn reboot(&self) -> Result<()> {
        self.calls.lock().unwrap().push("reboot");
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.calls.lock().unwrap().push("resume");
        Ok(())
    }

    async fn reset(&self) -> Result<()> {
        self.calls.lock().unwrap().push("reset");
        Ok(())
    }

    async fn resumed(&self, _name: &pileus_base::InstanceName) {
        self.calls.lock().unwrap().push("resumed");
    }

    async fn grow_disk(&self, _size: Size) -> Result<()> {
        self.calls.lock().unwrap().push("grow");
        Ok(())
    }

    async fn grow(&self, want: super::Shape) -> Result<super::Shape> {
        Ok(want)
    }

    async fn kill(&self) {
        self.calls.lock().unwrap().push("kill");
    }

    async fn next(&mut self) -> VmEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

#[derive(Default)]
struct Memory(StdMutex<Vec<InstanceState>>);

impl Journal for Memory {
    fn save<'a>(
        &'a self,
        snapshot: &'a Snapshot,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
        let mut states = self.0.lock().unwrap();
        if states.last() != Some(&snapshot.state) {
            states.push(snapshot.state);
        }
        Box::pin(async { Ok(()) })
    }
}

struct Bench {
    machine: Machine<Script>,
    events: mpsc::UnboundedSender<VmEvent>,
    calls: Arc<StdMutex<Vec<&'static str>>>,
    fails: Arc<StdMutex<Option<&'static str>>>,
    again: Arc<StdMutex<Option<mpsc::UnboundedSender<VmEvent>>>>,
    journal: Arc<Memory>,
}

fn bench() -> Bench {
    let (events, source) = mpsc::unbounded_channel();
    let calls = Arc::default();
    let (fails, again) = (Arc::default(), Arc::default());
    let journal = Arc::new(Memory::default());
    let machine = Machine::spawn(Config {
        driver: Arc::new(Script {
            events: StdMutex::new(Some(source)),
            calls: Arc::clone(&calls),
            fails: Arc::clone(&fails),
            again: Arc::clone(&again),
        }),
        journal: journal.clone(),
        snapshot: Snapshot::stopped(),
        address: Ipv4Addr::new(10, 0, 0, 2),
        clock: || Timestamp::UNIX_EPOCH,
    });
    Bench {
        machine,
        events,
        calls,
        fails,
        again,
        journal,
    }
}

fn cloud_init(status: CloudInitStatus, errors: &[&str]) -> VmEvent {
    VmEvent::Guest(GuestEvent::CloudInit(CloudInit {
        status,
        errors: errors.iter().map(|&e| e.to_owned()).collect(),
    }))
}

const DONE: fn() -> VmEvent = || cloud_init(CloudInitStatus::Done, &[]);

const UP: VmEvent = VmEvent::Guest(GuestEvent::Up);

impl Bench {
    async fn start(&self) -> Result<()> {
        self.machine
            .start(BOOT_TIMEOUT, Vec::new(), Reporter::silent())
            .await
    }

    fn state(&self) -> InstanceState {
        self.machine.snapshot().state
    }

    async fn until(&self, state: InstanceState) {
        let mut watch = self.machine.watch();
        watch.wait_for(|s| s.state == state).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_waits_for_the_guest_and_for_cloud_init() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench
        .events
        .send(cloud_init(CloudInitStatus::Running, &[]))
        .unwrap();
    let machine = bench.machine.clone();
    let start = tokio::spawn(async move {
        machine
            .start(BOOT_TIMEOUT, Vec::new(), Reporter::silent())
            .await
    });
    bench.until(InstanceState::Starting).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!start.is_finished());
    bench
        .events
        .send(cloud_init(CloudInitStatus::Done, &[]))
        .unwrap();
    start.await.unwrap().unwrap();
    let snapshot = bench.machine.snapshot();
    assert_eq!(snapshot.state, InstanceState::Running);
    assert_eq!(snapshot.addresses, [Ipv4Addr::new(10, 0, 0, 2)]);
    assert_eq!(snapshot.phases.len(), 3);
    // A second start is nothing to do.
    bench.start().await.unwrap();
    assert_eq!(*bench.calls.lock().unwrap(), ["start"]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_says_nothing_is_unknown_within_the_bound() {
    let bench = bench();
    let began = tokio::time::Instant::now();
    let error = bench.start().await.unwrap_err();
    assert_eq!(error.code, Code::BootTimeout);
    assert!(error.details.iter().any(|line| line == "last words"));
    assert_eq!(began.elapsed().as_secs(), BOOT_TIMEOUT.as_secs());
    assert_eq!(bench.state(), InstanceState::Unknown);
    // It may still come up.
    bench.events.send(UP).unwrap();
    bench.until(InstanceState::Running).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_cloud_init_is_told_and_the_instance_runs() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench
        .events
        .send(cloud_init(CloudInitStatus::Error, &["runcmd: boom"]))
        .unwrap();
    let error = bench.start().await.unwrap_err();
    assert_eq!(error.code, Code::CloudInitFailed);
    assert_eq!(error.details, ["runcmd: boom"]);
    assert_eq!(bench.state(), InstanceState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_off_while_it_boots_ends_the_start() {
    let bench = bench();
    bench.events.send(VmEvent::Exited { reason: None }).unwrap();
    let error = bench.start().await.unwrap_err();
    assert_eq!(error.code, Code::GuestStopped);
    assert_eq!(bench.state(), InstanceState::Stopped);
    assert_eq!(*bench.calls.lock().unwrap(), ["start", "kill", "release"]);
}

#[tokio::test(start_paused = true)]
async fn a_forced_stop_interrupts_a_start() {
    let bench = bench();
    let machine = bench.machine.clone();
    let start = tokio::spawn(async move {
        machine
            .start(BOOT_TIMEOUT, Vec::new(), Reporter::silent())
            .await
    });
    bench.until(InstanceState::Starting).await;
    bench
        .machine
        .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
        .await
        .unwrap();
    assert_eq!(start.await.unwrap().unwrap_err().code, Code::Cancelled);
    assert_eq!(bench.state(), InstanceState::Stopped);
    assert!(bench.machine.snapshot().last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_forced_stop_interrupts_a_boot_that_was_taken_up_again() {
    let (_events, source) = mpsc::unbounded_channel();
    let calls = Arc::default();
    let config = Config {
        driver: Arc::new(Script {
            events: StdMutex::default(),
            calls: Arc::clone(&calls),
            fails: Arc::default(),
            again: Arc::default(),
        }),
        journal: Arc::new(Memory::default()),
        snapshot: Snapshot {
            state: InstanceState::Starting,
            ..Snapshot::stopped()
        },
        address: Ipv4Addr::new(10, 0, 0, 2),
        clock: || Timestamp::UNIX_EPOCH,
    };
    let events = source;
    let machine = Machine::adopt(config, FakeVm { events, calls });
    // It waits for the guest.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(machine.snapshot().state, InstanceState::Starting);
    let stop = machine.stop(true, SHUTDOWN_TIMEOUT, Reporter::silent());
    let stop = tokio::time::timeout(Duration::from_secs(1), stop).await;
    stop.expect("it does not wait for the guest").unwrap();
    assert_eq!(machine.snapshot().state, InstanceState::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_stop_asks_again_and_gives_up_within_its_bound() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench
        .events
        .send(cloud_init(CloudInitStatus::Done, &[]))
        .unwrap();
    bench.start().await.unwrap();
    let error = bench
        .machine
        .stop(false, Duration::from_secs(40), Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::ShutdownTimeout);
    assert_eq!(bench.state(), InstanceState::Running);
    let presses = bench
        .calls
        .lock()
        .unwrap()
        .iter()
        .filter(|c| **c == "power-down")
        .count();
    assert_eq!(presses, 3);
    bench.events.send(VmEvent::Exited { reason: None }).unwrap();
    bench
        .machine
        .stop(false, SHUTDOWN_TIMEOUT, Reporter::silent())
        .await
        .unwrap();
    assert_eq!(
        *bench.journal.0.lock().unwrap(),
        [
            InstanceState::Starting,
            InstanceState::Running,
            InstanceState::Stopping,
            InstanceState::Running,
            // The guest went down by itself in the end, before it was asked once more.
            InstanceState::Stopped,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_crash_is_kept_with_its_reason() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench
        .events
        .send(cloud_init(CloudInitStatus::Done, &[]))
        .unwrap();
    bench.start().await.unwrap();
    let reason = Some("killed by signal 9".to_owned());
    bench.events.send(VmEvent::Exited { reason }).unwrap();
    bench.until(InstanceState::Stopped).await;
    let error = bench.machine.snapshot().last_error.unwrap();
    assert!(error.message.contains("killed by signal 9"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_restart_after_a_kernel_upgrade_is_a_new_start() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    let done = cloud_init(CloudInitStatus::Done, &[]);
    bench.events.send(done).unwrap();
    bench.start().await.unwrap();
    let usage = pileus_api::Usage { used: 0, total: 0 };
    let report = GuestEvent::Report {
        report: GuestReport {
            os: String::new(),
            kernel: String::new(),
            cpus: 1,
            load: [0.0; 3],
            memory: usage,
            disk: usage,
            uptime_seconds: 0,
        },
        addresses: Vec::new(),
        other_kernel: true,
    };
    bench.events.send(VmEvent::Guest(report)).unwrap();
    let mut watch = bench.machine.watch();
    watch.wait_for(|s| s.firmware_boot).await.unwrap();
    bench.events.send(VmEvent::Exited { reason: None }).unwrap();
    // The scripted driver starts once only; what counts is that it was asked again.
    let restart = bench.machine.restart(BOOT_TIMEOUT, Reporter::silent());
    let _ = restart.await;
    let calls = bench.calls.lock().unwrap().clone();
    assert!(!calls.contains(&"reboot"), "{calls:?}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_reboot_is_followed() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench
        .events
        .send(cloud_init(CloudInitStatus::Done, &[]))
        .unwrap();
    bench.start().await.unwrap();
    bench.events.send(VmEvent::Reset).unwrap();
    bench.until(InstanceState::Restarting).await;
    bench.events.send(UP).unwrap();
    bench.until(InstanceState::Running).await;
    bench.events.send(VmEvent::Reset).unwrap();
    bench.until(InstanceState::Restarting).await;
    // Nothing more is heard.
    bench.until(InstanceState::Unknown).await;
}

#[tokio::test(start_paused = true)]
async fn a_restored_vm_is_taken_over_and_only_its_cloud_init_is_waited_for() {
    let bench = bench();
    let restored = || {
        let (events, source) = mpsc::unbounded_channel();
        let vm = FakeVm {
            events: source,
            calls: Arc::clone(&bench.calls),
        };
        (vm, events)
    };
    let take = async |vm| {
        let report = Reporter::silent();
        bench
            .machine
            .start_with(vm, BOOT_TIMEOUT, Vec::new(), report)
            .await
    };
    let (vm, events) = restored();
    events.send(cloud_init(CloudInitStatus::Done, &[])).unwrap();
    take(vm).await.unwrap();
    assert_eq!(bench.state(), InstanceState::Running);
    assert!(bench.machine.snapshot().process.is_some());
    assert!(bench.calls.lock().unwrap().is_empty());
    // One that comes when a VM runs already is not kept beside it.
    let (second, _events) = restored();
    take(second).await.unwrap();
    assert_eq!(*bench.calls.lock().unwrap(), ["kill"]);
    assert_eq!(bench.state(), InstanceState::Running);
}

impl Bench {
    async fn running() -> Self {
        let bench = bench();
        bench.events.send(UP).unwrap();
        bench.events.send(DONE()).unwrap();
        bench.start().await.unwrap();
        bench.calls.lock().unwrap().clear();
        bench
    }

    /// Starts a suspended one, whose guest answers as soon as it runs.
    async fn resume(&self) -> Result<()> {
        let again = self.again.clone();
        let answer = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                if let Some(events) = again.lock().unwrap().take() {
                    events.send(UP).unwrap();
                    events.send(DONE()).unwrap();
                    // The sender must live as long as the VM.
                    std::mem::forget(events);
                    return;
                }
            }
        });
        let started = self.start().await;
        answer.abort();
        started
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspended_instance_goes_on() {
    let bench = Bench::running().await;
    bench.machine.suspend(Reporter::silent()).await.unwrap();
    let snapshot = bench.machine.snapshot();
    assert_eq!(snapshot.state, InstanceState::Suspended);
    assert_eq!(snapshot.suspended, Some(saved()));
    assert_eq!(snapshot.process, None);
    assert_eq!(*bench.calls.lock().unwrap(), ["save", "kill", "release"]);
    // What is suspended can't be shut down, and is suspended already.
    bench.machine.suspend(Reporter::silent()).await.unwrap();
    let refused = bench
        .machine
        .stop(false, SHUTDOWN_TIMEOUT, Reporter::silent())
        .await
        .unwrap_err();
    assert!(refused.message.contains("suspended"), "{refused}");
    bench.calls.lock().unwrap().clear();
    bench.resume().await.unwrap();
    let snapshot = bench.machine.snapshot();
    assert_eq!(
        (snapshot.state, snapshot.suspended),
        (InstanceState::Running, None)
    );
    assert_eq!(
        *bench.calls.lock().unwrap(),
        ["start-empty", "load", "forget", "resume", "resumed"]
    );
    assert_eq!(
        *bench.journal.0.lock().unwrap(),
        [
            InstanceState::Starting,
            InstanceState::Running,
            InstanceState::Suspending,
            InstanceState::Suspended,
            InstanceState::Starting,
            InstanceState::Running,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_suspend_that_fails_or_is_cancelled_lets_the_guest_go_on() {
    let bench = Bench::running().await;
    *bench.fails.lock().unwrap() = Some("save");
    let error = bench.machine.suspend(Reporter::silent()).await.unwrap_err();
    assert_eq!(error.code, Code::QemuFailed);
    assert_eq!(bench.state(), InstanceState::Running);
    assert_eq!(*bench.calls.lock().unwrap(), ["save", "unsave"]);
    bench.calls.lock().unwrap().clear();
    let machine = bench.machine.clone();
    let suspending = tokio::spawn(async move { machine.suspend(Reporter::silent()).await });
    bench.until(InstanceState::Suspending).await;
    // It is interrupted, and what interrupts it finds a VM.
    bench
        .machine
        .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
        .await
        .unwrap();
    assert_eq!(suspending.await.unwrap().unwrap_err().code, Code::Cancelled);
    assert_eq!(bench.state(), InstanceState::Stopped);
    assert_eq!(*bench.calls.lock().unwrap(), ["unsave", "kill", "release"]);
}

#[tokio::test(start_paused = true)]
async fn a_resume_that_fails_leaves_it_suspended_and_force_gives_the_memory_up() {
    for fails in ["start-empty", "load"] {
        let bench = Bench::running().await;
        bench.machine.suspend(Reporter::silent()).await.unwrap();
        *bench.fails.lock().unwrap() = Some(fails);
        bench.resume().await.unwrap_err();
        let snapshot = bench.machine.snapshot();
        assert_eq!(snapshot.state, InstanceState::Suspended, "{fails}");
        assert!(snapshot.suspended.is_some() && snapshot.process.is_none());
        assert!(snapshot.last_error.is_some());
        bench.resume().await.unwrap();
        bench.machine.suspend(Reporter::silent()).await.unwrap();
        bench
            .machine
            .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
            .await
            .unwrap();
        let snapshot = bench.machine.snapshot();
        assert_eq!(
            (snapshot.state, snapshot.suspended),
            (InstanceState::Stopped, None)
        );
        assert_eq!(bench.calls.lock().unwrap().last(), Some(&"forget"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_reboot_is_reset() {
    let bench = Bench::running().await;
    let machine = bench.machine.clone();
    let restart =
        tokio::spawn(async move { machine.restart(BOOT_TIMEOUT, Reporter::silent()).await });
    while !bench.calls.lock().unwrap().contains(&"reset") {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    for event in [VmEvent::Reset, UP, DONE()] {
        bench.events.send(event).unwrap();
    }
    restart.await.unwrap().unwrap();
    assert_eq!(bench.state(), InstanceState::Running);
}

#[tokio::test(start_paused = true)]
async fn nobody_runs_before_it_has_an_identity() {
    let bench = bench();
    bench.events.send(UP).unwrap();
    bench.events.send(DONE()).unwrap();
    *bench.fails.lock().unwrap() = Some("identify");
    assert_eq!(bench.start().await.unwrap_err().code, Code::IdentityFailed);
    assert_eq!(bench.state(), InstanceState::Stopped);
    assert!(
        !bench
            .journal
            .0
            .lock()
            .unwrap()
            .contains(&InstanceState::Running)
    );
}
