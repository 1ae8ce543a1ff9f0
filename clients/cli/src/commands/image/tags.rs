//! `pileus image tag` and `untag`: names that people give to images.

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::image::did;
use crate::render::node::Node;
use crate::render::{self, Format};

/// Give an image a name, or take it away
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The name launches the image (pileus launch NAME) and keeps it: an image with a tag is neither pruned nor collected.
A name that another image has changes hands.

Examples:
  pileus image tag 7e152a1c web
  pileus image tag --remove web            the same as: pileus image untag web")]
pub struct Tag {
    /// A tag, the digest (or its first digits), or where it came from
    #[arg(value_name = "IMAGE", add = complete::stored_images(), required_unless_present = "remove")]
    pub image: Option<String>,
    /// The new name
    #[arg(value_name = "NAME", required_unless_present = "remove")]
    pub name: Option<String>,
    /// Take this name away
    #[arg(long, value_name = "NAME", add = complete::tags(), conflicts_with_all = ["image", "name"])]
    pub remove: Option<String>,
}

pub(super) async fn tag(context: &Context, args: &Tag, format: Format) -> Outcome {
    let client = context.client().await?;
    match (&args.image, &args.name, &args.remove) {
        (Some(image), Some(name), None) => {
            let image = super::named(context, image);
            let details = client.tag_image(&image, name).await?;
            match format {
                // As it always was: nothing to say.
                Format::Table => Ok(0),
                _ => context.print(&render::image::info(&details, format)),
            }
        }
        (_, _, Some(name)) => {
            client.untag_image(name).await?;
            untagged(context, std::slice::from_ref(name), format)
        }
        // The grammar has no other.
        _ => Err(CommandError::usage("An image and a name are required")),
    }
}

fn untagged(context: &Context, names: &[String], format: Format) -> Outcome {
    context.print(&did("", &[("untagged", Node::texts(names))], format))
}

/// Take names of images away
#[derive(Debug, Clone, clap::Args)]
pub struct Untag {
    /// The names
    #[arg(value_name = "NAME", required = true, add = complete::tags())]
    pub names: Vec<String>,
}

pub(super) async fn untag(context: &Context, args: &Untag, format: Format) -> Outcome {
    let client = context.client().await?;
    let mut failed = Vec::new();
    for name in &args.names {
        if let Err(err) = client.untag_image(name).await {
            failed.push((name.clone(), CommandError::from(err)));
        }
    }
    match failed.is_empty() {
        true => untagged(context, &args.names, format),
        false => Err(CommandError::several(failed)),
    }
}
