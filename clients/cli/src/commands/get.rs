//! `pileus get`: settings. The client knows only its own; all others are asked of the daemon.

use pileus_api::{Code, Setting};
use pileus_base::Error;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::{self, Format, FormatOption};
use crate::{client_settings, complete};

/// Show settings
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The setting's key; all settings are listed if not given
    #[arg(value_name = "KEY", add = complete::settings())]
    pub key: Option<String>,
    /// List only the keys
    #[arg(long, conflicts_with = "key")]
    pub keys: bool,
    /// Write nothing, not <empty>, for an empty value
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub format: FormatOption,
}

/// The keys that Multipass has, in its order; those of instances come behind.
const MULTIPASS_KEYS: [&str; 6] = [
    client_settings::PRIMARY,
    "local.bridged-network",
    "local.driver",
    "local.image.mirror",
    "local.passphrase",
    "local.privileged-mounts",
];

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let format = args.format.format;
    if let Some(key) = &args.key {
        let mut setting = one(context, key).await?;
        if setting.value.is_empty() && format == Format::Table && !args.raw {
            setting.value = "<empty>".to_owned();
        }
        return context.print(&render::settings::one(&setting, format));
    }
    if context.multipass() && !args.keys {
        return Err(CommandError::usage(
            "Multiple settings not implemented yet. Please try again with one setting key or just \
             the `--keys` option for now.",
        ));
    }
    let mut settings = client_settings::all(&context.env)?;
    settings.extend(context.client().await?.settings().await?);
    let text = match args.keys {
        true => {
            let keys = settings.into_iter().map(|s| s.key).collect();
            keys_to_show(keys, context.multipass())
                .into_iter()
                .map(|key| key + "\n")
                .collect()
        }
        false => render::settings::all(&settings, format),
    };
    context.print(&text)
}

async fn one(context: &Context, key: &str) -> Result<Setting, CommandError> {
    if client_settings::is_own(key) {
        return client_settings::get(&context.env, key);
    }
    let answer = context.client().await?.setting(key).await;
    answer.map_err(|err| explained(context, key, None, err))
}

/// The daemon's error about a setting, as it is known under the name `multipass`.
pub(crate) fn explained(
    context: &Context,
    key: &str,
    value: Option<&str>,
    mut err: Error,
) -> CommandError {
    if context.multipass() {
        match (err.code, value) {
            (Code::SettingNotFound, _) => {
                err.message = format!("Unrecognized settings key: '{key}'");
            }
            (Code::InvalidSetting, Some(value)) if !err.message.starts_with("Invalid setting") => {
                err.message = format!("Invalid setting '{key}={value}': {}", err.message);
            }
            _ => {}
        }
    }
    err.into()
}

fn keys_to_show(keys: Vec<String>, multipass: bool) -> Vec<String> {
    if !multipass {
        return keys;
    }
    let mut of_instances: Vec<String> =
        keys.into_iter().filter(|key| is_of_instance(key)).collect();
    of_instances.sort();
    let fixed = MULTIPASS_KEYS.map(str::to_owned);
    fixed.into_iter().chain(of_instances).collect()
}

/// Whether Multipass has this setting of an instance or a snapshot.
fn is_of_instance(key: &str) -> bool {
    let parts: Vec<&str> = key.split('.').collect();
    match parts.as_slice() {
        ["local", _, name] => matches!(*name, "bridged" | "cpus" | "disk" | "memory"),
        ["local", _, _, name] => matches!(*name, "comment" | "name"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn under_the_other_name_only_its_keys_are_listed() {
        let keys = |multipass| {
            let keys = [
                "local.warm",
                "local.driver",
                "local.foo.memory",
                "local.foo.on-crash",
                "local.foo.cpus",
                "local.foo.snapshot1.name",
            ];
            keys_to_show(keys.map(str::to_owned).to_vec(), multipass)
        };
        let shown = keys(true);
        assert_eq!(shown[..6], MULTIPASS_KEYS);
        assert_eq!(
            shown[6..],
            [
                "local.foo.cpus",
                "local.foo.memory",
                "local.foo.snapshot1.name"
            ]
        );
        assert_eq!(keys(false).len(), 6);
    }
}
