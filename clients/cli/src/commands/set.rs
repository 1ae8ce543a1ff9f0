//! `pileus set`: changes a setting of the client or, if it is none, of the daemon.

use pileus_api::{Code, InstanceState};
use pileus_base::Error;
use pileus_client::Client;

use crate::commands::get;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::{client_settings, complete, prompt};

/// Change a setting
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Without a value it is asked for, or read from standard input.

Examples:
  pileus set local.warm=off
  pileus set local.web.cpus=4         at once if the guest can, else at its next boot
  pileus set local.web.autostart=always")]
pub struct Args {
    /// The setting's key and value; the value may be a word of its own
    #[arg(value_name = "KEY[=VALUE]", add = complete::settings())]
    pub setting: String,
    /// The value, if it is not behind the key
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    pub value: Option<String>,
}

const PASSPHRASE: &str = "local.passphrase";

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let (key, given) = split(args, context.multipass())?;
    let value = match given {
        Some(value) => value.to_owned(),
        None => asked(context, key).await?,
    };
    if client_settings::is_own(key) {
        client_settings::set(&context.env, key, &value)?;
        return Ok(0);
    }
    let client = context.client().await?;
    if context.multipass() {
        may_be_set(&client, key).await?;
        stays_bridged(&client, key, &value).await?;
    }
    let answer = client.set(key, &value).await;
    answer.map_err(|err| get::explained(context, key, Some(&value), err))?;
    Ok(0)
}

/// The key and, if it was given, the value.
fn split(args: &Args, multipass: bool) -> Result<(&str, Option<&str>), CommandError> {
    let setting = args.setting.as_str();
    let (key, value) = match (&args.value, setting.split_once('=')) {
        (Some(_), _) if multipass => {
            return Err(CommandError::usage(
                "Need exactly one key-value pair (in <key>=<value> form).",
            ));
        }
        (Some(value), None) => (setting, Some(value.as_str())),
        (None, Some((_, value))) if multipass && value.contains('=') => {
            return Err(CommandError::usage("Bad key-value format."));
        }
        (None, Some((key, value))) => (key, Some(value)),
        (None, None) => (setting, None),
        (Some(_), Some(_)) => {
            let text = "error: a key and one value are needed: KEY=VALUE or KEY VALUE";
            return Err(CommandError::usage(text)
                .hint("pileus get lists the settings and what they may be."));
        }
    };
    if key.is_empty() {
        let text = match multipass {
            true => "Bad key-value format.",
            false => "error: the key is missing",
        };
        return Err(CommandError::usage(text));
    }
    Ok((key, value))
}

async fn asked(context: &Context, key: &str) -> Result<String, CommandError> {
    let missing = || CommandError::usage("error: the value is missing");
    if key != PASSPHRASE {
        let line = prompt::line(context, &format!("Enter value for '{key}': ")).await?;
        return line.ok_or_else(missing);
    }
    let first = prompt::secret(context, "Please enter passphrase: ").await?;
    if prompt::live(context) {
        let second = prompt::secret(context, "Please re-enter passphrase: ").await?;
        if first != second {
            return Err(CommandError::usage("Passphrases do not match"));
        }
    }
    first.ok_or_else(missing)
}

/// Under the name `multipass` an instance must be stopped to be changed: scripts know that, and what they
/// set holds at once.
async fn may_be_set(client: &Client, key: &str) -> Result<(), CommandError> {
    let parts: Vec<&str> = key.split('.').collect();
    let ["local", name, "bridged" | "cpus" | "disk" | "memory"] = parts.as_slice() else {
        return Ok(());
    };
    let refuse = |code, reason: &str| {
        let text = format!("Cannot update instance settings; instance: {name}; reason: {reason}");
        Err(Error::new(code, text).into())
    };
    match client.instance(name).await {
        Err(err) if err.code == Code::InstanceNotFound => refuse(err.code, "No such instance"),
        Err(err) => Err(err.into()),
        Ok(instance) if instance.deleted => refuse(Code::InstanceDeleted, "Instance is deleted"),
        Ok(instance) if instance.state != InstanceState::Stopped => refuse(
            Code::WrongState,
            "Instance must be stopped for modification",
        ),
        Ok(_) => Ok(()),
    }
}

/// Multipass gives an instance a card in the bridged network, and never takes it away.
async fn stays_bridged(client: &Client, key: &str, value: &str) -> Result<(), CommandError> {
    let no = matches!(
        value.to_ascii_lowercase().as_str(),
        "false" | "off" | "no" | "0"
    );
    let instance = key.starts_with("local.") && key.ends_with(".bridged");
    if !no || !instance || client.setting(key).await?.value != "true" {
        return Ok(());
    }
    let why = "Removing the bridged network is currently not supported";
    let text = format!("Invalid setting '{key}={value}': {why}");
    Err(Error::new(Code::InvalidSetting, text).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values() {
        let read = |setting: &str, value: Option<&str>, multipass| {
            let args = Args {
                setting: setting.to_owned(),
                value: value.map(str::to_owned),
            };
            let (key, value) = split(&args, multipass).map_err(|err| err.text("set"))?;
            Ok::<_, String>((key.to_owned(), value.map(str::to_owned)))
        };
        let pair = |key: &str, value: &str| Ok((key.to_owned(), Some(value.to_owned())));
        for multipass in [false, true] {
            assert_eq!(read("a.b=c", None, multipass), pair("a.b", "c"));
            assert_eq!(read("a.b=", None, multipass), pair("a.b", ""));
            assert_eq!(read("a.b", None, multipass).unwrap().1, None);
            assert!(read("=x", None, multipass).is_err());
        }
        assert_eq!(read("a", Some("-1"), false), pair("a", "-1"));
        assert_eq!(read("a=b=c", None, false), pair("a", "b=c"));
        assert_eq!(
            read("a=b=c", None, true).unwrap_err(),
            "Bad key-value format.\n"
        );
        assert_eq!(
            read("a", Some("b"), true).unwrap_err(),
            "Need exactly one key-value pair (in <key>=<value> form).\n"
        );
        assert!(read("a=b", Some("c"), false).is_err());
    }
}
