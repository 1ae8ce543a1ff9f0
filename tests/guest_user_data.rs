//! User data for cloud-init in all the forms that people have it in, given to `multipass launch`.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use pileus_testkit::{Daemon, GUEST_IMAGE, Namespace, Options, need, wait_until};

use crate::multipass::{Multipass, NEEDS};

/// A server in the world outside, until it is dropped: beyond the uplink, because guests reach no server of
/// their host.
struct Server {
    process: Child,
    _world: Namespace,
}

impl Server {
    fn start(multipass: &Multipass) -> Self {
        let world = Namespace::new();
        let process = world
            .command("python3")
            .args(["-m", "http.server", "8000", "--directory"])
            .arg(multipass.folder.join("www"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = process.id().to_string();
        wait_until("the server is in its world", 20, || {
            world.pids().contains(&pid).then_some(())
        });
        let near = |line: &str| ip(multipass.daemon.namespace(), line);
        near(&format!("link set far netns {pid}"));
        ip(
            &world,
            &format!("address add {}/24 dev far", Namespace::OUTSIDE),
        );
        ip(&world, "link set far up");
        let probe = format!(
            "import socket; socket.create_connection(('{}', 8000), 1)",
            Namespace::OUTSIDE
        );
        wait_until("the server listens", 20, || {
            let mut python = multipass.daemon.inside(Path::new("python3"));
            let out = python.args(["-c", &probe]).output().unwrap();
            out.status.success().then_some(())
        });
        Self {
            process,
            _world: world,
        }
    }
}

fn ip(place: &Namespace, line: &str) {
    let mut command = place.command("ip");
    assert!(
        command.args(line.split(' ')).status().unwrap().success(),
        "ip {line}"
    );
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const MIME: &str = "Content-Type: multipart/mixed; boundary=\"B\"\nMIME-Version: 1.0\n\n\
                    --B\nContent-Type: text/x-shellscript\n\n#!/bin/sh\necho made > /root/made\n\
                    --B\nContent-Type: text/cloud-config\n\nruncmd:\n  - [touch, /root/too]\n--B--\n";

/// User data in all the forms that people have it in.
#[test]
fn guest_user_data() {
    if !need(&NEEDS) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    let multipass = Multipass::new(&daemon);
    let url = format!("http://{}:8000", Namespace::OUTSIDE);
    let made = "runcmd:\n  - echo made > /root/made\n";
    multipass.file("www/part.yaml", format!("#cloud-config\n{made}"));
    let _server = Server::start(&multipass);
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ user@example";
    let forms: [(&str, String, &str); 8] = [
        ("no-header", made.to_owned(), ""),
        ("dashes", format!("---\n{made}"), ""),
        (
            "users",
            format!("#cloud-config\n{made}users:\n  - name: alice\n    ssh-authorized-keys:\n      - {key}\n"),
            "grep -q user@example /home/alice/.ssh/authorized_keys",
        ),
        ("script", "#!/bin/sh\necho made > /root/made\n".to_owned(), ""),
        ("mime", MIME.to_owned(), "test -e /root/too"),
        (
            "jinja",
            "## template: jinja\n#cloud-config\nruncmd:\n  - echo {{ 'ma' + 'de' }} > /root/made\n  - touch /root/of-{{ v1.local_hostname }}\n".to_owned(),
            "test -e /root/of-jinja",
        ),
        ("include", format!("#include\n{url}/part.yaml\n"), ""),
        ("zipped", format!("#cloud-config\n{made}"), ""),
    ];
    let queue = std::sync::Mutex::new(forms.iter());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap().next();
                    let Some((name, text, check)) = next else {
                        break;
                    };
                    one_form(&multipass, &url, name, text, check);
                }
            });
        }
    });
    // What cloud-init makes nothing of is refused before anything is made.
    let bad = multipass.input(
        &["launch", GUEST_IMAGE, "-n", "bad", "--cloud-init", "-"],
        b"#cloud-config\nruncmd: [",
    );
    assert!(matches!(bad.code(), 1 | 2), "{bad:?}");
    assert_eq!(multipass.state("bad"), "none");
}

fn one_form(multipass: &Multipass, url: &str, name: &str, text: &str, check: &str) {
    let file = multipass.file(&format!("{name}.data"), text);
    let launch = |source: &str, input: &[u8]| {
        multipass.input(
            &[
                "launch",
                GUEST_IMAGE,
                "--name",
                name,
                "--cloud-init",
                source,
            ],
            input,
        )
    };
    let launched = match name {
        "dashes" => launch("-", text.as_bytes()),
        "no-header" => {
            multipass.file("www/no-header", text);
            launch(&format!("{url}/no-header"), b"")
        }
        "zipped" => {
            let zipped = Command::new("gzip").arg("-c").arg(&file).output().unwrap();
            launch("-", &zipped.stdout)
        }
        _ => launch(file.to_str().unwrap(), b""),
    };
    assert_eq!(launched.ok(), format!("Launched: {name}\n"), "{name}");
    // It returned when all was done, and the user is there whatever the data says. (2 is for old forms that
    // cloud-init warns of.)
    let look =
        format!("cat /root/made; id -u ubuntu; hostname; cloud-init status || [ $? = 2 ]; {check}");
    let told = multipass.input(
        &["exec", name, "--", "sudo", "-n", "sh", "-eu", "-c", &look],
        b"",
    );
    assert_eq!(
        told.ok(),
        format!("made\n1000\n{name}\nstatus: done\n"),
        "{name}"
    );
    multipass.ok(&format!("delete --purge {name}"));
}
