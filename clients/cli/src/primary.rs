//! The primary instance: the one that is meant if no name is given.

use crate::client_settings;
use crate::commands::launch;
use crate::context::Context;
use crate::error::CommandError;
use crate::several::Names;

/// The names that were given, or that of the primary instance.
pub(crate) fn or_primary(context: &Context, names: &Names) -> Result<Names, CommandError> {
    if names.all || !names.names.is_empty() {
        names.check()?;
        return Ok(names.clone());
    }
    Ok(Names {
        names: vec![name(context)?],
        all: false,
    })
}

/// Its name; an error if the user wants none.
pub(crate) fn name(context: &Context) -> Result<String, CommandError> {
    client_settings::primary_name(&context.env)?.ok_or_else(|| {
        CommandError::usage(
            "Name argument or --all is required\nNote: the primary instance is disabled.",
        )
    })
}

/// Whether this is its name.
pub(crate) fn is(context: &Context, name: &str) -> Result<bool, CommandError> {
    Ok(client_settings::primary_name(&context.env)?.as_deref() == Some(name))
}

/// Makes it, as `launch` with its name does.
pub(crate) async fn launch(
    context: &Context,
    name: &str,
    timeout: Option<String>,
) -> Result<(), CommandError> {
    let args = launch::Args {
        name: Some(name.to_owned()),
        timeout,
        ..Default::default()
    };
    launch::run(context, args).await?;
    Ok(())
}
