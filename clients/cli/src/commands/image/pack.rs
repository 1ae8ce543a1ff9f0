//! `pileus image pack`: an image out of an instance or a snapshot, as one file or on standard output.

use std::path::PathBuf;

use pileus_api::PackRequest;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::Format;
use crate::render::image::did;
use crate::render::node::Node;
use crate::several::{self, Target as Source};
use crate::streams::receive::Target;

/// Make an image of an instance or a snapshot
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
A thin copy of the instance is booted and cleaned up from inside: host keys, machine-id, cloud-init's state, keys that
pileus put there, logs, leases and shell histories go, and unused blocks are given back. The instance itself is not
touched; of one that runs the disk is as after a power cut, so stop it or take a snapshot where that matters. What its
user made stays: look for secrets of your own before you share the image.

Examples:
  pileus image pack web web.tar.zst
  pileus image pack web.before - | ssh other pileus image import -
  pileus image pack web web.tar.zst --tag web-1 && pileus launch web-1")]
pub struct Args {
    /// The instance, or one of its snapshots
    #[arg(value_name = "NAME[.SNAPSHOT]", add = complete::targets())]
    pub source: String,
    /// Where to write the image; - is standard output
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Keep the image in the store as well, under this name
    #[arg(short, long, value_name = "NAME")]
    pub tag: Option<String>,
    /// The disk as it is: boot nothing, clean nothing up
    #[arg(long)]
    pub keep_identity: bool,
    /// What the image is called in lists; the instance's name if not given
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
    /// Have the image ask for as much memory and as many CPUs as the instance has
    #[arg(long)]
    pub with_machine: bool,
    /// How long the copy may take to boot
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
    /// Replace a file that is there
    #[arg(short, long)]
    pub force: bool,
}

pub(super) async fn run(context: &Context, args: &Args, format: Format) -> Outcome {
    let (what, command) = ("A packed image", "pileus image pack NAME -");
    let target = Target::of(context, &args.file, args.force, what, command)?;
    let source = Source::of(&args.source);
    let request = PackRequest {
        snapshot: source.snapshot.as_deref().map(str::parse).transpose()?,
        keep_identity: args.keep_identity,
        tag: args.tag.clone(),
        title: args.title.clone(),
        with_machine: args.with_machine,
        timeout: several::timeout(args.timeout.as_deref())?,
    };
    let client = context.client().await?;
    let begin = async || client.pack_instance(&source.instance, &request).await;
    target
        .receive(context, &client, &args.source, begin)
        .await?;
    match target.is_stdout() {
        true => Ok(0),
        false => {
            let words = format!("Packed: {} into {}\n", args.source, args.file.display());
            let file = Node::text(args.file.display().to_string());
            let done = [("packed", Node::text(&args.source)), ("file", file)];
            context.print(&did(&words, &done, format))
        }
    }
}
