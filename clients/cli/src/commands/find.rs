//! `pileus find`.

use pileus_api::{CatalogEntry, Code};
use pileus_base::Error;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::images::Found;
use crate::render::{self, FormatOption};

/// Display available images to create instances from
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A name, alias or part of one; all images if not given
    #[arg(value_name = "STRING")]
    pub search: Option<String>,
    #[command(flatten)]
    pub format: FormatOption,
    /// Ask the image hosts again
    #[arg(long, hide = true)]
    pub force_update: bool,
    /// Show images that are out of support too
    #[arg(long, hide = true)]
    pub show_unsupported: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let search = args.search.as_deref().unwrap_or_default();
    if search.matches(':').count() > 1 {
        return Err(CommandError::usage(
            "Invalid remote and search string supplied",
        ));
    }
    let catalog = context.client().await?.catalog().await?;
    let found = find(&catalog, search)?;
    context.print(&render::images::found(&found, args.format.format))
}

/// An exact name gives that image under that name alone, as scripts know it; anything else is looked
/// for in names and aliases.
fn find(catalog: &[CatalogEntry], search: &str) -> Result<Vec<Found>, CommandError> {
    let all = catalog.iter().map(|entry| (entry, Found::of(entry)));
    if search.is_empty() {
        return Ok(all.map(|(_, found)| found).collect());
    }
    let (remote, name) = match search.split_once(':') {
        Some((remote, name)) => (Some(remote), name),
        None => (None, search),
    };
    let of_remote = |entry: &CatalogEntry| remote.is_none_or(|remote| remote == entry.remote);
    let exact = catalog.iter().find(|entry| {
        of_remote(entry) && (entry.name == name || entry.aliases.iter().any(|a| a == name))
    });
    if let Some(entry) = exact {
        return Ok(vec![Found {
            key: search.to_owned(),
            aliases: Vec::new(),
            remote: String::new(),
            ..Found::of(entry)
        }]);
    }
    let part = |entry: &CatalogEntry| {
        let names = std::iter::once(&entry.name).chain(&entry.aliases);
        of_remote(entry) && names.into_iter().any(|n| n.contains(name))
    };
    let found: Vec<Found> = all
        .filter(|(entry, _)| part(entry))
        .map(|(_, found)| found)
        .collect();
    if found.is_empty() {
        let text = match remote {
            Some(remote) => {
                format!("Unable to find an image matching \"{name}\" in remote \"{remote}\".")
            }
            None => format!("Unable to find an image matching \"{search}\""),
        };
        let err = Error::new(Code::ImageNotFound, text)
            .advise("pileus find without a name lists all images.");
        return Err(err.into());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    fn keys(search: &str) -> Vec<String> {
        let found = find(&samples::catalog(), search).unwrap();
        found.into_iter().map(|found| found.key).collect()
    }

    #[test]
    fn by_name_alias_and_part() {
        assert_eq!(keys(""), ["build:debian-13", "24.04"]);
        assert_eq!(keys("trixie"), ["trixie"]);
        assert_eq!(keys("build:debian-13"), ["build:debian-13"]);
        assert_eq!(keys("debi"), ["build:debian-13"]);
        let exact = find(&samples::catalog(), "debian").unwrap();
        assert!(exact[0].aliases.is_empty() && exact[0].remote.is_empty());
        for none in ["nope", "release:debian-13", "nope:24.04"] {
            assert!(find(&samples::catalog(), none).is_err(), "{none}");
        }
    }
}
