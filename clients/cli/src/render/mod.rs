//! Answers as text: one file a thing, each as table, JSON, CSV and YAML. The shapes are those that
//! users and scripts of Multipass 1.16 know; what pileus adds comes after them.
//!
//! Everything here is a pure function from API types to a string.

pub mod aliases;
pub mod doctor;
pub mod identity;
pub mod image;
pub mod images;
pub mod info;
pub mod list;
pub mod networks;
pub mod node;
mod own;
#[cfg(test)]
pub(crate) mod samples;
pub mod settings;
pub mod snapshots;
pub mod table;
pub mod templates;
pub mod top;
pub mod version;

use clap::ValueEnum;
use jiff::tz::TimeZone;
use pileus_api::{Instance, InstanceState, Timestamp};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    Json,
    Csv,
    Yaml,
}

/// The option `--format` of the commands that list things.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct FormatOption {
    /// How to write the answer
    #[arg(long, value_enum, default_value_t, hide_default_value = true)]
    pub format: Format,
}

/// How and for whom an answer is written.
#[derive(Debug, Clone)]
pub struct View {
    pub format: Format,
    /// As Multipass writes it, and nothing that only pileus tells.
    pub multipass: bool,
    /// For times that are written for people.
    pub zone: TimeZone,
}

impl View {
    #[cfg(test)]
    pub fn sample(format: Format, multipass: bool) -> Self {
        let zone = TimeZone::UTC;
        Self {
            format,
            multipass,
            zone,
        }
    }

    /// A time; under `multipass` as its C library writes it, else as programs can read it.
    pub fn time(&self, time: Timestamp) -> String {
        if !self.multipass {
            return time.to_string();
        }
        let time = time.to_zoned(self.zone.clone());
        time.strftime("%a %b %e %H:%M:%S %Y %Z").to_string()
    }
}

/// A time without its fractions of a second, for people.
pub(crate) fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// The word for an instance's state.
pub fn state(instance: &Instance) -> &'static str {
    if instance.deleted {
        return "Deleted";
    }
    match instance.state {
        InstanceState::Creating | InstanceState::Starting => "Starting",
        InstanceState::Stopped => "Stopped",
        InstanceState::Running if instance.shutdown_at.is_some() => "Delayed Shutdown",
        InstanceState::Running => "Running",
        InstanceState::Restarting => "Restarting",
        InstanceState::Stopping => "Stopping",
        InstanceState::Suspending => "Suspending",
        InstanceState::Suspended => "Suspended",
        InstanceState::Unknown => "Unknown",
    }
}

/// System and release of an instance's image, `Debian 13`.
pub fn image_title(instance: &Instance) -> String {
    let image = &instance.image;
    let title = format!("{} {}", image.os, image.release);
    match title.trim() {
        "" => "Not Available".to_owned(),
        title => title.to_owned(),
    }
}

/// One field of a CSV line, quoted if it must be.
pub fn csv_field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        return csv_quoted(text);
    }
    text.to_owned()
}

/// One field of a CSV line, always quoted.
pub fn csv_quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}
