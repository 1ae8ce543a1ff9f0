//! Which user data can be done by cloud-init on a clone that runs already, and which needs a boot. Only
//! what is known to end the same way is let through: a launch that boots cold without need is slower, one
//! that runs warm without right is wrong.
//!
//! What differs on a clone: the disks are mounted, the services of the early boot run, the default user
//! and `/etc/hosts` are there as the template's boot made them. Next: `agent/stages.py` runs the stages.

use serde_json::{Map, Value};

use super::{Kind, header, is_mime, kind_of, parameter, split_head, unpack};
use crate::guest::LOGIN_USER;

/// Keys of cloud-config whose modules do the same on a running guest as in a boot.
const WARM_KEYS: &[&str] = &[
    "allow_public_ssh_keys",
    "ansible",
    "apt",
    "apt_pipelining",
    "byobu_by_default",
    "ca_certs",
    "ca-certs",
    "chpasswd",
    "disable_root",
    "disable_root_opts",
    "final_message",
    "fqdn",
    "groups",
    "hostname",
    "keyboard",
    "locale",
    "locale_configfile",
    "merge_how",
    "merge_type",
    "no_ssh_fingerprints",
    "ntp",
    "package_update",
    "package_upgrade",
    "packages",
    "password",
    "phone_home",
    "prefer_fqdn_over_hostname",
    "random_seed",
    "runcmd",
    "snap",
    "ssh",
    "ssh_authorized_keys",
    "ssh_fp_console_blacklist",
    "ssh_import_id",
    "ssh_key_console_blacklist",
    "ssh_publish_hostkeys",
    "ssh_pwauth",
    "ssh_quiet_keygen",
    "timezone",
    "users",
    "write_files",
    "yum_repos",
];

/// Files that a boot reads after cloud-init has written them, and a running guest does not read again.
const BOOT_FILES: &[&str] = &[
    "/boot",
    "/efi",
    "/etc/cloud",
    "/etc/dbus-1",
    "/etc/default",
    "/etc/fstab",
    "/etc/host",
    "/etc/init.d",
    "/etc/machine-",
    "/etc/modprobe.d",
    "/etc/modules",
    "/etc/netplan",
    "/etc/network",
    "/etc/NetworkManager",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/pileus",
    "/etc/rc",
    "/etc/resolv.conf",
    "/etc/shadow",
    "/etc/sysctl",
    "/etc/systemd",
    "/etc/tmpfiles.d",
    "/etc/udev",
    "/lib",
    "/run",
    "/usr/lib",
    "/usr/local/lib/pileus",
    "/usr/local/lib/systemd",
    "/var/lib/cloud",
];
const UNITS: &str = "/etc/systemd/system/";

/// Why this user data (as it is put on the seed) can't be done on a running clone, in one phrase that
/// names the key or part; `None` if it can.
pub fn warm_obstacle(bytes: &[u8]) -> Option<String> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return match unpack(bytes) {
            Ok(plain) => text_obstacle(&plain),
            Err(_) => Some("data that can't be unpacked".into()),
        };
    }
    text_obstacle(bytes)
}

fn text_obstacle(bytes: &[u8]) -> Option<String> {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Some("text that is not UTF-8".into());
    };
    if is_mime(bytes) {
        return mime_obstacle(text);
    }
    by_start(text)
}

/// By its first line, as cloud-init takes it.
fn by_start(text: &str) -> Option<String> {
    match kind_of(text) {
        Some(kind) => kind_obstacle(kind, text),
        None if text.trim().is_empty() => None,
        None => Some("text of an unknown kind".into()),
    }
}

fn kind_obstacle(kind: Kind, text: &str) -> Option<String> {
    let what = match kind {
        Kind::CloudConfig => return config_obstacle(text),
        Kind::Script | Kind::Empty => return None,
        Kind::CloudConfigArchive => "a #cloud-config-archive",
        Kind::JsonPatch => "a #cloud-config-jsonp",
        Kind::Include => "#include, whose content is not known before",
        Kind::Boothook => "#cloud-boothook",
        Kind::PartHandler => "#part-handler",
        Kind::Jinja => "a jinja template",
        Kind::Mime => "a MIME message in another text",
    };
    Some(what.into())
}

fn config_obstacle(text: &str) -> Option<String> {
    let mut options = serde_saphyr::Options::default();
    options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::LastWins;
    options.with_snippet = false;
    let parsed = serde_saphyr::from_str_with_options::<Option<Map<String, Value>>>(text, options);
    let Ok(config) = parsed else {
        return Some("YAML of an unusual form".into());
    };
    let config = config.unwrap_or_default();
    for (key, value) in &config {
        let obstacle = match key.as_str() {
            "users" => users_obstacle(value),
            "write_files" => files_obstacle(value),
            key if WARM_KEYS.contains(&key) => None,
            _ => Some(super::super::wire::clean(key)),
        };
        if obstacle.is_some() {
            return obstacle;
        }
    }
    None
}

/// The template has made the default user, so a list without it comes too late.
fn users_obstacle(users: &Value) -> Option<String> {
    let Some(list) = users.as_array() else {
        return Some("users that are not a list".into());
    };
    let mut default = false;
    for user in list {
        let name = match user {
            Value::String(name) => Some(name.as_str()),
            Value::Object(user) => user.get("name").and_then(Value::as_str),
            _ => None,
        };
        match name {
            Some("default") if user.is_string() => default = true,
            Some(LOGIN_USER) => return Some(format!("users: {LOGIN_USER} is there already")),
            Some(_) => {}
            None => return Some("users of an unusual form".into()),
        }
    }
    (!default).then(|| "users without default".into())
}

fn files_obstacle(files: &Value) -> Option<String> {
    let Some(list) = files.as_array() else {
        return Some("write_files that is not a list".into());
    };
    for file in list {
        let Some(path) = file.get("path").and_then(Value::as_str) else {
            return Some("write_files without a path".into());
        };
        // A new unit is found when it is first asked for; a drop-in of a running one is not.
        let unit = path
            .strip_prefix(UNITS)
            .is_some_and(|name| !name.contains('/'));
        let odd = path.contains("..") || path.contains("//") || !path.starts_with('/');
        if odd || !unit && BOOT_FILES.iter().any(|start| path.starts_with(start)) {
            let path: String = super::super::wire::clean(path).chars().take(80).collect();
            return Some(format!("write_files: {path}"));
        }
    }
    None
}

fn mime_obstacle(text: &str) -> Option<String> {
    let unclear = || Some("a MIME message of an unusual form".to_owned());
    let Ok((head, body, _)) = split_head(text, 1) else {
        return unclear();
    };
    let kind = header(&head, "content-type").unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("multipart/") {
        return part_obstacle(&head, body);
    }
    let Some(boundary) = parameter(&kind, "boundary").filter(|b| !b.is_empty()) else {
        return unclear();
    };
    let mark = format!("--{boundary}");
    let mut start = None;
    let mut at = 0;
    for line in body.split_inclusive('\n') {
        let next = at + line.len();
        let plain = line.trim_end();
        let last = plain.strip_prefix(&mark).is_some_and(|rest| rest == "--");
        if plain == mark || last {
            if let Some(from) = start.take() {
                let Ok((head, content, _)) = split_head(&body[from..at], 1) else {
                    return unclear();
                };
                let obstacle = part_obstacle(&head, content);
                if obstacle.is_some() {
                    return obstacle;
                }
            }
            if last {
                return None;
            }
            start = Some(next);
        }
        at = next;
    }
    unclear()
}

fn part_obstacle(head: &super::Head, body: &str) -> Option<String> {
    let encoding = header(head, "content-transfer-encoding").unwrap_or_default();
    if !["", "7bit", "8bit", "binary"].contains(&encoding.to_ascii_lowercase().as_str()) {
        return Some("an encoded MIME part".into());
    }
    let kind = header(head, "content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    match kind.to_ascii_lowercase().as_str() {
        "text/cloud-config" => match kind_of(body) {
            None | Some(Kind::CloudConfig) => config_obstacle(body),
            Some(kind) => kind_obstacle(kind, body),
        },
        "text/x-shellscript" => match kind_of(body) {
            Some(Kind::Script) => None,
            _ => Some("a script part without #!".into()),
        },
        "" | "text/plain" => by_start(body),
        "text/cloud-boothook" => Some("a part text/cloud-boothook".into()),
        other => Some(format!("a part {}", super::super::wire::clean(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn obstacle(text: &str) -> Option<String> {
        warm_obstacle(text.as_bytes())
    }

    #[test]
    fn what_runs_late_as_well_is_let_through() {
        for text in [
            "",
            "#!/bin/sh\necho hi\n",
            "#cloud-config\n{}\n",
            "#cloud-config\n# nothing\n",
            "#cloud-config\nusers: [default, {name: bob}]\nruncmd: [[ls]]\npackages: [jq]\n",
            "#cloud-config\nwrite_files:\n- {path: /etc/motd, content: x}\n\
             - {path: /etc/systemd/system/x.service, content: y}\n",
            "Content-Type: multipart/mixed; boundary=\"b\"\nMIME-Version: 1.0\n\n--b\n\
             Content-Type: text/x-shellscript\n\n#!/bin/sh\nls\n--b\n\
             Content-Type: text/cloud-config\n\nruncmd: [ls]\n--b--\n",
        ] {
            assert_eq!(obstacle(text), None, "{text}");
        }
    }

    #[test]
    fn what_needs_a_boot_is_named() {
        for (text, word) in [
            ("#cloud-config\nbootcmd: [ls]\n", "bootcmd"),
            ("#cloud-config\ndisk_setup: {}\n", "disk_setup"),
            ("#cloud-config\nmounts: []\n", "mounts"),
            ("#cloud-config\nswap: {size: 1G}\n", "swap"),
            ("#cloud-config\ngrowpart: {mode: 'off'}\n", "growpart"),
            (
                "#cloud-config\npower_state: {mode: poweroff}\n",
                "power_state",
            ),
            (
                "#cloud-config\nmanage_etc_hosts: false\n",
                "manage_etc_hosts",
            ),
            (
                "#cloud-config\npreserve_hostname: true\n",
                "preserve_hostname",
            ),
            ("#cloud-config\nssh_keys: {}\n", "ssh_keys"),
            ("#cloud-config\nusers: [{name: bob}]\n", "default"),
            (
                "#cloud-config\nusers: [default, {name: ubuntu}]\n",
                "ubuntu",
            ),
            ("#cloud-config\n1: x\nfuture: y\n", "1"),
            (
                "#cloud-config\nwrite_files: [{path: /etc/systemd/logind.conf.d/a.conf}]\n",
                "logind",
            ),
            (
                "#cloud-config\nwrite_files: [{path: /etc/../etc/fstab}]\n",
                "fstab",
            ),
            ("#cloud-boothook\nls\n", "boothook"),
            ("#include\nhttps://x/\n", "#include"),
            ("#part-handler\n", "part-handler"),
            ("## template: jinja\n#cloud-config\n{}\n", "jinja"),
            ("#cloud-config-archive\n[]\n", "archive"),
            (
                "Content-Type: multipart/mixed; boundary=b\nMIME-Version: 1.0\n\n--b\n\
                 Content-Type: text/cloud-boothook\n\n#!/bin/sh\n--b--\n",
                "boothook",
            ),
            (
                "Content-Type: multipart/mixed; boundary=b\nMIME-Version: 1.0\n\n--b\n\
                 Content-Type: text/cloud-config\nContent-Transfer-Encoding: base64\n\nYQ==\n--b--\n",
                "encoded",
            ),
        ] {
            let told = obstacle(text);
            assert!(
                told.as_deref().is_some_and(|t| t.contains(word)),
                "{text}: {told:?}"
            );
        }
    }
}
