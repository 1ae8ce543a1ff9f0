//! The private network with real dnsmasq, nft and pasta, in network namespaces that the tests make.
//! `support.rs` has the world they run in, `daemon.rs` is the program that stands in for pileusd.

mod support;
mod system_mode;
mod user_mode;
