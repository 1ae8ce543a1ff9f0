//! Tests of the store as a whole, on real files, real tools and a real HTTP server on loopback.

mod archive;
mod build;
mod collect;
mod crash;
mod crowd;
mod download;
mod formats;
mod intake;
mod kills;
mod manager;
mod overlay;
mod packed_attacks;
mod packed_mutable;
mod packed_pack;
mod server;
mod share;
mod store;
mod streams;
mod support;
mod tags;
mod trouble;
mod verify;
