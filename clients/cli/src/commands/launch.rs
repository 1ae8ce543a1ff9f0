//! `pileus launch`: asks for a new instance, shows how it comes up, and names it at the end.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_api::{
    Blob, Code, Digest, InstanceName, LaunchNetwork, LaunchRequest, NetworkMode, Operation,
    OperationEvent, OperationState, Phase, Size, Warm,
};
use pileus_base::{Error, files};
use pileus_client::Client;
use tokio::time::Instant;

use crate::context::Context;
use crate::environment::time_zone;
use crate::error::{CommandError, Kind, Outcome};
use crate::progress::Line;
use crate::signals::Signals;
use crate::{cloud_init, complete, several};

pub(crate) const MIN_MEMORY: Size = Size::mib(512);
/// Bytes of a machine definition at most.
const MAX_MACHINE: u64 = 1 << 20;
const MIN_DISK: Size = Size::gib(1);

/// Create and start an instance
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = "\
Examples:
  pileus launch                                   the default image, a random name
  pileus launch debian-13 -n web -c 2 -m 2G -d 10G
  pileus launch ./disk.qcow2 --checksum sha256:…   an image of your own
  pileus launch -n ci --cloud-init setup.yaml
  pileus launch --network br0                     a second card, in the host's bridge br0")]
pub struct Args {
    /// An image's name (see pileus find), file, address or digest; the default image if not given
    #[arg(value_name = "IMAGE", add = complete::images())]
    pub image: Option<String>,
    /// Name of the instance; a random one if not given
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
    /// Number of CPUs [default: 1]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub cpus: Option<String>,
    /// Memory, at least 512M [default: 1G]
    #[arg(
        short,
        long,
        alias = "mem",
        value_name = "SIZE",
        allow_hyphen_values = true
    )]
    pub memory: Option<String>,
    /// Disk, at least 1G and as large as the image [default: 5G]
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub disk: Option<String>,
    /// User data for cloud-init: a file, an address, or - for standard input
    #[arg(long, value_name = "FILE|URL|-")]
    pub cloud_init: Option<String>,
    /// Network configuration for cloud-init instead of pileus's own: a file, or - for standard input
    #[arg(long, value_name = "FILE|-")]
    pub network_config: Option<String>,
    /// Hardware, as in the machine.json of packed images: a file; goes before what the image's own says
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// What the image's file must hash to, sha256:…
    #[arg(long, value_name = "DIGEST")]
    pub checksum: Option<String>,
    /// Wait so many seconds at most; the work goes on after that
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
    /// Return as soon as the daemon has taken the launch on
    #[arg(long)]
    pub no_wait: bool,
    /// Wait until the instance has initialized itself (it is what happens anyway)
    #[arg(long, hide = true, conflicts_with = "no_wait")]
    pub wait: bool,
    /// Connect to a network of the host as well: name=NAME[,mode=auto|manual][,mac=MAC], or NAME
    #[arg(long, value_name = "SPEC")]
    pub network: Vec<String>,
    /// Connect to the network of local.bridged-network as well
    #[arg(long)]
    pub bridged: bool,
    /// Mount a local folder (not there yet)
    #[arg(long, value_name = "SOURCE[:TARGET]")]
    pub mount: Vec<String>,
    /// Start from a template, or fail if there is none that fits
    #[arg(long, conflicts_with = "cold")]
    pub warm: bool,
    /// Boot, even if there is a template
    #[arg(long)]
    pub cold: bool,
}

/// What Multipass launches if no image is named.
const MULTIPASS_IMAGE: &str = "lts";

pub(crate) async fn run(context: &Context, mut args: Args) -> Outcome {
    not_there_yet(&args)?;
    if context.multipass() {
        args.image.get_or_insert_with(|| MULTIPASS_IMAGE.to_owned());
    }
    let request = request(&args, &context.env.current_folder).await?;
    let client = context.client().await?;
    let mut signals = Signals::to_end().map_err(|err| Error::io("Listening to signals", err))?;
    let operation = client.launch(&request).await;
    let operation = operation.map_err(|err| refused(context, err))?;
    let name = operation.target.clone();
    if args.no_wait {
        return context.print(&format!("Launching: {name}\n"));
    }
    let mut line = context.progress().line(&name);
    let followed = follow(&client, operation, request.timeout, &mut signals, &mut line).await;
    let operation = match followed {
        Ok((operation, Some(signal))) if operation.state == OperationState::Cancelled => {
            return Err(interrupted(signal, "The launch was cancelled"));
        }
        Ok((operation, _)) => operation,
        Err(err) if err.kind == Kind::TimedOut => {
            return Err(err.hint("The launch goes on; pileus list shows its state."));
        }
        Err(err) => return Err(err),
    };
    line.end(&operation);
    drop(line);
    if operation.state != OperationState::Succeeded {
        let error = CommandError::of_operation(operation);
        return Err(match request.timeout {
            Some(_) => error.by_time(),
            None => error,
        });
    }
    context.print(&format!("Launched: {name}\n"))
}

/// The message of a launch whose end was not waited for.
pub(crate) const LEFT: &str = "Left while cancelling";

/// Follows the launch to its end; the first Ctrl-C cancels it (and is returned), the second leaves it
/// alone. The user's time-out holds for getting the image, and anew for the boot, which the daemon
/// itself bounds.
pub(crate) async fn follow(
    client: &Client,
    operation: Operation,
    timeout: Option<u64>,
    signals: &mut Signals,
    line: &mut Line,
) -> Result<(Operation, Option<u8>), CommandError> {
    let id = operation.id;
    let say = line.speaker();
    let after = |seconds| Instant::now() + Duration::from_secs(seconds);
    let until = Cell::new(timeout.map(after));
    let mut work = Box::pin(client.follow(operation, |event| {
        if let OperationEvent::Phase {
            phase: Phase::Starting,
        } = event
        {
            until.set(timeout.map(several::patience).map(after));
        }
        line.event(event);
    }));
    let mut deadline = Box::pin(async {
        while let Some(at) = until.get() {
            if at <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(at).await;
        }
        std::future::pending().await
    });
    let mut cancelled_by = None;
    loop {
        tokio::select! {
            done = &mut work => return Ok((done?, cancelled_by)),
            () = &mut deadline => {
                return Err(CommandError::timed_out("Timed out waiting for instance launch."));
            }
            signal = signals.next() => {
                if cancelled_by.is_some() {
                    return Err(interrupted(signal.number, LEFT));
                }
                cancelled_by = Some(signal.number);
                say.say("Cancelling; press Ctrl-C again to leave at once.");
                client.cancel(id).await?;
            }
        }
    }
}

pub(crate) fn interrupted(signal: u8, message: &str) -> CommandError {
    CommandError::new(Kind::Signal(signal), Error::new(Code::Cancelled, message))
}

/// Refuses what is in the grammar for the sake of scripts and has no meaning yet: an instance without
/// the network or the mount that was asked for would be a surprise.
fn not_there_yet(args: &Args) -> Result<(), CommandError> {
    for mount in &args.mount {
        let source = mount.split(':').next().unwrap_or_default();
        crate::commands::mount::source(source)?;
    }
    if !args.mount.is_empty() {
        return Err(crate::commands::mount::not_yet());
    }
    Ok(())
}

/// `NAME`, or `name=NAME[,mode=auto|manual][,mac=MAC]`.
fn network_spec(text: &str) -> Result<LaunchNetwork, CommandError> {
    let bad = |why: String| Err(CommandError::usage(format!("error: {why}")));
    let mut network = LaunchNetwork {
        name: String::new(),
        mode: NetworkMode::Auto,
        mac: None,
    };
    if !text.contains('=') {
        text.clone_into(&mut network.name);
        return match text {
            "" => bad("a network needs a name".to_owned()),
            _ => Ok(network),
        };
    }
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("name", name)) if !name.is_empty() => name.clone_into(&mut network.name),
            Some(("mode", "auto")) => network.mode = NetworkMode::Auto,
            Some(("mode", "manual")) => network.mode = NetworkMode::Manual,
            Some(("mac", mac)) if is_mac(mac) => network.mac = Some(mac.to_owned()),
            _ => return bad(format!("Bad network field: {part}")),
        }
    }
    match network.name.is_empty() {
        false => Ok(network),
        true => bad("Bad network definition, need at least a 'name' field".to_owned()),
    }
}

/// The networks of the options, the one of `--bridged` last.
fn networks(args: &Args) -> Result<Vec<LaunchNetwork>, CommandError> {
    let given = args.network.iter().map(String::as_str);
    let bridged = args.bridged.then_some("bridged");
    given.chain(bridged).map(network_spec).collect()
}

/// The daemon's refusal of a launch, as it is known under the name `multipass`.
fn refused(context: &Context, err: Error) -> CommandError {
    let network = matches!(err.code, Code::NetworkNotFound | Code::NetworkFailed);
    if !context.multipass() || !network || err.message.contains("bridged") {
        return err.into();
    }
    let message = &err.message;
    CommandError::invalid(format!("Invalid network options. {message}."))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    parts.len() == 6 && parts.iter().all(hex)
}

/// Reads the options and the user data that they name.
pub(crate) async fn request(args: &Args, folder: &Path) -> Result<LaunchRequest, CommandError> {
    let mut request = options(args, folder)?;
    if args.cloud_init.as_deref() == Some("-") && args.network_config.as_deref() == Some("-") {
        let text = "error: --cloud-init and --network-config can't both be standard input";
        return Err(CommandError::usage(text));
    }
    if let Some(source) = &args.cloud_init {
        request.user_data = Some(Blob(cloud_init::read(source).await?));
    }
    if let Some(source) = &args.network_config {
        request.network_config = Some(Blob(cloud_init::read_network(source).await?));
    }
    if let Some(path) = &args.machine {
        request.machine = Some(machine(path).await?);
    }
    request.timezone = time_zone();
    Ok(request)
}

/// Reads a machine definition; what it says is judged by the daemon.
async fn machine(path: &Path) -> Result<serde_json::Value, CommandError> {
    let owned = path.to_owned();
    let read = tokio::task::spawn_blocking(move || files::read_bounded(&owned, MAX_MACHINE)).await;
    let bytes = read.map_err(|err| Error::internal(err.to_string()))??;
    serde_json::from_slice(&bytes).map_err(|err| {
        let what = format!("{} is not JSON: {err}", path.display());
        Error::new(Code::InvalidArgument, what).into()
    })
}

/// Reads the options; nothing is asked of the daemon that can't work.
fn options(args: &Args, folder: &Path) -> Result<LaunchRequest, CommandError> {
    let name = args.name.as_deref().map(name).transpose()?;
    if let Some(image) = &args.image
        && !image.contains('/')
        && image.matches(':').count() > 1
    {
        return Err(CommandError::usage(
            "Invalid remote and source image name supplied",
        ));
    }
    Ok(LaunchRequest {
        image: args.image.as_deref().map(|image| absolute(image, folder)),
        checksum: args.checksum.as_deref().map(checksum).transpose()?,
        name,
        cpus: args.cpus.as_deref().map(cpus).transpose()?,
        memory: args
            .memory
            .as_deref()
            .map(|text| size("memory", text, MIN_MEMORY))
            .transpose()?,
        disk: args
            .disk
            .as_deref()
            .map(|text| size("disk", text, MIN_DISK))
            .transpose()?,
        networks: networks(args)?,
        timeout: several::timeout(args.timeout.as_deref())?,
        warm: match (args.warm, args.cold) {
            (true, _) => Some(Warm::Require),
            (_, true) => Some(Warm::Never),
            _ => None,
        },
        ..Default::default()
    })
}

pub(crate) fn name(text: &str) -> Result<InstanceName, CommandError> {
    text.parse().map_err(|err: Error| {
        let advice = err.advice.unwrap_or_default();
        CommandError::invalid(err.message).hint(advice)
    })
}

pub(crate) fn cpus(text: &str) -> Result<u32, CommandError> {
    match text.parse::<u32>() {
        Ok(cpus) if cpus > 0 => Ok(cpus),
        _ => Err(CommandError::usage(format!(
            "Error: invalid CPU count '{text}', need a positive integer value."
        ))),
    }
}

pub(crate) fn size(what: &str, text: &str, least: Size) -> Result<Size, CommandError> {
    let size: Size = text
        .parse()
        .map_err(|err: Error| CommandError::usage(err.message))?;
    if size < least {
        let invalid = format!("Invalid {what} size value supplied: {text}.");
        return Err(CommandError::invalid(invalid).hint(format!("The least is {least}.")));
    }
    Ok(size)
}

fn checksum(text: &str) -> Result<Digest, CommandError> {
    text.parse().map_err(|err: Error| {
        let advice = err.advice.unwrap_or_default();
        CommandError::usage(err.message).hint(advice)
    })
}

/// The daemon runs in another folder: a relative file becomes an absolute one.
pub(crate) fn absolute(image: &str, folder: &Path) -> String {
    let file = match image.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => return image.to_owned(),
        Some(path) => folder.join(path),
        None => {
            let path = folder.join(image);
            // Only what looks like a path, so that a file by chance named as an image is no trap. What can only be a path
            // is one even if nothing is there: that is what the daemon then tells.
            let only_a_path = ["/", "./", "../"].iter().any(|p| image.starts_with(p));
            let a_path = image.contains('/') && !image.contains("://") && path.exists();
            if !only_a_path && !a_path {
                return image.to_owned();
            }
            path
        }
    };
    let file = std::path::absolute(&file).unwrap_or(file);
    format!("file://{}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(change: impl FnOnce(&mut Args)) -> Result<LaunchRequest, (u8, String)> {
        let mut args = Args::default();
        change(&mut args);
        options(&args, Path::new("/work")).map_err(|err| (err.kind.exit_code(), err.text("launch")))
    }

    #[test]
    fn nothing_given_leaves_all_to_the_daemon() {
        assert_eq!(read(|_| ()).unwrap(), LaunchRequest::default());
    }

    #[test]
    fn good_values() {
        let request = read(|args| {
            args.cpus = Some("2".into());
            args.memory = Some("512M".into());
            args.disk = Some("1.5G".into());
            args.name = Some("foo-1".into());
            args.timeout = Some("30".into());
        })
        .unwrap();
        assert_eq!(request.cpus, Some(2));
        assert_eq!(request.memory, Some(Size::mib(512)));
        assert_eq!(request.disk, Some(Size::mib(1536)));
        assert_eq!(request.timeout, Some(30));
    }

    #[test]
    fn bad_values_have_the_known_texts_and_exit_codes() {
        for bad in ["0", "-1", "x", "1.5", ""] {
            let (code, text) = read(|args| args.cpus = Some(bad.into())).unwrap_err();
            let known =
                format!("Error: invalid CPU count '{bad}', need a positive integer value.\n");
            assert_eq!((code, text), (1, known));
        }
        let (code, text) = read(|args| args.memory = Some("1CiG".into())).unwrap_err();
        assert_eq!(code, 1);
        assert!(
            text.starts_with("1CiG is not a valid memory size - need"),
            "{text}"
        );
        let (code, text) = read(|args| args.memory = Some("511M".into())).unwrap_err();
        assert_eq!(code, 2);
        assert!(
            text.starts_with(
                "launch failed: Invalid arguments supplied\n\
                 Invalid memory size value supplied: 511M.\n"
            ),
            "{text}"
        );
        let (code, text) = read(|args| args.disk = Some("512M".into())).unwrap_err();
        assert_eq!(code, 2);
        assert!(
            text.contains("Invalid disk size value supplied: 512M."),
            "{text}"
        );
        let (code, text) = read(|args| args.name = Some("1a".into())).unwrap_err();
        assert_eq!(code, 2);
        assert!(
            text.contains("\nInvalid instance name supplied: 1a\n"),
            "{text}"
        );
        assert_eq!(
            read(|args| args.checksum = Some("x".into())).unwrap_err().0,
            1
        );
        assert_eq!(
            read(|args| args.timeout = Some("0".into())).unwrap_err().0,
            1
        );
    }

    #[test]
    fn networks_are_read() {
        for good in [
            "eth0",
            "bridged",
            "name=eth0",
            "name=eth0,mode=manual",
            "mode=auto,name=br0,mac=52:54:00:aB:cd:ef",
        ] {
            assert!(network_spec(good).is_ok(), "{good}");
        }
        let request = read(|args| {
            args.network = vec![
                "mode=manual,name=br0,mac=52:54:00:aB:cd:ef".into(),
                "br1".into(),
            ];
            args.bridged = true;
        });
        let networks = request.unwrap().networks;
        let network = |name: &str| LaunchNetwork {
            name: name.into(),
            mode: NetworkMode::Auto,
            mac: None,
        };
        let manual = LaunchNetwork {
            mode: NetworkMode::Manual,
            mac: Some("52:54:00:aB:cd:ef".into()),
            ..network("br0")
        };
        assert_eq!(networks, [manual, network("br1"), network("bridged")]);
        for bad in [
            "",
            "name=",
            "mode=auto",
            "name=a,mode=x",
            "name=a,mac=52:54",
            "name=a,mac=52:54:00:00:00:0g",
            "name=a,id=b",
            "name=a,",
        ] {
            assert_eq!(network_spec(bad).unwrap_err().exit_code(), 1, "{bad}");
        }
    }

    #[test]
    fn one_colon_at_most() {
        for bad in ["a:b:c", "::", "a::b"] {
            let (code, text) = read(|args| args.image = Some(bad.into())).unwrap_err();
            let known = "Invalid remote and source image name supplied\n";
            assert_eq!((code, text.as_str()), (1, known), "{bad}");
        }
        for good in ["a:b", "https://h:1/a:b", "./a:b:c"] {
            assert!(
                read(|args| args.image = Some(good.into())).is_ok(),
                "{good}"
            );
        }
    }

    #[test]
    fn files_become_absolute_and_names_stay() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.img"), "").unwrap();
        let full = format!("file://{}/a.img", dir.path().display());
        let none = format!("file://{}/none.img", dir.path().display());
        for (image, expected) in [
            ("debian-13", "debian-13"),
            ("build:debian-13", "build:debian-13"),
            ("https://x/y.img", "https://x/y.img"),
            ("file:///x/y", "file:///x/y"),
            ("a.img", "a.img"),
            ("./a.img", full.as_str()),
            ("./none.img", none.as_str()),
            ("none/none", "none/none"),
            ("/none/x.img", "file:///none/x.img"),
            ("file://a.img", full.as_str()),
            (&full["file://".len()..], full.as_str()),
        ] {
            assert_eq!(absolute(image, dir.path()), expected, "{image}");
        }
    }
}
