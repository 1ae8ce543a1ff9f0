//! NAT and the little filtering that the private network has, as one nftables table named after the
//! bridge. It is replaced in one atomic transaction, so it can be applied at any time; tables of
//! others are neither read nor written by it.
//!
//! - Guests reach everything that the host can route to, with the host's address (masquerade), but
//!   only with a source address of their own subnet.
//! - Nobody outside reaches a guest, except with answers. The host itself does.
//! - On the host, guests reach DHCP, DNS and ping on the bridge, and answers; nothing else, on none
//!   of the host's addresses. (Keeping guests apart from each other is not done here.)
//!
//! An accept here can't undo a drop in someone else's table. Docker's and ufw's default drop of
//! forwarded packets therefore needs a rule there; `foreign_drop` finds that case and says so.

use pileus_base::{Code, Error, Result};

use crate::subnet::Subnet;
use crate::tools;

/// The whole transaction: the table is emptied and filled again in one step. `uplink` is the card
/// that pasta serves, in a user's own namespace.
fn script(bridge: &str, subnet: Subnet, uplink: Option<&str>) -> String {
    // Debian 12's pasta answers a segment now and then with one that has no flags at all. It belongs
    // to no connection, so it would not go on to the guest but be taken for the host's, whose reset
    // ends the guest's connection.
    let stray = uplink.map_or(String::new(), |uplink| {
        format!("    iifname \"{uplink}\" ct state invalid drop\n")
    });
    format!(
        "\
add table inet {bridge}
delete table inet {bridge}
table inet {bridge} {{
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {subnet} oifname != \"{bridge}\" masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname \"{bridge}\" oifname \"{bridge}\" accept
    iifname \"{bridge}\" tcp flags syn tcp option maxseg size set rt mtu
    oifname \"{bridge}\" tcp flags syn tcp option maxseg size set rt mtu
    iifname \"{bridge}\" ip saddr {subnet} accept
    iifname \"{bridge}\" drop
    oifname \"{bridge}\" ct state established,related accept
    oifname \"{bridge}\" drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
{stray}    iifname != \"{bridge}\" accept
    ct state established,related accept
    udp dport 67 accept
    ip daddr {gateway} udp dport 53 accept
    ip daddr {gateway} tcp dport 53 accept
    ip daddr {gateway} icmp type echo-request accept
    reject with icmpx type admin-prohibited
  }}
}}
",
        gateway = subnet.gateway()
    )
}

async fn nft(args: &[&str], input: &str) -> Result<std::process::Output> {
    let program = tools::find("nft", "nftables")?;
    tools::run(&program, args, input).await
}

/// Puts our table in place, whatever was in it before.
pub(crate) async fn apply(bridge: &str, subnet: Subnet, uplink: Option<&str>) -> Result<()> {
    let output = nft(&["-f", "-"], &script(bridge, subnet, uplink)).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(tools::failure("Setting up the firewall rules", &output))
}

/// Removes our table; one that is not there is fine.
pub(crate) async fn remove(bridge: &str) -> Result<()> {
    let script = format!("add table inet {bridge}\ndelete table inet {bridge}\n");
    let output = nft(&["-f", "-"], &script).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(tools::failure("Removing the firewall rules", &output))
}

/// Whether our table is in place.
pub(crate) async fn is_present(bridge: &str) -> Result<bool> {
    let output = nft(&["list", "table", "inet", bridge], "").await?;
    Ok(output.status.success())
}

/// The problem that another firewall drops what guests send, if that can be seen.
pub(crate) async fn foreign_drop(bridge: &str) -> Option<Error> {
    let forward = nft(&["list", "chain", "ip", "filter", "FORWARD"], "")
        .await
        .ok()?;
    if !String::from_utf8_lossy(&forward.stdout).contains("policy drop") {
        return None;
    }
    let table = nft(&["list", "table", "ip", "filter"], "").await.ok()?;
    if String::from_utf8_lossy(&table.stdout).contains(&format!("\"{bridge}\"")) {
        return None;
    }
    Some(
        Error::new(
            Code::NetworkFailed,
            "Another firewall on this host (Docker, ufw?) drops forwarded packets, so guests may not \
             reach the outside",
        )
        .advise(format!(
            "Allow the bridge there: `iptables -I FORWARD -i {bridge} -j ACCEPT` and \
             `iptables -I FORWARD -o {bridge} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT` \
             (with Docker use the chain DOCKER-USER)."
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_transaction() {
        let subnet = "10.87.21.0/24".parse().unwrap();
        let inside = script("pileus0", subnet, Some("uplink0"));
        assert!(inside.contains(
            "policy accept;\n    iifname \"uplink0\" ct state invalid drop\n    iifname != \"pileus0\" accept"
        ));
        let script = script("pileus0", subnet, None);
        assert_eq!(
            script,
            r#"add table inet pileus0
delete table inet pileus0
table inet pileus0 {
  chain nat {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 10.87.21.0/24 oifname != "pileus0" masquerade
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname "pileus0" oifname "pileus0" accept
    iifname "pileus0" tcp flags syn tcp option maxseg size set rt mtu
    oifname "pileus0" tcp flags syn tcp option maxseg size set rt mtu
    iifname "pileus0" ip saddr 10.87.21.0/24 accept
    iifname "pileus0" drop
    oifname "pileus0" ct state established,related accept
    oifname "pileus0" drop
  }
  chain input {
    type filter hook input priority filter; policy accept;
    iifname != "pileus0" accept
    ct state established,related accept
    udp dport 67 accept
    ip daddr 10.87.21.1 udp dport 53 accept
    ip daddr 10.87.21.1 tcp dport 53 accept
    ip daddr 10.87.21.1 icmp type echo-request accept
    reject with icmpx type admin-prohibited
  }
}
"#
        );
    }
}
