//! A daemon that has nothing but a network, for `tests/`: it can be killed like a real one. Takes
//! commands on its standard input, one a line, and answers each with one line of JSON.
//!
//! `network-daemon DIR BRIDGE SUBNET|- [user]`

use std::io::BufRead;
use std::path::Path;

use pileus_networks::{Network, NetworkConfig, Nic, user_mode};
use serde_json::{Value, json};

fn error(err: &pileus_base::Error) -> Value {
    json!({"code": err.code, "message": err.message, "advice": err.advice, "details": err.details})
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut config = NetworkConfig::new(&args[1]);
    config.bridge.clone_from(&args[2]);
    config.subnet = args[3].parse().ok();
    let mut entered = None;
    if args.get(4).is_some_and(|mode| mode == "user") {
        match user_mode::enter(Path::new(&args[1])) {
            Ok(inside) => {
                config = config.inside(&inside);
                entered = Some(inside);
            }
            Err(err) => return println!("{}", error(&err)),
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(serve(config, entered));
}

async fn serve(config: NetworkConfig, entered: Option<user_mode::Entered>) {
    let network = match Network::start(config).await {
        Ok(network) => network,
        Err(err) => return println!("{}", error(&err)),
    };
    println!(
        "{}",
        json!({"subnet": network.subnet(), "gateway": network.gateway(), "dnsmasq": network.dnsmasq(),
               "full_uid_map": entered.as_ref().map(|e| e.full_uid_map),
               "adopted": entered.as_ref().map(|e| e.adopted),
               "upstream": entered.as_ref().map(|e| e.upstream.clone())})
    );
    let mut taps = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let nic = |words: &[&str]| Nic {
            ifname: words[1].into(),
            mac: words[2].parse().unwrap(),
            address: words[3].parse().unwrap(),
            hostname: words[4].parse().unwrap(),
        };
        let answer = match words[0] {
            "attach" => network.attach(&nic(&words)).await.map(|fd| taps.push(fd)),
            "plug" => {
                let plugged = network.attach_extra(words[1], words[2]).await;
                plugged.map(|fd| taps.push(fd))
            }
            "register" => network.register(&nic(&words)),
            "detach" => network.detach(&nic(&words)),
            "reconcile" => network.reconcile(&[]),
            "close" => {
                taps.clear();
                Ok(())
            }
            "stop" => {
                let mut stopped = network.stop().await;
                if let Some(entered) = &entered {
                    stopped = stopped.and(entered.release());
                }
                return println!("{}", stopped.map_or_else(|err| error(&err), |()| json!({})));
            }
            _ => Ok(()),
        };
        let mut problems = network.health().await;
        problems.extend(entered.iter().flat_map(user_mode::Entered::health));
        let problems: Vec<Value> = problems.iter().map(error).collect();
        match answer {
            Ok(()) => println!(
                "{}",
                json!({"health": problems, "dnsmasq": network.dnsmasq()})
            ),
            Err(err) => println!("{}", error(&err)),
        }
    }
}
