//! `pileus image build`: an image by a recipe. The recipe's file is read here, and what it names of this user's
//! files; the daemon carries it out. What the steps say is shown as it comes.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pileus_api::image_making::{From, MOST_COPIED, MOST_REQUEST, Recipe, Text};
use pileus_api::{BuildRequest, Size};
use pileus_base::{ResultExt, files};
use tokio::sync::mpsc;

use crate::commands::launch::absolute;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::Format;
use crate::render::image::did;
use crate::render::node::Node;
use crate::streams::receive::Target;

const MOST_RECIPE: u64 = 512 << 10;
const PIECE: usize = 256 << 10;

/// Make an image by a recipe
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
A recipe is a YAML file: an image to begin with, steps that run scripts in it as root or copy files into it, and what
the result is called. It is carried out in a throw-away machine, which is cleaned up and becomes the image. A recipe may
also boot an ISO or a kernel that installs a system on an empty disk. docs/image-build.md tells all keys.

Example (web.yaml):
  from: debian-13
  steps:
    - run: |
        apt-get update
        apt-get install -y nginx
    - copy: {from: ./site, to: /var/www/}

  pileus image build web.yaml web.tar.zst --tag web && pileus launch web")]
pub struct Args {
    /// The recipe
    #[arg(value_name = "RECIPE", value_hint = clap::ValueHint::FilePath)]
    pub recipe: PathBuf,
    /// Where to write the image; - is standard output
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Keep the image in the store as well, under this name
    #[arg(short, long, value_name = "NAME")]
    pub tag: Option<String>,
    /// If a step fails, leave the machine for an hour to look into it
    #[arg(long)]
    pub keep_on_error: bool,
    /// Replace a file that is there
    #[arg(short, long)]
    pub force: bool,
}

pub(super) async fn run(context: &Context, args: &Args, format: Format) -> Outcome {
    let (what, command) = ("A packed image", "pileus image build RECIPE -");
    let target = Target::of(context, &args.file, args.force, what, command)?;
    let file = context.env.current_folder.join(&args.recipe);
    let mut recipe = read(&file, &args.recipe)?;
    let folder = file.parent().unwrap_or(Path::new("/")).to_owned();
    resolve(&mut recipe, &folder)?;
    let (files, copies) = pack(&recipe, &folder)?;
    let request = BuildRequest {
        recipe,
        tag: args.tag.clone(),
        keep_on_error: args.keep_on_error,
        copies,
    };
    let client = context.client().await?;
    // What the steps say is what one waits for.
    let telling = Context {
        env: context.env.clone(),
        place: context.place.clone(),
        verbose: context.verbose.max(1),
    };
    let begin = async || client.build_image(&request, stream(files)).await;
    let about = args.recipe.display().to_string();
    target.receive(&telling, &client, &about, begin).await?;
    match target.is_stdout() {
        true => Ok(0),
        false => {
            let file = args.file.display().to_string();
            let done = [("built", Node::text(about)), ("file", Node::text(&file))];
            context.print(&did(&format!("Built: {file}\n"), &done, format))
        }
    }
}

/// Reads a recipe; what is wrong is told with its line.
fn read(file: &Path, shown: &Path) -> Result<Recipe, CommandError> {
    let bytes = files::read_bounded(file, MOST_RECIPE)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| CommandError::usage(format!("{} is no text", shown.display())))?;
    parse(&text).map_err(|why| {
        CommandError::usage(format!("{}: {why}", shown.display()))
            .hint("docs/image-build.md tells all keys of a recipe.")
    })
}

fn parse(text: &str) -> Result<Recipe, String> {
    serde_saphyr::from_str(text).map_err(|err| err.without_snippet().to_string())
}

/// The daemon runs in another folder, and does not read this user's texts.
fn resolve(recipe: &mut Recipe, folder: &Path) -> Result<(), CommandError> {
    let host_file = |path: &str| {
        let file = folder.join(path);
        let file = std::path::absolute(&file).unwrap_or(file);
        file.to_string_lossy().into_owned()
    };
    match &mut recipe.from {
        From::Image(image) => *image = absolute(image, folder),
        From::Iso(from) if !from.iso.contains("://") => from.iso = host_file(&from.iso),
        From::Iso(_) => {}
        From::Kernel(from) => {
            from.kernel = host_file(&from.kernel);
            from.initrd = from.initrd.as_deref().map(host_file);
        }
    }
    if let Some(Text::File(named)) = &recipe.user_data {
        let file = folder.join(&named.file);
        let bytes = files::read_bounded(&file, MOST_REQUEST as u64)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| CommandError::usage(format!("{} is no text", file.display())))?;
        recipe.user_data = Some(Text::Inline(text));
    }
    Ok(())
}

/// What the recipe copies, as tars one after the other, and how long each is.
fn pack(recipe: &Recipe, folder: &Path) -> Result<(File, Vec<u64>), CommandError> {
    let mut all = tempfile::tempfile().io("Making room for the recipe's files")?;
    let mut lengths = Vec::new();
    let mut before = 0;
    for copy in recipe.steps.iter().filter_map(|step| step.copy.as_ref()) {
        let source = folder.join(&copy.from);
        let what = format!("Packing {}", source.display());
        // A link that the recipe names is followed, those inside a folder are kept.
        let source = source.canonicalize().io(&what)?;
        let mut tar = tar::Builder::new(&mut all);
        tar.follow_symlinks(false);
        match source.is_dir() {
            true => tar.append_dir_all("it", &source),
            false => tar.append_path_with_name(&source, "it"),
        }
        .io(&what)?;
        tar.into_inner().and_then(Write::flush).io(&what)?;
        let end = all.stream_position().io(&what)?;
        lengths.push(end - before);
        before = end;
        if end > MOST_COPIED {
            let text = format!("The recipe's files have more than {}", Size(MOST_COPIED));
            return Err(CommandError::usage(text).hint("Have a step fetch what is large."));
        }
    }
    all.rewind().io("Packing the recipe's files")?;
    Ok((all, lengths))
}

/// The bytes of a file, read in a thread as fast as the daemon takes them.
fn stream(mut file: File) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let (sender, pieces) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let piece = match file.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => Ok(Bytes::copy_from_slice(&buffer[..n])),
                Err(err) => Err(err),
            };
            let failed = piece.is_err();
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    futures_util::stream::unfold(pieces, |mut pieces| async move {
        Some((pieces.recv().await?, pieces))
    })
}

#[cfg(test)]
mod tests {
    use pileus_api::image_making::Seconds;

    use super::*;

    const FULL: &str = "\
# all keys
from: debian-13
cpus: 2
memory: 2G
disk: 10G
user-data: |
  #cloud-config
  {}
timeout: 20m
steps:
  - name: packages
    run: |
      apt-get update
    shell: bash -eu
    env: {DEBIAN_FRONTEND: noninteractive, PORT: 8080, NO: no}
    timeout: 1h
  - copy: {from: ./site, to: /var/www/}
clean: true
title: A web server
os: Debian
release: 13
version: 2026.1
machine: {memory: 2048, cores: 2}
";

    #[test]
    fn a_recipe_with_all_keys() {
        let recipe = parse(FULL).unwrap();
        assert_eq!(recipe.memory, Some(Size::gib(2)));
        assert_eq!(recipe.timeout, Some(Seconds(1200)));
        let env = &recipe.steps[0].env;
        assert_eq!(
            [&env["PORT"], &env["NO"]],
            ["8080", "no"],
            "what looks like a number or a truth value is text all the same"
        );
        assert_eq!(recipe.steps[0].run.as_deref(), Some("apt-get update\n"));
        let said = [&recipe.release, &recipe.version];
        assert_eq!(said.map(|s| s.as_deref()), [Some("13"), Some("2026.1")]);
        assert_eq!(recipe.machine.unwrap()["cores"], 2);
        let iso = parse("from: {iso: a.iso}\ndisk: 4G\n").unwrap();
        assert!(matches!(iso.from, From::Iso(_)));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, word) in [
            ("from: a\nstep: []\n", 2, "step"),
            ("from: a\nsteps:\n  - runs: x\n", 3, "runs"),
            ("from: a\nsteps:\n  - copy: {from: a, into: b}\n", 3, "into"),
            ("from: a\ncpus: many\n", 2, "u32"),
            ("from: a\nmemory: 2 gigs\n", 2, "gigs"),
            ("from: {iso: a, initrd: b}\n", 1, "kernel"),
            ("from: a\nfrom: b\n", 2, "from"),
            ("from: a\nsteps:\n  - run: [\n", 0, ""),
            ("steps: []\n", 0, "from"),
            ("", 0, ""),
        ] {
            let err = parse(text).unwrap_err();
            let at = format!("line {line}");
            assert!(line == 0 || err.contains(&at), "{text}: {err}");
            assert!(err.contains(word), "{text}: {err}");
            assert!(!err.contains('\n'), "{text}: {err}");
        }
    }

    #[test]
    fn files_are_looked_for_beside_the_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        std::fs::write(folder.join("setup.yaml"), "#cloud-config\n{}\n").unwrap();
        std::fs::create_dir_all(folder.join("site/a")).unwrap();
        std::fs::write(folder.join("site/a/f"), "1").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("site/l")).unwrap();
        let text = "from: {kernel: vmlinuz, initrd: /boot/i}\nuser-data: {file: setup.yaml}\n\
                    steps: [{copy: {from: site, to: /}}, {copy: {from: setup.yaml, to: /x}}]\n";
        let mut recipe = parse(text).unwrap();
        resolve(&mut recipe, folder).unwrap();
        let From::Kernel(from) = &recipe.from else {
            panic!()
        };
        assert_eq!(from.kernel, folder.join("vmlinuz").to_str().unwrap());
        assert_eq!(from.initrd.as_deref(), Some("/boot/i"));
        assert!(matches!(&recipe.user_data, Some(Text::Inline(text)) if text.contains("{}")));
        let (mut file, lengths) = pack(&recipe, folder).unwrap();
        let names = |file: &mut File, length: u64| {
            let mut archive = tar::Archive::new(file.take(length));
            let entries = archive.entries().unwrap();
            let names = entries.map(|entry| entry.unwrap().path().unwrap().display().to_string());
            let names = names.collect::<Vec<_>>();
            let mut rest = archive.into_inner();
            io::copy(&mut rest, &mut io::sink()).unwrap();
            names
        };
        let mut first = names(&mut file, lengths[0]);
        first.sort();
        let tidy = |name: &String| name.trim_end_matches('/').to_owned();
        let first: Vec<_> = first.iter().map(tidy).collect();
        assert_eq!(first, ["it", "it/a", "it/a/f", "it/l"]);
        assert_eq!(names(&mut file, lengths[1]), ["it"]);
    }
}
