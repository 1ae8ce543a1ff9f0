//! What holds for any machine, any limits and any bytes.

use proptest::prelude::*;

use super::*;

fn any_machine() -> impl Strategy<Value = Machine> {
    fn word<T: Word + Clone + std::fmt::Debug + 'static>() -> impl Strategy<Value = Option<T>> {
        proptest::option::of(proptest::sample::select(T::WORDS).prop_map(|w| T::of(w).unwrap()))
    }
    let count = || proptest::option::of(1..=255u8);
    let mac = proptest::option::of(any::<[u8; 6]>().prop_map(|mut bytes| {
        bytes[0] = (bytes[0] | 2) & 0xfe;
        Mac(bytes)
    }));
    let uuid = proptest::option::of(
        any::<u128>().prop_map(|n| uuid::Builder::from_random_bytes(n.to_be_bytes()).into_uuid()),
    );
    let first = (uuid, word(), word(), count(), count(), count());
    let flags = proptest::option::of(Just([]));
    let memory = proptest::option::of(1..=1_048_576u32);
    let second = (memory, word(), word(), mac, word(), word(), flags);
    let third = (word(), word(), word(), word(), word());
    (first, second, third).prop_map(|(a, b, c)| Machine {
        uuid: a.0,
        chipset: a.1,
        cpu: a.2,
        flags: b.6,
        threads: a.3,
        cores: a.4,
        sockets: a.5,
        memory: b.0,
        usb: b.1,
        network: b.2,
        mac: b.3,
        storage: b.4,
        graphics: b.5,
        sound: c.0,
        keyboard: c.1,
        keyboard_layout: c.2,
        mouse: c.3,
        tablet: c.4,
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(machine in any_machine()) {
        let bytes = machine.to_json();
        prop_assert_eq!(&bytes, &machine.to_json());
        let parsed = Machine::parse(&bytes).unwrap();
        prop_assert_eq!(&parsed.machine, &machine);
        prop_assert!(parsed.warnings.is_empty());
        prop_assert_eq!(parsed.machine.is_empty(), bytes.len() < 20);
    }

    #[test]
    fn merging(a in any_machine(), b in any_machine(), c in any_machine()) {
        prop_assert_eq!(
            a.with_defaults(&b).with_defaults(&c),
            a.with_defaults(&b.with_defaults(&c))
        );
        prop_assert_eq!(a.with_defaults(&a), a.clone());
        prop_assert_eq!(a.with_defaults(&Machine::default()), a);
    }

    #[test]
    fn limits_hold(machine in any_machine(), max_cpus in 1..=255u32, default_threads in 1..=255u32) {
        let limits = MachineLimits { max_memory: 500_000, max_cpus, default_threads };
        let steps = grown_in_steps(limits, &machine);
        match limits.apply(&machine) {
            Ok(full) => {
                let found = (full.threads.unwrap(), full.cores.unwrap(), full.sockets.unwrap());
                prop_assert_eq!((found.0.into(), found.1.into(), found.2.into()), steps);
                prop_assert!(full.cpus().unwrap() <= max_cpus);
                prop_assert!(full.memory.unwrap() <= 500_000);
                prop_assert_eq!(machine.with_defaults(&full), full.clone());
                prop_assert_eq!(limits.apply(&full).unwrap(), full);
            }
            Err(_) => {
                let large = machine.memory.is_some_and(|memory| memory > 500_000);
                prop_assert!(large || steps.0 * steps.1 * steps.2 > u64::from(max_cpus));
            }
        }
        MachineLimits::derive(&machine, 1).apply(&machine).unwrap();
    }

    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Machine::parse(&bytes);
    }

    #[test]
    fn no_change_of_a_byte_breaks_it(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = serde_json::to_vec(&full()).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(parsed) = Machine::parse(&bytes) {
            let again = Machine::parse(&parsed.machine.to_json()).unwrap();
            prop_assert_eq!(again.machine, parsed.machine);
        }
    }
}
