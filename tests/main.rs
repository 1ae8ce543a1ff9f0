//! Whole-system tests: a real daemon and the real CLI, in a world of their own (`testkit/`).
//!
//! `fake_*` run against a stand-in for QEMU and take a second or so; `guest_*` boot real guests, which
//! takes a minute each under emulation, so that one guest serves as many checks as it can.

mod fake_faults;
mod fake_life;
mod fake_requests;
mod fake_warm;
mod guest_life;
mod guest_setup;
mod guest_user_mode;
