//! The network of an ordinary user's daemon: the same things inside a namespace that pasta connects.

use std::process::Command;

use serde_json::{Value, json};

use super::support::{self, Daemon, PAGE, SERVER, USER, World, can_run, chmod, fetch, until};

const ALICE: &str = "52:54:00:00:00:0a";

/// A world whose state folder is the user's. Makes the user if this machine has not got it yet.
fn world() -> World {
    let known = || {
        Command::new("id")
            .arg(USER)
            .output()
            .unwrap()
            .status
            .success()
    };
    if !known() {
        let made = Command::new("useradd")
            .args(["-M", "-s", "/usr/sbin/nologin", USER])
            .output()
            .unwrap();
        assert!(known(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    assert!(
        std::path::Path::new("/usr/bin/pasta").exists(),
        "install the package passt"
    );
    let world = World::new();
    std::fs::create_dir(world.path("user")).unwrap();
    assert!(
        Command::new("chown")
            .arg(USER)
            .arg(world.path("user"))
            .status()
            .unwrap()
            .success()
    );
    world
}

/// The device as it is on a desktop: open to everybody.
fn open_tun(world: &World) -> String {
    let node = world.path("tun");
    if !node.exists() {
        assert!(
            Command::new("mknod")
                .arg(&node)
                .args(["c", "10", "200"])
                .status()
                .unwrap()
                .success()
        );
        chmod(&node, "666");
    }
    format!("mount --bind {} /dev/net/tun &&", node.display())
}

fn start(world: &World, before: &str) -> Daemon {
    let wrapper = format!("setpriv --reuid {USER} --regid {USER} --init-groups");
    world.daemon_with("pileus0", "-", before, &wrapper, "user")
}

fn record(world: &World) -> Value {
    let text = std::fs::read(world.state().join("holder.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn alive(pid: &Value) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn kill(pid: &Value) {
    assert!(
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn a_users_network_works_and_is_found_again_by_a_restarted_daemon() {
    if !can_run() {
        return;
    }
    let world = world();
    let tun = open_tun(&world);
    let mut daemon = start(&world, &tun);
    assert_eq!(
        daemon.hello["full_uid_map"],
        json!(true),
        "{}",
        daemon.hello
    );
    assert_eq!(daemon.hello["adopted"], json!(false));
    let subnet = daemon.hello["subnet"].as_str().unwrap().to_owned();
    let address = subnet.replace(".0/24", ".5");
    let gateway = subnet.replace(".0/24", ".1");
    daemon.ask_well(&format!("attach pl-tap {ALICE} {address} alice"));
    daemon.ask_well("close");
    // The host outside is as it was.
    assert!(!world.host.try_sh("ip link show pileus0").0);
    assert_eq!(world.host.sh("nft list ruleset"), "");

    let holder = record(&world)["holder"]["pid"].to_string();
    let guest = world.guest_in(&holder, "pl-a", ALICE);
    let works = || {
        let (leased, lease) = world.dhcp(&guest);
        assert!(
            leased && lease.contains(&format!("ip={address}\n")),
            "{lease}"
        );
        for name in ["outside.example", "alice.pileus"] {
            let wanted = if name == "alice.pileus" {
                &address
            } else {
                SERVER
            };
            let (_, text) = guest.try_sh(&format!("busybox nslookup -type=a {name} {gateway}"));
            assert!(
                text.contains(&format!("Address: {wanted}")),
                "{name}: {text}"
            );
        }
        assert_eq!(fetch(&guest), PAGE);
        guest.sh("ip addr flush dev eth0");
    };
    works();

    // Killed and started again: the same namespace, dnsmasq and bridge.
    let before = (record(&world), daemon.hello["dnsmasq"].clone());
    daemon.kill();
    let mut daemon = start(&world, &tun);
    assert_eq!(daemon.hello["adopted"], json!(true), "{}", daemon.hello);
    assert_eq!(daemon.hello["subnet"], subnet.as_str());
    assert_eq!((record(&world), daemon.hello["dnsmasq"].clone()), before);
    works();

    // pasta dies: it comes back, and so does the way out.
    kill(&record(&world)["pasta"]["pid"]);
    until("a new pasta", || {
        record(&world)["pasta"] != before.0["pasta"] && daemon.ask("health")["health"] == json!([])
    });
    works();

    // The keeper dies: the daemon notices, and the next one puts a new keeper over the same holder.
    let old = record(&world);
    kill(&old["keeper"]["pid"]);
    assert_ne!(daemon.ask("health")["health"], json!([]));
    daemon.kill();
    let mut daemon = start(&world, &tun);
    assert_eq!(record(&world)["holder"], old["holder"]);
    assert_ne!(record(&world)["keeper"], old["keeper"]);
    daemon.ask_well("health");
    until("the end of the old pasta", || !alive(&old["pasta"]["pid"]));
    works();

    // Stopped: nothing is left.
    let last = record(&world);
    assert_eq!(daemon.ask("stop"), json!({}));
    for who in ["holder", "keeper", "pasta"] {
        until(who, || !alive(&last[who]["pid"]));
    }
    assert!(!world.state().join("holder.json").exists());
}

#[test]
fn a_resolver_on_the_hosts_loopback_is_reached() {
    if !can_run() {
        return;
    }
    let mut world = world();
    world.use_loopback_resolver();
    let mut daemon = start(&world, &open_tun(&world));
    let subnet = daemon.hello["subnet"]
        .as_str()
        .unwrap_or_else(|| panic!("{}", daemon.hello))
        .to_owned();
    let gateway = subnet.replace(".0/24", ".1");
    daemon.ask_well(&format!(
        "register pl-a {ALICE} {} alice",
        subnet.replace(".0/24", ".5")
    ));
    let holder = record(&world)["holder"]["pid"].to_string();
    let guest = world.guest_in(&holder, "pl-a", ALICE);
    assert!(world.dhcp(&guest).0);
    let (_, text) = guest.try_sh(&format!(
        "busybox nslookup -type=a outside.example {gateway}"
    ));
    assert!(text.contains(&format!("Address: {SERVER}")), "{text}");
    assert_eq!(daemon.ask("stop"), json!({}));
}

#[test]
fn without_subordinate_ids_the_network_still_works() {
    if !can_run() {
        return;
    }
    let world = world();
    std::fs::write(world.path("empty"), "").unwrap();
    let before = format!(
        "mount --bind {} /etc/subuid && {}",
        world.path("empty").display(),
        open_tun(&world)
    );
    let mut daemon = start(&world, &before);
    assert_eq!(
        daemon.hello["full_uid_map"],
        json!(false),
        "{}",
        daemon.hello
    );
    daemon.ask_well("health");
    assert_eq!(daemon.ask("stop"), json!({}));
}

#[test]
fn a_host_without_a_way_out_still_has_its_network_and_is_told() {
    if !can_run() {
        return;
    }
    let world = world();
    world.host.sh("ip route del default");
    let mut daemon = start(&world, &open_tun(&world));
    let health = daemon.ask("health")["health"].clone();
    assert!(
        health[0]["message"]
            .as_str()
            .unwrap()
            .contains("Guests don't reach the outside"),
        "{health}"
    );
    world
        .host
        .sh(&format!("ip route add default via {}", support::ROUTER));
    until("the way out", || {
        daemon.ask("health")["health"] == json!([])
    });
    assert_eq!(daemon.ask("stop"), json!({}));
}

#[test]
fn a_tun_device_that_the_user_may_not_open_is_told() {
    if !can_run() {
        return;
    }
    let world = world();
    let closed = "mknod /tmp/pileus-tun-$$ c 10 200 && chmod 600 /tmp/pileus-tun-$$ && \
                  mount --bind /tmp/pileus-tun-$$ /dev/net/tun && rm /tmp/pileus-tun-$$ &&";
    let daemon = start(&world, closed);
    assert_eq!(daemon.hello["code"], "tun-unavailable", "{}", daemon.hello);
    assert!(
        daemon.hello["advice"].as_str().unwrap().contains("chmod"),
        "{}",
        daemon.hello
    );
    assert!(!world.state().join("holder.json").exists());
}
