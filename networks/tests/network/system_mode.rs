//! The network as root.

use super::support::{self, HOST, Killed, ROUTER, SERVER, World, can_run, until};
use serde_json::json;

const ALICE: &str = "52:54:00:00:00:0a";
const BOB: &str = "52:54:00:00:00:0b";

#[test]
fn a_guest_gets_its_address_resolves_names_and_reaches_the_outside() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon();
    assert_eq!(daemon.hello["gateway"], "10.87.21.1", "{}", daemon.hello);
    daemon.ask_well(&format!("register pl-a {ALICE} 10.87.21.5 Alice"));
    daemon.ask_well(&format!("register pl-b {BOB} 10.87.21.6 bob"));
    let guest = world.guest("pl-a", ALICE);
    let (leased, lease) = world.dhcp(&guest);
    assert!(leased, "{lease}");
    for line in [
        "ip=10.87.21.5",
        "router=10.87.21.1",
        "dns=10.87.21.1",
        "domain=pileus",
        "mtu=1400",
        "hostname=alice",
    ] {
        assert!(lease.lines().any(|l| l == line), "{line} in {lease}");
    }

    // Names: its own, another guest's that has not booted yet, in both forms, and those of outside.
    let found = |name: &str, address: &str| {
        let (_, text) = guest.try_sh(&format!("busybox nslookup -type=a {name} 10.87.21.1"));
        assert!(
            text.contains(&format!("Address: {address}")),
            "{name}: {text}"
        );
    };
    found("alice.pileus", "10.87.21.5");
    found("bob.pileus", "10.87.21.6");
    found("bob", "10.87.21.6");
    found("outside.example", SERVER);
    let (_, text) = guest.try_sh("busybox nslookup -type=a nobody.pileus 10.87.21.1");
    assert!(text.contains("NXDOMAIN"), "{text}");

    // NAT: the server has no route to the guest's subnet, so only masqueraded packets are answered.
    let page = support::fetch(&guest);
    assert_eq!(page, support::PAGE);

    // Neither the outside nor the guest gets further than it should.
    world
        .outside
        .sh(&format!("ip route add 10.87.21.0/24 via {HOST}"));
    assert!(!world.outside.try_sh("busybox ping -c1 -W1 10.87.21.5").0);
    world.host.sh("busybox ping -c1 -W2 10.87.21.5");
    guest.sh("busybox ping -c1 -W2 10.87.21.1");
    let mut secret = world.host.command("busybox");
    let secret = Killed::spawn(secret.args(["nc", "-ll", "-p", "8080", "-e", "true"]));
    until("the host's own server", || {
        world
            .host
            .try_sh(&format!("busybox nc -w 2 {HOST} 8080 </dev/null"))
            .0
    });
    for address in ["10.87.21.1", HOST] {
        let (reached, text) = guest.try_sh(&format!("busybox nc -w 2 {address} 8080 </dev/null"));
        assert!(!reached, "{address}: {text}");
    }
    drop(secret);
}

#[test]
fn a_detached_guest_is_forgotten_and_its_address_serves_another() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon();
    daemon.ask_well(&format!("register pl-a {ALICE} 10.87.21.5 alice"));
    let alice = world.guest("pl-a", ALICE);
    assert!(world.dhcp(&alice).0);
    daemon.ask_well(&format!("detach pl-a {ALICE} 10.87.21.5 alice"));
    let (leased, text) = world.dhcp(&alice);
    assert!(!leased, "a guest without an entry got a lease: {text}");
    let (_, text) = alice.try_sh("busybox nslookup -type=a alice.pileus 10.87.21.1");
    assert!(text.contains("NXDOMAIN"), "{text}");

    // Same address and name, other MAC.
    daemon.ask_well(&format!("register pl-b {BOB} 10.87.21.5 alice"));
    let bob = world.guest("pl-b", BOB);
    let (leased, lease) = world.dhcp(&bob);
    assert!(leased && lease.contains("ip=10.87.21.5\n"), "{lease}");

    // The same when the detach was lost with a killed daemon and only the lease is left.
    daemon.kill();
    let mut daemon = world.daemon();
    daemon.ask_well("reconcile");
    daemon.ask_well(&format!("register pl-c {ALICE} 10.87.21.5 carol"));
    drop(bob);
    let carol = world.guest("pl-c", ALICE);
    let (leased, lease) = world.dhcp(&carol);
    assert!(leased && lease.contains("ip=10.87.21.5\n"), "{lease}");
}

#[test]
fn a_second_start_changes_nothing_and_a_killed_daemons_network_is_adopted() {
    if !can_run() {
        return;
    }
    let world = World::new();
    // Someone else's firewall, which must come through everything unchanged.
    world.host.sh("nft 'table inet other { chain c { type filter hook input priority 5; ip saddr 192.0.2.0/24 counter drop; }; set s { type ipv4_addr; elements = { 192.0.2.9 }; }; }'");
    let others = world.host.sh("nft list table inet other");
    let mut daemon = world.daemon();
    daemon.ask_well(&format!("register pl-a {ALICE} 10.87.21.5 alice"));
    let guest = world.guest("pl-a", ALICE);
    let (leased, text) = world.dhcp(&guest);
    assert!(leased, "{text}");
    let rules = world.host.sh("nft list table inet pileus0");
    let link = world.host.sh("ip -o link show pileus0 | cut -d: -f1");
    let dnsmasq = daemon.hello["dnsmasq"].clone();
    assert!(dnsmasq["pid"].is_i64(), "{}", daemon.hello);
    let status = std::fs::read_to_string(format!("/proc/{}/status", dnsmasq["pid"])).unwrap();
    assert!(
        !status.contains("\nUid:\t0"),
        "dnsmasq runs as root: {status}"
    );
    daemon.kill();
    let page = support::fetch(&guest);
    assert_eq!(page, support::PAGE);

    let mut daemon = world.daemon();
    assert_eq!(daemon.hello["dnsmasq"], dnsmasq);
    daemon.ask_well("health");
    assert_eq!(world.host.sh("nft list table inet pileus0"), rules);
    assert_eq!(world.host.sh("ip -o link show pileus0 | cut -d: -f1"), link);
    assert!(guest.try_sh("busybox ping -c1 -W2 10.87.21.1").0);

    assert_eq!(daemon.ask("stop"), json!({}));
    assert!(!world.host.try_sh("ip link show pileus0").0);
    assert_eq!(world.host.sh("nft list tables"), "table inet other\n");
    assert_eq!(world.host.sh("nft list table inet other"), others);
    until("the end of dnsmasq", || {
        !std::path::Path::new(&format!("/proc/{}", dnsmasq["pid"])).exists()
    });

    // From nothing again, and a bridge that vanished is noticed and made again.
    let mut daemon = world.daemon();
    daemon.ask_well("health");
    world.host.sh("ip link delete pileus0");
    assert_ne!(daemon.ask("health")["health"], json!([]));
    daemon.kill();
    let mut daemon = world.daemon();
    daemon.ask_well(&format!("register pl-a {ALICE} 10.87.21.5 alice"));
    let guest = world.guest("pl-z", ALICE);
    let (leased, text) = world.dhcp(&guest);
    assert!(leased, "{text}");
}

#[test]
fn a_dnsmasq_that_dies_comes_back_with_its_entries() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon();
    daemon.ask_well(&format!("register pl-a {ALICE} 10.87.21.5 alice"));
    let mut old = daemon.hello["dnsmasq"]["pid"].clone();
    for _ in 0..2 {
        assert!(
            std::process::Command::new("kill")
                .args(["-9", &old.to_string()])
                .status()
                .unwrap()
                .success()
        );
        let mut new = json!(null);
        until("a new dnsmasq", || {
            new = daemon.ask("health")["dnsmasq"]["pid"].clone();
            new.is_i64() && new != old
        });
        old = new;
    }
    daemon.ask_well("health");
    let guest = world.guest("pl-a", ALICE);
    let (leased, lease) = world.dhcp(&guest);
    assert!(leased && lease.contains("ip=10.87.21.5\n"), "{lease}");
}

#[test]
fn a_tap_is_plugged_in_and_lives_as_long_as_its_descriptor() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon();
    daemon.ask_well(&format!("attach pl-tap {ALICE} 10.87.21.5 alice"));
    let link = world.host.sh("ip -d link show pl-tap");
    for word in [
        "master pileus0",
        "mtu 1400",
        "tun type tap",
        "vnet_hdr on",
        "persist off",
        ",UP",
    ] {
        assert!(link.contains(word), "{word} in {link}");
    }
    // The name is in use: told, and the entry of the one that has it is not the price.
    let again = daemon.ask(&format!("attach pl-tap {BOB} 10.87.21.6 bob"));
    assert_eq!(again["code"], "network-failed", "{again}");
    let outsider = daemon.ask(&format!("attach pl-x {BOB} 10.99.0.6 bob"));
    assert_eq!(outsider["code"], "invalid-argument", "{outsider}");
    daemon.ask_well("close");
    assert!(!world.host.try_sh("ip link show pl-tap").0);
}

#[test]
fn what_is_taken_is_told_apart() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let refused = |subnet: &str, code: &str| {
        let daemon = world.daemon_with("pileus0", subnet, "", "", "");
        assert_eq!(daemon.hello["code"], code, "{}", daemon.hello);
        assert!(daemon.hello["advice"].is_string(), "{}", daemon.hello);
    };
    refused("203.0.113.0/25", "subnet-taken");
    world.host.sh("ip route add 10.87.21.128/25 dev wan0");
    refused("10.87.21.0/24", "subnet-taken");
    world.host.sh("ip route del 10.87.21.128/25");

    world
        .host
        .sh("ip link add pileus0 type veth peer name veth9");
    refused("10.87.21.0/24", "port-taken");
    world
        .host
        .sh("ip link delete pileus0; ip link add pileus0 type bridge");
    refused("10.87.21.0/24", "port-taken");
    world.host.sh("ip link delete pileus0");

    // Another DNS server on all addresses.
    let mut other = world.host.command("busybox");
    let other = Killed::spawn(other.args(["nc", "-ll", "-p", "53", "-e", "true"]));
    until("the other server", || {
        world.host.sh("ss -ltn").contains(":53 ")
    });
    refused("10.87.21.0/24", "port-taken");
    drop(other);

    // All of 10/8 is routed elsewhere: the choice goes around it, and stays when asked again.
    world
        .host
        .sh(&format!("ip route add 10.0.0.0/8 via {ROUTER}"));
    let first = world.daemon_with("pileus0", "-", "", "", "").hello["subnet"].clone();
    assert!(first.as_str().unwrap().starts_with("172."), "{first}");
    assert_eq!(
        world.daemon_with("pileus0", "-", "", "", "").hello["subnet"],
        first
    );
}

#[test]
fn no_tun_device_and_no_privilege_are_told_apart() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon_with(
        "pileus0",
        "10.87.21.0/24",
        "mount -t tmpfs none /dev/net &&",
        "",
        "",
    );
    let refused = daemon.ask(&format!("attach pl-tap {ALICE} 10.87.21.5 alice"));
    assert_eq!(refused["code"], "tun-unavailable", "{refused}");
    assert_eq!(
        std::fs::read_dir(world.state().join("hosts"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(daemon.ask("stop"), json!({}));

    std::fs::remove_dir_all(world.state()).unwrap();
    support::chmod(world.dir.path(), "777");
    let wrapper = "setpriv --reuid nobody --regid nogroup --clear-groups";
    let daemon = world.daemon_with("pileus0", "10.87.21.0/24", "", wrapper, "");
    assert_eq!(
        daemon.hello["code"], "permission-denied",
        "{}",
        daemon.hello
    );
}

#[test]
fn a_further_card_is_plugged_into_a_bridge_of_the_host() {
    if !can_run() {
        return;
    }
    let world = World::new();
    // /sys shows the interfaces of the namespace in which it was mounted.
    let before = "mount -t sysfs none /sys &&";
    let mut daemon = world.daemon_with("pileus0", "10.87.21.0/24", before, "", "");
    world
        .host
        .sh("ip link add br7 type bridge && ip link set br7 up mtu 1300");
    let answer = daemon.ask("plug pl-x br7");
    assert!(answer["code"].is_null(), "{answer}");
    let link = world.host.sh("ip link show pl-x");
    assert!(
        link.contains("master br7") && link.contains("mtu 1300") && link.contains("UP"),
        "{link}"
    );
    for (name, code) in [
        ("nowhere", "network-not-found"),
        // Ours is not to be chosen, and a bridge's tap is no card.
        ("pileus0", "network-not-found"),
        ("pl-x", "network-not-found"),
    ] {
        let answer = daemon.ask(&format!("plug pl-y {name}"));
        assert_eq!(answer["code"], code, "{name}: {answer}");
    }
    // It goes with whoever holds it, and the host's bridge stays.
    daemon.ask_well("close");
    assert!(!world.host.try_sh("ip link show pl-x").0);
    world.host.sh("ip link show br7");
}
