//! Tests of the store as a whole, on real files, real tools and a real HTTP server on loopback.

mod archive;
mod build;
mod crash;
mod download;
mod formats;
mod overlay;
mod server;
mod store;
mod streams;
mod support;
