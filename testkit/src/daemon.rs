//! A daemon of the test's own: in a namespace, with its own storage and environment. It can be killed
//! and started again; at the end everything that it started is ended too.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cli::Output;
use crate::image::{self, GUEST_IMAGE, OLDER_GUEST_IMAGE};
use crate::netns::Namespace;
use crate::program;
use crate::template::{self, Planted};

/// Where a daemon finds programs.
pub(crate) const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// How the daemon is to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// With the stand-in for QEMU.
    pub fake_qemu: bool,
    /// With this shared guest image in its store.
    pub guest_image: Option<&'static str>,
    /// With the shared template of that image.
    pub template: bool,
    /// What `--warm` says: no test wants templates to be made behind its back.
    pub warm: &'static str,
    /// With a figure of free memory that [`Daemon::set_free_memory`] chooses.
    pub own_meminfo: bool,
    /// As this user instead of root.
    pub user: Option<String>,
    /// Further arguments.
    pub args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fake_qemu: false,
            guest_image: None,
            template: false,
            warm: "off",
            own_meminfo: false,
            user: None,
            args: Vec::new(),
        }
    }
}

impl Options {
    pub fn fake() -> Self {
        Self {
            fake_qemu: true,
            ..Self::default()
        }
    }

    pub fn real() -> Self {
        Self {
            guest_image: Some(GUEST_IMAGE),
            ..Self::default()
        }
    }

    /// Real guests of an older Debian, whose kernel takes under emulation what newer ones don't.
    pub fn older() -> Self {
        Self {
            guest_image: Some(OLDER_GUEST_IMAGE),
            ..Self::default()
        }
    }

    /// Real guests that are there in seconds.
    pub fn warm() -> Self {
        Self {
            template: true,
            warm: "manual",
            ..Self::real()
        }
    }
}

pub struct Daemon {
    namespace: Namespace,
    folder: tempfile::TempDir,
    options: Options,
    template: Option<Planted>,
    child: Option<Child>,
    mounted: bool,
}

impl Daemon {
    /// Starts a daemon and waits until it answers.
    ///
    /// # Panics
    /// If it doesn't.
    pub fn start(options: Options) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("pil")
            .tempdir()
            .expect("a folder can be made");
        // Other users (dnsmasq's, QEMU's) pass through.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), mode).expect("the mode can be set");
        let mut daemon = Self {
            namespace: Namespace::new().with_uplink(),
            folder,
            options,
            template: None,
            child: None,
            mounted: false,
        };
        fs::create_dir_all(daemon.home()).expect("a folder can be made");
        if let Some(source) = daemon.options.guest_image {
            let images = daemon.storage().join("data/images");
            fs::create_dir_all(&images).expect("a folder can be made");
            let image = image::shared(source);
            image::plant(&image::folder_of(&image), &images);
            if daemon.options.template {
                let template = template::guest_template(&image);
                daemon.template = Some(template.plant(&daemon.storage()));
            }
        }
        daemon.set_free_memory(1 << 40);
        daemon.give_to_user();
        daemon.start_again();
        if daemon.options.warm != "off" {
            // Clones that stand by take time and memory from the test beside.
            daemon.run(&["set", "local.warm-pool=0"]).ok();
        }
        daemon
    }

    /// A daemon with the stand-in for QEMU and a disk that is good enough for it.
    pub fn fake() -> Self {
        let daemon = Self::start(Options::fake());
        daemon.write_fake_image();
        daemon
    }

    /// A fake daemon whose storage has a template for [`Self::launch_fake`] to start from.
    pub fn fake_warm() -> Self {
        let mut daemon = Self::start(Options {
            warm: "manual",
            ..Options::fake()
        });
        daemon.write_fake_image();
        daemon.stop();
        daemon.plant_fake_template();
        daemon.start_again();
        daemon
    }

    /// Puts the template into the storage (again), which the daemon must not have open.
    pub fn plant_fake_template(&mut self) {
        let image = image::import(&self.fake_image(), &self.storage().join("data/images"));
        let qemu = self.fake_qemu();
        self.template = Some(template::plant_fake(&self.storage(), &image, &qemu));
    }

    /// Gives the daemon a copy of the stand-in for QEMU of its own: another build than the one before.
    pub fn exchange_fake_qemu(&self) {
        let (own, new) = (
            self.folder.path().join("fake-qemu"),
            self.folder.path().join("fake-qemu.new"),
        );
        fs::copy(program("fake-qemu"), &new).expect("a program can be copied");
        fs::rename(new, own).expect("a file can be renamed");
    }

    fn fake_qemu(&self) -> PathBuf {
        let own = self.folder.path().join("fake-qemu");
        match own.exists() {
            true => own,
            false => program("fake-qemu"),
        }
    }

    /// A daemon whose storage is a file system of its own with so many bytes.
    pub fn on_small_disk(bytes: u64) -> Self {
        let mut daemon = Self::fake();
        daemon.stop();
        let _ = fs::remove_dir_all(daemon.storage());
        fs::create_dir_all(daemon.storage()).expect("a folder can be made");
        let status = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={bytes},mode=755"),
                "tmpfs",
            ])
            .arg(daemon.storage())
            .status();
        assert!(
            status.is_ok_and(|s| s.success()),
            "a tmpfs can't be mounted"
        );
        daemon.mounted = true;
        daemon.start_again();
        daemon
    }

    /// The same daemon with other arguments, not started yet.
    #[must_use]
    pub fn with_args(mut self, args: &[&str]) -> Self {
        self.options.fake_qemu = false;
        self.options.args = args.iter().map(|&arg| arg.to_owned()).collect();
        self
    }

    /// A small raw image for machines that never read it.
    pub fn write_fake_image(&self) {
        self.write_disk("fake.raw", 1 << 20, 0);
    }

    /// A raw disk with a boot sector, filled with one byte.
    pub fn write_disk(&self, name: &str, bytes: usize, fill: u8) -> PathBuf {
        let mut disk = vec![fill; bytes];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let path = self.folder.path().join(name);
        fs::write(&path, disk).expect("a file can be written");
        path
    }

    pub fn fake_image(&self) -> PathBuf {
        self.folder.path().join("fake.raw")
    }

    /// Makes fake machines behave so: `never-boots`, `panics`, … (see `bin/fake-qemu`).
    pub fn fakes_do(&self, words: &str) {
        fs::write(self.storage().join("data/fake-qemu"), words).expect("a file can be written");
    }

    /// What a daemon with [`Options::own_meminfo`] takes for the host's free memory, in bytes.
    pub fn set_free_memory(&self, bytes: u64) {
        let line = format!("MemAvailable: {} kB\n", bytes >> 10);
        fs::write(self.meminfo(), line).expect("a file can be written");
    }

    fn meminfo(&self) -> PathBuf {
        self.folder.path().join("meminfo")
    }

    pub fn storage(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.storage().join("run/pileusd.sock")
    }

    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("daemon.log")).unwrap_or_default()
    }

    /// Pid of the running daemon. Behind `ip netns exec`, which becomes the program it is to run.
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.id().cast_signed())
    }

    /// Starts the daemon (again) on the same storage.
    ///
    /// # Panics
    /// If it doesn't answer.
    pub fn start_again(&mut self) {
        self.spawn();
        let until = Instant::now() + Duration::from_secs(60);
        while !self.answers() {
            let ended = self
                .child
                .as_mut()
                .and_then(|c| c.try_wait().ok().flatten());
            assert!(
                ended.is_none(),
                "pileusd ended with {ended:?}:\n{}",
                self.log()
            );
            assert!(
                Instant::now() < until,
                "pileusd does not answer:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the daemon without waiting for it.
    pub fn spawn(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("daemon.log"))
            .expect("a log can be made");
        let error_log = log.try_clone().expect("the log can be shared");
        let pileusd = program("pileusd");
        let mut command = match self.options.own_meminfo {
            true => {
                // The namespace's programs have a mount namespace of their own.
                let script = r#"mount --bind "$0" /proc/meminfo && exec "$@""#;
                let mut command = self.inside(Path::new("sh"));
                command
                    .args(["-c", script])
                    .arg(self.meminfo())
                    .arg(pileusd);
                command
            }
            false => self.inside(&pileusd),
        };
        command.arg("--storage").arg(self.storage());
        command.args(["--warm", self.options.warm]);
        // No test asks a host on the net.
        command.env("PILEUS_IMAGE_HOST", "");
        if self.options.fake_qemu {
            command.arg("--qemu").arg(self.fake_qemu());
            // Chosen, not found: nothing to warn of.
            command.args(["--accelerator", "tcg"]);
            // What its guests write are marks behind the layers' ends.
            command.arg("--keep-layers");
        }
        command
            .args([
                "--log",
                "info,pileusd=debug,pileus_instances=debug,pileus_networks=debug",
            ])
            .args(&self.options.args)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(error_log)
            .process_group(0);
        self.child = Some(command.spawn().expect("pileusd can be started"));
    }

    /// The socket is there before the start has cleaned up, so only an answer counts.
    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = std::os::unix::net::UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: pileus\r\nConnection: close\r\n\r\n")?;
            Ok(stream.read(&mut [0; 16])? > 0)
        };
        ask().unwrap_or(false)
    }

    /// Ends the daemon as an upgrade does.
    pub fn stop(&mut self) {
        self.signal("TERM");
    }

    /// Ends the daemon as a power cut does.
    pub fn kill(&mut self) {
        self.signal("KILL");
    }

    fn signal(&mut self, name: &str) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill")
                .args(["-s", name, &child.id().to_string()])
                .status();
            let _ = child.wait();
        }
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    fn give_to_user(&self) {
        if let Some(user) = &self.options.user {
            let status = Command::new("chown")
                .arg("-R")
                // With the group: a file whose group is not mapped can't be given to anybody.
                .arg(format!("{user}:"))
                .arg(self.folder.path())
                .status();
            assert!(status.is_ok_and(|s| s.success()), "chown to {user} failed");
        }
    }

    /// A command in the namespace with a clean environment, as the daemon's user.
    pub fn inside(&self, program: &Path) -> Command {
        let mut command = match &self.options.user {
            Some(user) => {
                // Becomes the program; one that forks would be killed in the program's place.
                let mut command = self.namespace.command("setpriv");
                command
                    .args(["--reuid", user, "--regid", user, "--init-groups", "--"])
                    .arg(program);
                command
            }
            None => self.namespace.command(program),
        };
        command
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", self.home())
            .env("TERM", "dumb")
            .env("LANG", "C.UTF-8");
        command
    }

    /// What the API answers to a GET.
    ///
    /// # Panics
    /// If that is not JSON, or an error.
    pub fn get(&self, path: &str) -> serde_json::Value {
        let ask = || -> std::io::Result<String> {
            let mut stream = std::os::unix::net::UnixStream::connect(self.socket())?;
            write!(stream, "GET {path} HTTP/1.0\r\nHost: pileus\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().expect("the daemon answers");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        assert!(head.contains(" 200 "), "GET {path}: {answer}");
        serde_json::from_str(body).unwrap_or_else(|err| panic!("GET {path}: {err}: {answer}"))
    }

    /// The API, for tests that need no CLI.
    pub fn api(&self) -> crate::Api {
        crate::Api::new(&self.socket())
    }

    /// Pid of an instance's machine, if it runs.
    pub fn machine_of(&self, id: &str) -> Option<i32> {
        let folder: String = id.chars().filter(|c| *c != '-').take(8).collect();
        let file = self.storage().join("run/i").join(folder).join("qemu.pid");
        let pid: i32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        is_alive(pid).then_some(pid)
    }

    /// Runs a command in an instance's guest; it must work, and gives what it said.
    #[track_caller]
    pub fn exec(&self, name: &str, words: &[&str]) -> String {
        self.run(&[&["exec", name, "--"], words].concat()).ok()
    }

    /// Runs a script as root in an instance's guest; it must work, and gives what it said.
    #[track_caller]
    pub fn script(&self, name: &str, script: &str) -> String {
        let args = ["exec", name, "--", "sudo", "-n", "sh", "-eu"];
        self.run_with(&args, script.as_bytes()).ok()
    }

    /// A `pileus` command, not started yet.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.inside(&program("pileus"));
        command.env("PILEUS_STORAGE", self.storage()).args(args);
        command
    }

    /// Runs `pileus` with these arguments and no input.
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, b"")
    }

    /// Runs `pileus` with this standard input.
    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("pileus can be started");
        let mut stdin = child.stdin.take().expect("it was asked for");
        let input = input.to_vec();
        // Beside the reading of its output, or a large input would block both.
        let feed = std::thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().expect("pileus ends");
        let _ = feed.join();
        Output {
            what: format!("pileus {}", args.join(" ")),
            status: output.status,
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Launches a fake machine.
    pub fn launch_fake(&self, name: &str) -> Output {
        let image = format!("file://{}", self.fake_image().display());
        self.run(&["launch", &image, "--name", name])
    }

    /// The template that was put into the storage.
    ///
    /// # Panics
    /// If none was.
    pub fn template(&self) -> &Planted {
        self.template.as_ref().expect("the options say so")
    }

    /// The folder of an instance's files.
    ///
    /// # Panics
    /// If there isn't just one instance.
    pub fn instance_folder(&self, name: &str) -> PathBuf {
        let folders = fs::read_dir(self.storage().join("data/instances"));
        let folders: Vec<_> = folders.into_iter().flatten().flatten().collect();
        assert_eq!(folders.len(), 1, "{name} is not the only instance");
        folders[0].path()
    }

    /// How an instance was started: `cold`, `warm`, `fork`.
    pub fn origin(&self, name: &str) -> String {
        let kind = self.field(name, "/origin/kind");
        kind.as_str().unwrap_or_default().to_owned()
    }

    /// What there is of templates and of the layers below instances, by relative path.
    pub fn templates_and_layers(&self) -> Vec<PathBuf> {
        let data = self.storage().join("data");
        let mut found = crate::files_below(&data.join("templates"));
        found.extend(crate::files_below(&data.join("layers")));
        found
    }

    /// One field of an instance, by the API's name.
    pub fn field(&self, name: &str, pointer: &str) -> serde_json::Value {
        let info = self.run(&["info", name, "--format", "json"]).json();
        let pointer = format!("/info/{name}{pointer}");
        info.pointer(&pointer).cloned().unwrap_or_default()
    }

    /// The state that `list` shows.
    pub fn state(&self, name: &str) -> String {
        let list = self.run(&["list", "--format", "json"]).json();
        let instances = list["list"].as_array().cloned().unwrap_or_default();
        instances
            .iter()
            .find(|instance| instance["name"] == name)
            .map_or_else(
                || "none".to_owned(),
                |i| i["state"].as_str().unwrap_or_default().to_owned(),
            )
    }

    /// Pids of processes that have this daemon's folder on their command line: what it left in
    /// namespaces of its own (dnsmasq, the holder of a user's network).
    fn others(&self) -> Vec<i32> {
        let folder = self.folder.path().display().to_string();
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&folder) {
                let pid = entry.file_name().to_string_lossy().parse::<i32>();
                pids.extend(pid.ok());
            }
        }
        pids
    }

    /// Pids of the machines that run on this storage, whoever started them.
    pub fn machines(&self) -> Vec<i32> {
        let run = self.storage().join("run/i");
        let mut pids = Vec::new();
        for entry in fs::read_dir(run).into_iter().flatten().flatten() {
            let pid = fs::read_to_string(entry.path().join("qemu.pid")).unwrap_or_default();
            pids.extend(pid.trim().parse::<i32>().ok().filter(|pid| is_alive(*pid)));
        }
        pids
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- the daemon's log ends with:");
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
        // The daemon first, so that it doesn't wonder where its machines are.
        self.kill();
        for pid in self.machines().into_iter().chain(self.others()) {
            let _ = Command::new("kill")
                .args(["-KILL", &pid.to_string()])
                .status();
        }
        if self.mounted {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.storage())
                .status();
        }
        // What else was started in the namespace (dnsmasq, pasta and its keeper) is ours as well.
        let pids = self.namespace.pids();
        for pid in pids {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
    }
}
