//! `pileus image import` and `export`: images as files of this program's user, or through a pipe.

use std::path::PathBuf;

use pileus_api::{ImageImportQuery, OperationEvent, Phase};

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::image::did;
use crate::render::node::Node;
use crate::render::{self, Format};
use crate::streams::receive::Target;
use crate::streams::send::Source;

/// Bring a file into the store
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The file is sent to the daemon, which needs no access to it. It may be a packed image (image.tar.zst), qcow2 or a raw
disk, also compressed with xz, gzip or zstd. It is checked as it comes; one that is damaged or breaks a rule leaves
nothing.

Examples:
  pileus image import web.tar.zst --tag web && pileus launch web
  ssh builder cat web.tar.zst | pileus image import -")]
pub struct Import {
    /// The image; - is standard input
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Give the image this name
    #[arg(short, long, value_name = "NAME")]
    pub tag: Option<String>,
    /// What the file must hash to
    #[arg(long, value_name = "DIGEST")]
    pub checksum: Option<String>,
}

pub(super) async fn import(context: &Context, args: &Import, format: Format) -> Outcome {
    let name = args.file.file_name().map(|name| name.to_string_lossy());
    let checksum = args.checksum.as_deref().map(str::parse).transpose()?;
    let source = Source::open(context, &args.file, "An image", "pileus image import -")?;
    let query = ImageImportQuery {
        checksum,
        tag: args.tag.clone(),
        name: name.filter(|name| name != "-").map(Into::into),
        room: source.room(),
    };
    let client = context.client().await?;
    let mut line = context.progress().line("the image");
    line.event(&OperationEvent::Phase {
        phase: Phase::RetrievingImage,
    });
    let upload = async |bytes| client.import_image(&query, bytes).await;
    let operation = source.send(&mut line, upload).await?;
    line.end(&operation);
    drop(line);
    let details = client.image(&super::result_of(operation)?).await?;
    context.print(&render::image::came("Imported", &details, format))
}

/// Write an image of the store to one file
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The file is a packed image (image.tar.zst): the disk, the machine that it wants, and where it comes from. It appears
under its name when it is complete. The same image gives the same bytes.

Examples:
  pileus image export web web.tar.zst
  pileus image export web - | ssh other pileus image import -
  zstd -dqc web.tar.zst | tar -t           what is in it")]
pub struct Export {
    /// A tag, the digest (or its first digits), or where it came from
    #[arg(value_name = "IMAGE", add = complete::stored_images())]
    pub image: String,
    /// Where to write it; - is standard output
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Replace a file that is there
    #[arg(short, long)]
    pub force: bool,
}

pub(super) async fn export(context: &Context, args: &Export, format: Format) -> Outcome {
    let (what, command) = ("A packed image", "pileus image export IMAGE -");
    let target = Target::of(context, &args.file, args.force, what, command)?;
    let client = context.client().await?;
    let name = super::named(context, &args.image);
    let begin = async || client.export_image(&name).await;
    target.receive(context, &client, &args.image, begin).await?;
    match target.is_stdout() {
        true => Ok(0),
        false => {
            let words = format!("Exported: {}\n", args.image);
            let file = Node::text(args.file.display().to_string());
            let done = [("exported", Node::text(&args.image)), ("file", file)];
            context.print(&did(&words, &done, format))
        }
    }
}
