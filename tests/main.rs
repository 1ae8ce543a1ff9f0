//! Whole-system tests: a real daemon and the real CLI, in a world of their own (`testkit/`).
//!
//! `fake_*` run against a stand-in for QEMU and take a second or so; `guest_*` have real guests. Those
//! start from a template that all share; the few that boot take most of a minute under emulation, so one
//! of them serves as many checks as it can.

mod fake_archive;
mod fake_archive_trouble;
mod fake_faults;
mod fake_hardware;
mod fake_host;
mod fake_image_making;
mod fake_images;
mod fake_images_trouble;
mod fake_life;
mod fake_model;
mod fake_model_rules;
mod fake_networks;
mod fake_requests;
mod fake_settings;
mod fake_snapshots;
mod fake_supervise;
mod fake_suspend;
mod fake_warm;
mod fake_world;
mod guest_boot;
mod guest_hardware;
mod guest_host;
mod guest_image_making;
mod guest_life;
mod guest_model;
mod guest_multipass;
mod guest_networks;
mod guest_run;
mod guest_setup;
mod guest_snapshots;
mod guest_suspend;
mod guest_user_data;
mod guest_user_mode;
mod guest_warm;
mod guests;
mod multipass;
