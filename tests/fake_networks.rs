//! Cards in networks of the host, with machines that are stand-ins: what is asked for and refused, what the
//! row and the command line have, and when a change holds.

use pileus_testkit::{Need, need};
use serde_json::{Value, json};

use crate::fake_world::{World, refused, text};

fn ip(world: &World, line: &str) {
    let mut command = world.namespace().command("ip");
    assert!(command.args(line.split(' ')).status().unwrap().success());
}

fn launch(world: &World, name: &str, networks: &Value) -> Result<Value, pileus_testkit::Refusal> {
    let image = format!("file://{}", world.fake_image().display());
    let body = json!({"image": image, "name": name, "networks": networks});
    world.api.run("POST", "/v1/instances", Some(&body))
}

/// The MAC addresses on the machine's command line.
fn cards(world: &World, name: &str) -> Vec<String> {
    let pid = world.machine(name).unwrap();
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    let cards = line
        .split('\0')
        .filter(|arg| arg.starts_with("virtio-net-pci,"));
    let mac = |arg: &str| arg.split("mac=").nth(1).unwrap()[..17].to_owned();
    cards.map(mac).collect()
}

#[test]
fn fake_cards_in_networks_of_the_host() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    ip(&world, "link add br8 type bridge");
    ip(&world, "link add br9 type bridge");
    let mac = "52:54:00:11:22:33";
    for (networks, code) in [
        (json!([{"name": "nope"}]), "network-not-found"),
        (json!([{"name": "pileus0"}]), "network-not-found"),
        (json!([{"name": "bridged"}]), "network-not-found"),
        (json!([{"name": "br9", "mac": "x"}]), "invalid-argument"),
        (
            json!([{"name": "br9", "mac": "01:00:5e:00:00:01"}]),
            "invalid-argument",
        ),
        (
            json!([{"name": "br8", "mac": mac}, {"name": "br9", "mac": mac}]),
            "invalid-argument",
        ),
    ] {
        refused(launch(&world, "foo", &networks), code);
        assert_eq!(world.state("foo"), "none", "{networks}");
    }
    world.api.set("local.bridged-network", "br8").unwrap();
    let networks = json!([{"name": "br9", "mode": "manual", "mac": mac}, {"name": "bridged"}]);
    launch(&world, "foo", &networks).unwrap();
    let told = world.instance("foo");
    let of_br8 = text(&told["networks"][1], "mac").to_owned();
    assert_eq!(
        told["networks"],
        json!([
            {"name": "br9", "mode": "manual", "mac": mac},
            {"name": "br8", "mode": "auto", "mac": of_br8},
        ])
    );
    let first = text(&told, "mac").to_owned();
    assert_eq!(
        cards(&world, "foo"),
        [first.clone(), mac.to_owned(), of_br8.clone()]
    );
    // Nobody else gets this address, and a fork would have the same ones.
    refused(
        launch(&world, "bar", &json!([{"name": "br9", "mac": mac}])),
        "invalid-argument",
    );
    refused(world.api.act("foo", "fork", &json!({})), "wrong-state");
    // Taken away: from the next boot on, and a suspended one goes on as it was.
    assert_eq!(world.get_setting("local.foo.bridged"), "true");
    world.api.set("local.foo.bridged", "false").unwrap();
    assert_eq!(cards(&world, "foo").len(), 3);
    world.must("foo", "suspend");
    world.crash();
    world.must("foo", "start");
    assert_eq!(
        cards(&world, "foo"),
        [first.clone(), mac.to_owned(), of_br8]
    );
    world.must("foo", "restart");
    assert_eq!(cards(&world, "foo"), [first, mac.to_owned()]);
    assert_eq!(world.get_setting("local.foo.bridged"), "false");
    // And given again, twice.
    for _ in 0..2 {
        world.api.set("local.foo.bridged", "true").unwrap();
    }
    assert_eq!(
        world.instance("foo")["networks"].as_array().unwrap().len(),
        2
    );
    world.must("foo", "stop");
    // A clone has the same networks with addresses of its own.
    world
        .api
        .act("foo", "clone", &json!({"name": "copy"}))
        .unwrap();
    let (ours, theirs) = (world.instance("foo"), world.instance("copy"));
    for number in 0..2 {
        let (ours, theirs) = (&ours["networks"][number], &theirs["networks"][number]);
        assert_eq!(ours["name"], theirs["name"]);
        assert_ne!(ours["mac"], theirs["mac"]);
    }
    // A network that is gone is told at the start.
    ip(&world, "link delete br9");
    refused(world.act("foo", "start"), "network-not-found");
    assert_eq!(world.state("foo"), "stopped");
}
