//! What is asked of a clone's agent, and what of its answers is believed.

use super::*;

fn spec() -> IdentitySpec {
    IdentitySpec {
        instance: "6f9b0a0e-3c3f-4d27-9d1e-000000000001".into(),
        hostname: "keen-otter".into(),
        machine_id: "0".repeat(32),
        entropy: vec![0xa5; 64],
        time: 1.5,
        keys: InstanceKeys::generate().unwrap(),
        authorized: vec!["ssh-ed25519 AAAA you".into()],
        timezone: None,
        nic: Some(CloneNic {
            mac: "52:54:00:00:00:01".parse().unwrap(),
            address: Ipv4Addr::new(10, 1, 2, 3),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 1, 2, 1),
            dns: Ipv4Addr::new(10, 1, 2, 1),
        }),
        grow: false,
        cloud_init: false,
        mode: CloneMode::Warm,
    }
}

#[test]
fn the_request_says_it_all_and_the_log_little() {
    let spec = spec();
    let request = spec.request().unwrap();
    assert_eq!(request["nic"]["address"], "10.1.2.3/24");
    assert_eq!(request["nic"]["mac"], "52:54:00:00:00:01");
    assert_eq!(request["entropy"], "a5".repeat(64));
    assert_eq!(request["authorized"].as_array().unwrap().len(), 2);
    assert_eq!(request["mode"], "warm");
    assert!(request.to_string().len() < super::super::wire::MAX_LINE / 2);
    let shown = format!("{spec:?}");
    assert!(
        !shown.contains("PRIVATE") && !shown.contains("165"),
        "{shown}"
    );
}

#[test]
fn answers_are_bounded_and_cleaned() {
    let answer = |value: Value| value.as_object().unwrap().clone();
    let good = answer(json!({"steps": [["ids\u{1b}[2J", 3], ["keys", 4]]}));
    assert_eq!(
        steps(&good).unwrap(),
        [("ids[2J".to_owned(), 3), ("keys".to_owned(), 4)]
    );
    for bad in [
        json!({}),
        json!({"steps": 1}),
        json!({"steps": [["a", -1]]}),
        json!({"steps": [["a"]]}),
    ] {
        assert!(steps(&answer(bad)).is_none());
    }
    let many: Map<String, Value> = (0..500)
        .map(|n| (n.to_string(), json!(vec!["v"; 500])))
        .collect();
    let all = items(&answer(json!({ "items": many }))).unwrap();
    assert_eq!((all.len(), all[0].1.len()), (MAX_ITEMS, MAX_VALUES));
    for bad in [
        json!({"items": []}),
        json!({"items": {"a": 1}}),
        json!({"items": {"a": [1]}}),
    ] {
        assert!(items(&answer(bad)).is_none());
    }
}
