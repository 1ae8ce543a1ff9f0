//! What a launch is asked for, and everything that can be wrong with it without looking at the host.

use std::os::fd::AsRawFd;

use pileus_api::LaunchRequest;
use pileus_base::{Code, Error, InstanceName, Result, Size};
use pileus_images::ImageRef;
use pileus_images::packed::Machine;
use pileus_images::packed::machine::Parsed;
use pileus_instances::guest::cloud_init;

use super::Mode;
use super::given::Given;
use crate::http::listener::Peer;

pub(super) const MIN_MEMORY: Size = Size::mib(512);
const MIN_DISK: Size = Size::gib(1);
pub(super) const DEFAULT_MEMORY: Size = Size::gib(1);
pub(super) const DEFAULT_DISK: Size = Size::gib(5);
/// The name that every host set-up can launch.
const DEFAULT_IMAGE: &str = "default";
/// More than any machine has; a typing mistake is more likely.
pub(super) const MAX_CPUS: u32 = 255;

/// An image and a shape, checked.
pub(super) struct Wanted {
    /// What is noted and shown of it: without what is secret in a URL.
    pub source: String,
    pub image: ImageRef,
    pub cpus: Option<u32>,
    pub memory: Option<Size>,
    /// Hardware that goes before what the image's machine.json says, and what is to be told of it.
    pub machine: Option<Parsed>,
    /// Keeps the image's file open until it is in the store.
    pub file: Option<std::fs::File>,
}

/// A request that was checked.
pub(super) struct Order {
    pub wanted: Wanted,
    pub name: Option<InstanceName>,
    pub disk: Option<Size>,
    pub given: Given,
    pub request: LaunchRequest,
}

impl Wanted {
    /// Opens the image's file with the caller's rights: from here on it is the very file that the
    /// caller may read, whatever its name leads to later.
    pub(super) fn open_as(&mut self, mode: &Mode, peer: Peer) -> Result<()> {
        if let ImageRef::File(path) = &self.image
            && let Some(file) = super::images::open_as(mode, peer, path)?
        {
            self.image = ImageRef::File(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
            self.file = Some(file);
        }
        Ok(())
    }
}

/// The disk that a guest gets if nobody says.
pub(super) fn default_disk(image_size: Size) -> Size {
    DEFAULT_DISK.max(image_size)
}

/// What can be wrong with an image's name and a shape.
pub(super) fn check_shape(
    image: Option<String>,
    cpus: Option<u32>,
    memory: Option<Size>,
) -> Result<Wanted> {
    let image: ImageRef = image
        .filter(|image| !image.is_empty())
        .unwrap_or_else(|| DEFAULT_IMAGE.to_owned())
        .parse()?;
    if let Some(cpus) = cpus.filter(|cpus| !(1..=MAX_CPUS).contains(cpus)) {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{cpus} is no possible number of CPUs"),
        )
        .advise(format!("Give a number from 1 to {MAX_CPUS}.")));
    }
    if let Some(memory) = memory {
        at_least("memory", memory, MIN_MEMORY)?;
    }
    Ok(Wanted {
        source: image.shown(),
        image,
        cpus,
        // QEMU wants whole mebibytes.
        memory: memory.map(|memory| memory.round_up(1 << 20)),
        machine: None,
        file: None,
    })
}

/// Everything that can be wrong with a request without looking at the host.
pub(super) fn check(mut request: LaunchRequest) -> Result<Order> {
    let mut wanted = check_shape(request.image.clone(), request.cpus, request.memory)?;
    wanted.machine = request.machine.take().as_ref().map(machine).transpose()?;
    if let Some(disk) = request.disk {
        at_least("disk", disk, MIN_DISK)?;
    }
    if request.disk_in_memory && request.lease.is_none() {
        return Err(Error::new(
            Code::InvalidArgument,
            "A disk in memory is only for throw-away instances",
        )
        .advise("Give the launch a lease, or use `pileus run --tmpfs`."));
    }
    if let Some(zone) = &request.timezone {
        let ok = zone.len() <= 64
            && !zone.starts_with('/')
            && !zone.contains("..")
            && zone
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b));
        if !ok {
            return Err(Error::new(
                Code::InvalidArgument,
                format!("{zone:?} is no time zone's name"),
            ));
        }
    }
    let user_data = match request.user_data.take() {
        Some(data) => Some(cloud_init::check(data.0)?.bytes),
        None => None,
    };
    let network_config = match request.network_config.take() {
        Some(data) => Some(cloud_init::check_network(data.0)?),
        None => None,
    };
    Ok(Order {
        wanted,
        name: request.name.clone(),
        // A disk has whole sectors.
        disk: request.disk.map(|disk| disk.round_up(512)),
        given: Given {
            user_data,
            network_config,
        },
        request,
    })
}

/// A machine definition in a request.
fn machine(value: &serde_json::Value) -> Result<Parsed> {
    Machine::parse(value.to_string().as_bytes()).map_err(|err| {
        let mut refused = Error::new(Code::InvalidArgument, "Invalid machine definition");
        refused.details.clone_from(&err.details);
        refused.with_source(err)
    })
}

fn at_least(what: &str, size: Size, least: Size) -> Result<()> {
    if size >= least {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidSize,
        format!("Invalid {what} size value supplied: {size}."),
    )
    .advise(format!("It must be at least {least}.")))
}

/// A random name that nobody has.
pub(super) fn free_name(taken: &[String]) -> Result<InstanceName> {
    for words in [2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3] {
        if let Some(name) = petname::petname(words, "-")
            && !taken.iter().any(|t| t.eq_ignore_ascii_case(&name))
            && let Ok(name) = name.parse()
        {
            return Ok(name);
        }
    }
    Err(Error::internal("No free random name was found").advise("Give a name with --name."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(request: LaunchRequest) -> Option<Code> {
        check(request).err().map(|err| err.code)
    }

    #[test]
    fn requests_that_can_not_work_are_told_at_once() {
        assert_eq!(code(LaunchRequest::default()), None);
        for (request, expected) in [
            (
                LaunchRequest {
                    cpus: Some(0),
                    ..Default::default()
                },
                Code::InvalidArgument,
            ),
            (
                LaunchRequest {
                    memory: Some(Size::mib(511)),
                    ..Default::default()
                },
                Code::InvalidSize,
            ),
            (
                LaunchRequest {
                    disk: Some(Size::mib(1023)),
                    ..Default::default()
                },
                Code::InvalidSize,
            ),
            (
                LaunchRequest {
                    image: Some("ftp://x/y".into()),
                    ..Default::default()
                },
                Code::InvalidArgument,
            ),
            (
                LaunchRequest {
                    timezone: Some("../../etc/passwd".into()),
                    ..Default::default()
                },
                Code::InvalidArgument,
            ),
            (
                LaunchRequest {
                    network_config: Some(pileus_api::Blob(b"ethernets: {}".to_vec())),
                    ..Default::default()
                },
                Code::InvalidCloudInit,
            ),
            (
                LaunchRequest {
                    machine: Some(serde_json::json!({"version": 1, "network": "ne2k"})),
                    ..Default::default()
                },
                Code::InvalidArgument,
            ),
            (
                LaunchRequest {
                    user_data: Some(pileus_api::Blob(b"a: [".to_vec())),
                    ..Default::default()
                },
                Code::InvalidCloudInit,
            ),
        ] {
            assert_eq!(code(request.clone()), Some(expected), "{request:?}");
        }
    }

    #[test]
    fn random_names_avoid_those_that_are_taken() {
        let mut taken = Vec::new();
        for _ in 0..200 {
            let name = free_name(&taken).unwrap().to_string();
            assert!(!taken.contains(&name));
            taken.push(name);
        }
    }
}
