//! The seed disk: a small ISO image labelled `cidata` from which cloud-init's NoCloud source reads who
//! this machine is. It holds the user's text untouched as user-data; all that is ours (the agent, the
//! keys, defaults) travels as vendor-data, so that the user's text stays the last word.
//!
//! The agent comes as a `cloud-boothook` part, not as `write_files` and `runcmd`: those lists would be
//! replaced by the user's own. The image holds private keys; the caller keeps it 0600.
//!
//! Next: QEMU attaches the image (`instances/src/qemu/`), `agent/` wakes up in the guest.

use std::fs::OpenOptions;
use std::io::Cursor;
use std::path::Path;

use hadris_iso::joliet::JolietLevel;
use hadris_iso::read::PathSeparator;
use hadris_iso::write::options::{CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{InputEntry, InputTree, IsoImageWriter};
use pileus_base::{Code, Error, Result, ResultExt};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::LOGIN_USER;
use super::keys::InstanceKeys;

/// The agent as it is put in every guest: its files made one.
pub const AGENT_PY: &str = concat!(
    include_str!("agent/channel.py"),
    include_str!("agent/reports.py"),
    include_str!("agent/cloud.py"),
    include_str!("agent/ssh.py"),
    include_str!("agent/life.py"),
    include_str!("agent/loop.py"),
);
/// What only templates and clones need of it; the agent loads it when it is first asked for it.
pub const CLONE_PY: &str = concat!(
    include_str!("agent/quiesce.py"),
    include_str!("agent/identify.py"),
    include_str!("agent/booted.py"),
    include_str!("agent/identity.py"),
);
/// cloud-init's stages for a clone, in a process of their own.
const STAGES_PY: &str = include_str!("agent/stages.py");
const BOOTHOOK: &str = include_str!("boothook.sh");
/// Every seed has this size, so that a clone's can take the place of its template's under a running
/// guest. A larger one ([`fits_a_clone`]) can only be booted with.
pub const SEED_SIZE: usize = 1 << 20;
/// The instance-id and the host name of every template; no instance has them.
pub const TEMPLATE_INSTANCE: &str = "pileus-template-instance";
pub const TEMPLATE_HOSTNAME: &str = "pileus-template";
const BOUNDARY: &str = "=-pileus-part-=";

/// A network card as cloud-init shall set it up: by its MAC address, with DHCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedNic {
    /// Six hexadecimal pairs with colons.
    pub mac: String,
    /// The boot does not wait for this card's address. Packages and `#include` of user data may then
    /// come too early; for the first card leave it false.
    pub optional: bool,
}

/// What a seed disk says.
#[derive(Debug, Clone)]
pub struct SeedSpec<'a> {
    /// A new one makes cloud-init treat the machine as new.
    pub instance_id: &'a str,
    pub hostname: &'a str,
    /// Checked text of the user ([`super::cloud_init::check`]).
    pub user_data: Option<&'a [u8]>,
    /// Checked network configuration of the user, instead of one for the cards
    /// ([`super::cloud_init::check_network`]).
    pub network_config: Option<&'a [u8]>,
    /// The cards that are there at boot, the default one first; empty leaves it to cloud-init.
    pub nics: &'a [SeedNic],
    pub keys: &'a InstanceKeys,
    /// IANA name, `Europe/Berlin`.
    pub timezone: Option<&'a str>,
}

impl<'a> SeedSpec<'a> {
    /// For a template: no card, no user data, and keys that are thrown away with it.
    pub fn template(keys: &'a InstanceKeys) -> Self {
        Self {
            instance_id: TEMPLATE_INSTANCE,
            hostname: TEMPLATE_HOSTNAME,
            user_data: None,
            network_config: None,
            nics: &[],
            keys,
            timezone: None,
        }
    }
}

/// SHA-256 in hexadecimal of all that a seed brings into a guest beside what is the instance's own.
/// A template made with another one is of no use.
pub fn agent_digest() -> String {
    let mut hash = Sha256::new();
    for text in [AGENT_PY, CLONE_PY, STAGES_PY, BOOTHOOK] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether a seed can take the place of a template's.
pub fn fits_a_clone(seed: &[u8]) -> bool {
    seed.len() == SEED_SIZE
}

/// Builds the image, of [`SEED_SIZE`] or larger if the user data needs it.
pub fn build(spec: &SeedSpec<'_>) -> Result<Vec<u8>> {
    let user_data = spec.user_data.unwrap_or(b"#cloud-config\n{}\n");
    let mut entries = vec![
        InputEntry::file("user-data", user_data),
        InputEntry::file("meta-data", meta_data(spec)?),
        InputEntry::file("vendor-data", vendor_data(spec)?),
    ];
    if let Some(own) = spec.network_config {
        entries.push(InputEntry::file("network-config", own.to_vec()));
    } else if !spec.nics.is_empty() {
        entries.push(InputEntry::file("network-config", network_config(spec)?));
    }
    write_iso(entries)
}

/// Exchanges the content of a seed that a running guest has as its disk. Blocking.
pub fn overwrite(path: &Path, seed: &[u8]) -> Result<()> {
    use std::io::Write;
    let what = || format!("Writing {}", path.display());
    let mut file = OpenOptions::new().write(true).open(path).io(what())?;
    let length = file.metadata().io(what())?.len();
    if length != seed.len() as u64 {
        return Err(Error::new(
            Code::NoTemplate,
            "The user data is too large for a guest that runs already",
        ));
    }
    file.write_all(seed).io(what())?;
    file.sync_all().io(what())
}

/// The one place that knows the ISO library.
fn write_iso(entries: Vec<InputEntry>) -> Result<Vec<u8>> {
    let options = IsoFormatOptions {
        volume_name: "cidata".into(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: 2048,
        path_separator: PathSeparator::ForwardSlash,
        strict_charset: false,
        features: CreationFeatures {
            joliet: Some(JolietLevel::Level3),
            ..CreationFeatures::rock_ridge()
        },
    };
    let tree = InputTree::new(PathSeparator::ForwardSlash, entries);
    let mut image = IsoImageWriter::create(Cursor::new(Vec::new()), tree, options)
        .map(Cursor::into_inner)
        .map_err(|err| Error::internal(format!("The seed disk can't be written: {err}")))?;
    if image.len() < SEED_SIZE {
        image.resize(SEED_SIZE, 0);
    }
    Ok(image)
}

fn meta_data(spec: &SeedSpec<'_>) -> Result<String> {
    json_text(&json!({
        "instance-id": spec.instance_id,
        "local-hostname": spec.hostname,
        "public-keys": [spec.keys.client_public_line()?],
    }))
}

fn network_config(spec: &SeedSpec<'_>) -> Result<String> {
    let mut ethernets = Map::new();
    for (index, nic) in spec.nics.iter().enumerate() {
        check_mac(&nic.mac)?;
        let name = format!("eth{index}");
        let mut card = json!({
            "match": { "macaddress": nic.mac.to_ascii_lowercase() },
            "set-name": name,
            "dhcp4": true,
            // By MAC: clones have the same machine-id until they are given their own.
            "dhcp-identifier": "mac",
        });
        // The name is in the meta-data already; asking hostnamed to set it again costs its start.
        let mut overrides = json!({ "use-hostname": false });
        if nic.optional {
            card["optional"] = true.into();
        }
        if index > 0 {
            overrides["route-metric"] = 200.into();
        }
        card["dhcp4-overrides"] = overrides;
        ethernets.insert(name, card);
    }
    json_text(&json!({ "version": 2, "ethernets": ethernets }))
}

/// The defaults under the user's text. `#cloud-config` and JSON: every JSON text is YAML, and no
/// string can be taken for something else.
fn vendor_config(spec: &SeedSpec<'_>) -> Result<String> {
    let client = spec.keys.client_public_line()?;
    let config = json!({
        "users": ["default"],
        "system_info": { "default_user": { "name": LOGIN_USER } },
        "ssh_authorized_keys": [client],
        // One known key instead of three new ones: the host can pin it, and the boot is shorter.
        "ssh_keys": {
            "ed25519_private": spec.keys.host_private_text()?,
            "ed25519_public": spec.keys.host_public_line()?,
        },
        "manage_etc_hosts": true,
        "growpart": { "mode": "auto", "devices": ["/"], "ignore_growroot_disabled": false },
        "resize_rootfs": true,
        // Only prints keys to the console, at the price of several processes.
        "no_ssh_fingerprints": true,
        "ssh": { "emit_keys_to_console": false },
    });
    Ok(format!("#cloud-config\n{}", json_text(&config)?))
}

/// The script that installs the agent with the instance's own keys.
fn boothook(spec: &SeedSpec<'_>) -> Result<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if !spec.instance_id.bytes().all(plain) {
        return Err(Error::internal("An instance's id that is none"));
    }
    let mut settings = json!({
        "user": LOGIN_USER,
        "uid": 1000,
        "instance": spec.instance_id,
    });
    if let Some(zone) = spec.timezone {
        check_timezone(zone)?;
        settings["timezone"] = zone.into();
    }
    // Only then somebody else may take its id.
    let login = match spec.user_data {
        Some(_) => LOGIN_USER,
        None => "",
    };
    let mut extra = Vec::new();
    if spec.network_config.is_none() {
        for nic in spec.nics.iter().skip(1) {
            check_mac(&nic.mac)?;
            extra.push(nic.mac.as_str());
        }
    }
    let extra = extra.join(" ");
    let mut script = BOOTHOOK.to_owned();
    for (mark, text) in [
        ("@LOGIN@", login),
        ("@EXTRA@", &extra),
        ("@INSTANCE@", spec.instance_id),
        ("@AGENT@", AGENT_PY),
        ("@CLONE@", CLONE_PY),
        ("@STAGES@", STAGES_PY),
        ("@SETTINGS@", &json_text(&settings)?),
        ("@HOST_KEY@", &spec.keys.host_private_text()?),
        ("@AUTHORIZED@", &spec.keys.client_public_line()?),
    ] {
        let text = text.trim_end();
        if text.lines().any(|line| line == "END-OF-PILEUS-FILE") {
            return Err(Error::internal("A file of the seed holds its own end mark"));
        }
        script = script.replacen(mark, text, 1);
    }
    Ok(script)
}

fn vendor_data(spec: &SeedSpec<'_>) -> Result<String> {
    let parts = [
        ("text/cloud-boothook", "pileus-agent", boothook(spec)?),
        ("text/cloud-config", "pileus-defaults", vendor_config(spec)?),
    ];
    let mut text =
        format!("Content-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\nMIME-Version: 1.0\n\n");
    for (kind, name, body) in parts {
        text += &format!(
            "--{BOUNDARY}\nContent-Type: {kind}; charset=\"us-ascii\"\nMIME-Version: 1.0\n\
             Content-Transfer-Encoding: 7bit\n\
             Content-Disposition: attachment; filename=\"{name}\"\n\n{body}\n"
        );
    }
    text += &format!("--{BOUNDARY}--\n");
    if !text.is_ascii() {
        return Err(Error::internal("The vendor data must be ASCII"));
    }
    Ok(text)
}

/// JSON in one line, everything beyond ASCII escaped.
fn json_text(value: &Value) -> Result<String> {
    let text = serde_json::to_string(value)
        .map_err(|err| Error::internal(format!("The seed can't be written: {err}")))?;
    let mut ascii = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                ascii += &format!("\\u{unit:04x}");
            }
        }
    }
    ascii.push('\n');
    Ok(ascii)
}

fn check_mac(mac: &str) -> Result<()> {
    let pairs: Vec<&str> = mac.split(':').collect();
    let ok = pairs.len() == 6
        && pairs
            .iter()
            .all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
    if ok {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidArgument,
        format!("{mac} is not a MAC address"),
    ))
}

fn check_timezone(zone: &str) -> Result<()> {
    let part = |p: &str| {
        !p.is_empty()
            && p.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_+-".contains(&b))
    };
    if zone.len() <= 64 && zone.split('/').all(part) {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidArgument,
        format!("{zone} is not the name of a time zone"),
    )
    .advise("Give an IANA name such as Europe/Berlin."))
}

#[cfg(test)]
#[path = "seed_tests.rs"]
mod tests;
