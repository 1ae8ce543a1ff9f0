//! Tests of the store as a whole, on real files, real tools and a real HTTP server on loopback.

mod archive;
mod build;
mod collect;
mod crash;
mod download;
mod formats;
mod kills;
mod manager;
mod overlay;
mod server;
mod share;
mod store;
mod streams;
mod support;
mod tags;
mod verify;
