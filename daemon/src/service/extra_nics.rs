//! Further cards of instances, in networks of the host: which are asked for, and whether there are such
//! networks. What is made of them at a start is in `service/wiring.rs` and `networks/src/extra.rs`.

use std::sync::Arc;

use pileus_api::{LaunchNetwork, NetworkMode};
use pileus_base::{Code, Error, Mac, Result};
use pileus_instances::qemu::extra_nics;

use super::registry::Instance;
use super::{Mode, Service, blocking, wiring};
use crate::state::instances::{ExtraNic, InstanceRow};

/// The machine has this many places for cards; two of the spare ones are left for other things.
const MOST: usize = 6;
/// The name that stands for the network of `local.bridged-network`.
const BRIDGED: &str = "bridged";

impl Service {
    /// The cards that a launch asks for, or why it can't have them.
    pub(super) async fn extra_nics(&self, wanted: &[LaunchNetwork]) -> Result<Vec<ExtraNic>> {
        let mut nics: Vec<ExtraNic> = Vec::new();
        for wish in wanted {
            let network = self.network_named(&wish.name).await?;
            let nic = ExtraNic {
                network,
                mac: wish
                    .mac
                    .as_deref()
                    .map_or_else(|| Ok(wiring::random_mac()), given)?,
                auto: wish.mode == NetworkMode::Auto,
            };
            add(&mut nics, nic)?;
        }
        Ok(nics)
    }

    /// The host's network that a name means. It is there now.
    async fn network_named(&self, name: &str) -> Result<String> {
        if let Mode::User(_) = self.parts.mode {
            return Err(Error::new(
                Code::NetworkNotFound,
                "A user's own pileusd can't connect instances to networks of the host",
            )
            .advise("The system's pileusd can: `sudo pileus launch --network …`."));
        }
        let bridged = name == BRIDGED;
        let network = match bridged {
            true => self.parts.settings.get().bridged_network,
            false => name.to_owned(),
        };
        if network.is_empty() {
            return Err(Error::new(
                Code::NetworkNotFound,
                "You have to `pileus set local.bridged-network=<name>` to use the \"bridged\" \
                 shortcut.",
            )
            .advise("`pileus networks` lists the names."));
        }
        let (own, asked) = (self.parts.network.clone(), network.clone());
        let found = blocking(move || own.bridge_of(&asked)).await;
        match found {
            Ok(_) => Ok(network),
            Err(err) if bridged && err.code == Code::NetworkNotFound => Err(Error::new(
                err.code,
                format!(
                    "Invalid network '{network}' set as bridged interface, use `pileus set \
                     local.bridged-network=<name>` to correct. See `pileus networks` for valid names."
                ),
            )),
            Err(err) => Err(err),
        }
    }

    /// Gives an instance a card in the network of `local.bridged-network`, or takes it away, from its next
    /// boot on.
    pub(super) async fn bridge(&self, instance: &Arc<Instance>, wish: bool) -> Result<()> {
        let mut nics = instance.row().spec.extra_nics;
        if wish {
            let network = self.network_named(BRIDGED).await?;
            if nics.iter().any(|nic| nic.network == network) {
                return Ok(());
            }
            let mac = wiring::random_mac();
            let auto = true;
            add(&mut nics, ExtraNic { network, mac, auto })?;
        } else {
            let network = self.parts.settings.get().bridged_network;
            nics.retain(|nic| nic.network != network);
        }
        let change = instance.change(|row| row.spec.extra_nics = nics);
        change.await.map(drop)
    }
}

/// Whether the machine that runs has other cards than its next one will have.
pub(super) fn are_pending(row: &InstanceRow) -> bool {
    let running = row.process.and_then(|process| process.command_line().ok());
    running.is_some_and(|line| {
        let next = row.spec.extra_nics.iter().map(|nic| nic.mac);
        !extra_nics(&line).into_iter().eq(next)
    })
}

fn add(nics: &mut Vec<ExtraNic>, nic: ExtraNic) -> Result<()> {
    let bad = |why: String| Err(Error::new(Code::InvalidArgument, why));
    if nics.len() >= MOST {
        return bad(format!("An instance has {MOST} further networks at most"));
    }
    if nics.iter().any(|other| other.mac == nic.mac) {
        return bad(format!("The MAC address {} is given twice", nic.mac));
    }
    nics.push(nic);
    Ok(())
}

/// A MAC address that a single card can have.
fn given(text: &str) -> Result<Mac> {
    let mac: Mac = text.parse()?;
    // The lowest bit of the first byte is that of groups.
    if mac.0[0] & 1 == 1 || mac.0 == [0; 6] {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{mac} is no address that one card can have"),
        )
        .advise("Begin it with 52:54:00."));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_one_card_and_no_two_are_the_same() {
        assert!(given("52:54:00:AA:bb:01").is_ok());
        for bad in [
            "",
            "52:54",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert!(given(bad).is_err(), "{bad}");
        }
        let nic = |last| ExtraNic {
            network: "br0".into(),
            mac: Mac([0x52, 0x54, 0, 0, 0, last]),
            auto: true,
        };
        let mut nics = vec![nic(0)];
        assert!(add(&mut nics, nic(0)).is_err());
        for last in 1..6 {
            add(&mut nics, nic(last)).unwrap();
        }
        assert!(add(&mut nics, nic(7)).is_err());
    }
}
