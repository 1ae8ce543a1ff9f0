//! One real guest with a second card, in a bridge that the host has: it gets its address there from whoever
//! gives addresses there, and keeps pileus's own network first.

use std::process::{Child, Stdio};

use pileus_testkit::{Daemon, Need, Options, need, wait_until};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bridge of the host with a DHCP server on it, as a router on a LAN would be.
fn lan(daemon: &Daemon, bridge: &str, subnet: &str) -> Ended {
    for line in [
        format!("link add {bridge} type bridge"),
        format!("address add {subnet}.1/24 dev {bridge}"),
        format!("link set {bridge} up"),
    ] {
        let mut command = daemon.namespace().command("ip");
        assert!(command.args(line.split(' ')).status().unwrap().success());
    }
    let mut dnsmasq = daemon.namespace().command("dnsmasq");
    dnsmasq.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--port=0",
        "--no-ping",
    ]);
    dnsmasq.args(["--user=root", "--bind-interfaces", "--except-interface=lo"]);
    dnsmasq.args(["--leasefile-ro", "--dhcp-authoritative"]);
    dnsmasq.arg(format!("--interface={bridge}"));
    dnsmasq.arg(format!("--dhcp-range={subnet}.10,{subnet}.20"));
    let pid_file = daemon.folder().join(format!("{bridge}.pid"));
    dnsmasq.arg(format!("--pid-file={}", pid_file.display()));
    dnsmasq.stdout(Stdio::null()).stderr(Stdio::null());
    Ended(dnsmasq.spawn().unwrap())
}

/// Waits until the guest has an address that begins so, after its `own` one, which comes first.
fn addresses(daemon: &Daemon, own: &str, subnet: &str) -> Vec<String> {
    wait_until(&format!("{own} and {subnet}"), 180, || {
        let ipv4 = daemon.field("foo", "/ipv4");
        let all: Vec<String> = serde_json::from_value(ipv4).unwrap_or_default();
        let there = all.iter().skip(1).any(|a| a.starts_with(subnet));
        // The cards get their addresses in any order.
        (there && all[0] == own).then_some(all)
    })
}

/// Waits until the guest goes to there by its first card: while netplan sets up a card that has come, there may
/// be another way for a moment, or none.
fn goes_by_its_first_card(daemon: &Daemon, address: &str) {
    let look = format!("ip route get {address} || true");
    wait_until(&format!("{address} by eth0"), 60, || {
        let route = daemon.script("foo", &look);
        route.contains("dev eth0").then_some(())
    });
}

#[test]
fn guest_networks() {
    if !need(&[Need::Root, Need::Tun, Need::Guest, Need::Program("dnsmasq")]) {
        return;
    }
    let daemon = Daemon::start(Options::real());
    let _lan = lan(&daemon, "br7", "192.0.2");
    let mac = "52:54:00:11:22:33";
    let network = format!("name=br7,mac={mac}");
    let launch = ["launch", "--name", "foo", "--network", &network];
    daemon.run(&launch).ok_with_words();
    let own = daemon.get("/v1/instances/foo")["ipv4"][0].clone();
    let own = own.as_str().unwrap();
    let all = addresses(&daemon, own, "192.0.2.");
    assert_eq!(all.len(), 2, "{all:?}");
    let card = daemon.script("foo", "cat /sys/class/net/eth1/address");
    assert_eq!(card.trim(), mac);
    goes_by_its_first_card(&daemon, "198.51.100.1");
    daemon.script("foo", "ping -c 1 -w 20 192.0.2.1");

    // One more, which the guest finds at its next boot.
    let _other = lan(&daemon, "br6", "198.51.100");
    daemon.run(&["set", "local.bridged-network=br6"]).ok();
    daemon.run(&["set", "local.foo.bridged=true"]).ok();
    assert_eq!(
        daemon.field("foo", "/networks").as_array().unwrap().len(),
        2
    );
    daemon.run(&["restart", "foo"]).ok();
    addresses(&daemon, own, "198.51.100.");
    goes_by_its_first_card(&daemon, "203.0.113.9");
}
