//! The seed is read back by independent means: an ISO reader, an e-mail parser, a shell.

use super::*;
use hadris_iso::read::IsoImage;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

fn read_back(iso: Vec<u8>) -> BTreeMap<String, Vec<u8>> {
    let image = IsoImage::open(Cursor::new(iso)).unwrap();
    let label = image.read_pvd().unwrap().volume_identifier;
    assert_eq!(label.to_str().trim(), "cidata");
    let mut files = BTreeMap::new();
    for entry in image.root_dir().iter(&image).entries() {
        let entry = entry.unwrap();
        if !entry.is_special() {
            let name = entry.display_name().into_owned();
            files.insert(name, image.read_file(&entry).unwrap());
        }
    }
    files
}

fn spec(keys: &InstanceKeys) -> SeedSpec<'_> {
    SeedSpec {
        instance_id: "i-1",
        hostname: "keen-otter",
        user_data: None,
        network_config: None,
        nics: &[],
        keys,
        timezone: None,
    }
}

#[test]
fn the_image_holds_every_document() {
    let keys = InstanceKeys::generate().unwrap();
    let nics = [
        SeedNic {
            mac: "52:54:00:AB:cd:01".into(),
            optional: false,
        },
        SeedNic {
            mac: "52:54:00:ab:cd:02".into(),
            optional: true,
        },
    ];
    let user = "#cloud-config\n# \u{e4} comment stays\nruncmd: [ls]\n".as_bytes();
    let files = read_back(
        build(&SeedSpec {
            user_data: Some(user),
            network_config: None,
            nics: &nics,
            ..spec(&keys)
        })
        .unwrap(),
    );
    assert_eq!(files["user-data"], user);
    let meta: Value = serde_json::from_slice(&files["meta-data"]).unwrap();
    assert_eq!(meta["instance-id"], "i-1");
    assert_eq!(meta["local-hostname"], "keen-otter");
    assert_eq!(meta["public-keys"][0], keys.client_public_line().unwrap());
    let net: Value = serde_json::from_slice(&files["network-config"]).unwrap();
    assert_eq!(
        net["ethernets"]["eth0"],
        json!({"match": {"macaddress": "52:54:00:ab:cd:01"}, "set-name": "eth0", "dhcp4": true,
               "dhcp-identifier": "mac", "dhcp4-overrides": {"use-hostname": false}})
    );
    assert_eq!(net["ethernets"]["eth1"]["optional"], true);
    assert_eq!(
        net["ethernets"]["eth1"]["dhcp4-overrides"]["route-metric"],
        200
    );
}

#[test]
fn without_cards_cloud_init_chooses() {
    let keys = InstanceKeys::generate().unwrap();
    let files = read_back(build(&spec(&keys)).unwrap());
    assert!(!files.contains_key("network-config"));
    assert_eq!(files["user-data"], b"#cloud-config\n{}\n");
}

#[test]
fn a_seed_of_usual_size_can_replace_another() {
    let keys = InstanceKeys::generate().unwrap();
    let template = build(&SeedSpec::template(&keys)).unwrap();
    assert!(fits_a_clone(&template));
    assert!(!read_back(template).contains_key("network-config"));
    assert_eq!(agent_digest().len(), 64);
}

#[test]
fn a_large_user_data_comes_through() {
    let keys = InstanceKeys::generate().unwrap();
    let mut user = b"#!/bin/sh\n".to_vec();
    user.resize(3 << 20, b'#');
    let iso = build(&SeedSpec {
        user_data: Some(&user),
        ..spec(&keys)
    })
    .unwrap();
    assert!(!fits_a_clone(&iso));
    assert!(read_back(iso)["user-data"] == user);
}

#[test]
fn vendor_data_is_mime_that_python_reads() {
    let keys = InstanceKeys::generate().unwrap();
    let spec = SeedSpec {
        timezone: Some("America/Argentina/Buenos_Aires"),
        ..spec(&keys)
    };
    let script = "import email,json,sys\n\
        m = email.message_from_string(sys.stdin.read())\n\
        json.dump([[p.get_content_type(), p.get_payload(decode=True).decode()] \
        for p in m.walk() if not p.is_multipart()], sys.stdout)";
    let Ok(mut python) = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        eprintln!("SKIPPED: python3 is not installed");
        return;
    };
    let text = vendor_data(&spec).unwrap();
    python
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let parts: Vec<(String, String)> =
        serde_json::from_slice(&python.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(parts[0].0, "text/cloud-boothook");
    assert!(parts[0].1.starts_with("#!/bin/sh\n"));
    assert!(parts[0].1.contains("America/Argentina/Buenos_Aires"));
    assert_eq!(parts[1].0, "text/cloud-config");
    let (head, body) = parts[1].1.split_once('\n').unwrap();
    assert_eq!(head, "#cloud-config");
    let config: Value = serde_json::from_str(body).unwrap();
    assert_eq!(config["users"][0], "default");
    let private = config["ssh_keys"]["ed25519_private"].as_str().unwrap();
    assert!(private.ends_with("-----END OPENSSH PRIVATE KEY-----\n"));
}

/// Runs the boot hook with other folders and without systemd, and looks at what it left.
#[test]
fn the_boot_hook_installs_what_it_carries() {
    let keys = InstanceKeys::generate().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_str().unwrap();
    // The agent of this test only says that it was started.
    let hook = boothook(&spec(&keys))
        .unwrap()
        .replace(AGENT_PY.trim_end(), "open(__file__ + '.ran', 'w')")
        .replace(CLONE_PY.trim_end(), "")
        .replace("/usr/local/lib/pileus", &format!("{root}/lib"))
        .replace("/etc/pileus", &format!("{root}/etc"))
        .replace("/run/systemd/system", &format!("{root}/no-systemd"))
        .replace("/run/pileus-agent.pid", &format!("{root}/pid"));
    for _ in 0..2 {
        let status = Command::new("sh").args(["-c", &hook]).status().unwrap();
        assert!(status.success());
    }
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(
        read("etc/ssh_host_ed25519_key"),
        keys.host_private_text().unwrap()
    );
    assert_eq!(
        read("etc/authorized_keys").trim(),
        keys.client_public_line().unwrap()
    );
    let settings: Value = serde_json::from_str(&read("etc/agent.json")).unwrap();
    assert_eq!(settings["instance"], "i-1");
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        let meta = std::fs::metadata(dir.path().join(name)).unwrap();
        meta.permissions().mode() & 0o777
    };
    assert_eq!(mode("etc/ssh_host_ed25519_key"), 0o600);
    assert_eq!(mode("etc/authorized_keys"), 0o644);
    assert!(!dir.path().join("etc/before").exists());
    // On a copy of the disk: whose it was is kept beside, and stays when that boots again.
    let other = hook.replace("i-1\"", "i-2\"");
    for _ in 0..2 {
        let status = Command::new("sh").args(["-c", &other]).status().unwrap();
        assert!(status.success());
    }
    let now: Value = serde_json::from_str(&read("etc/agent.json")).unwrap();
    assert_eq!(now["instance"], "i-2");
    let was: Value = serde_json::from_str(&read("etc/before/agent.json")).unwrap();
    assert_eq!(was["instance"], "i-1");
    assert_eq!(mode("etc/before/ssh_host_ed25519_key"), 0o600);
    let ran = dir.path().join("lib/agent.py.ran");
    for _ in 0..100 {
        if ran.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("the agent was not started");
}

#[test]
fn bad_values_are_refused() {
    let keys = InstanceKeys::generate().unwrap();
    for zone in ["", "../etc/passwd", "Europe/", "a b", "x\ny"] {
        let err = build(&SeedSpec {
            timezone: Some(zone),
            ..spec(&keys)
        })
        .unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument, "{zone:?}");
    }
    for mac in ["", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456"] {
        let nics = [SeedNic {
            mac: mac.into(),
            optional: false,
        }];
        let err = build(&SeedSpec {
            network_config: None,
            nics: &nics,
            ..spec(&keys)
        })
        .unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument, "{mac:?}");
    }
}

/// The image as the usual tools see it.
#[test]
fn blkid_and_isoinfo_agree() {
    let keys = InstanceKeys::generate().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.iso");
    std::fs::write(&path, build(&spec(&keys)).unwrap()).unwrap();
    let run = |program: &str, args: &[&str]| -> Option<String> {
        let out = Command::new(program).args(args).arg(&path).output().ok()?;
        Some(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    match run("blkid", &["-p", "-o", "export"]) {
        Some(out) => assert!(out.contains("LABEL=cidata"), "{out}"),
        None => eprintln!("SKIPPED: blkid is not installed"),
    }
    match run("isoinfo", &["-f", "-J", "-i"]) {
        Some(out) => assert!(out.contains("/vendor-data"), "{out}"),
        None => eprintln!("SKIPPED: isoinfo is not installed"),
    }
}
