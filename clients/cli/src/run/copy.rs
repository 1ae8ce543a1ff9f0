//! Copies files into and out of the guest: a tar archive through a command's standard streams.
//!
//! ```text
//! in    thread: pack ─▶ 4 pieces ─▶ exec's stdin  ─▶ guest: tar -x
//! out   guest: tar -c ─▶ exec's stdout ─▶ 4 pieces ─▶ thread: unpack
//! ```

use std::ffi::OsString;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use pileus_api::{Code, ExecRequest};
use pileus_base::{Error, Result};
use pileus_client::{Client, ExecInput, ExecOutput, ExecPart};
use tokio::sync::mpsc;

use super::options::Copy;
use super::{pack, unpack};
use crate::error::CommandError;
use crate::session::{self, End};

/// What a guest's tar may say on standard error before the rest is left out.
const MAX_ERRORS: usize = 8 << 10;
const MAX_ENTRIES: u64 = 1_000_000;
/// Exit code of the script below: there is no such file.
const MISSING: u8 = 66;

/// In the guest: `sh -c IN sh WORKDIR TO NAME KIND`, the archive on standard input. Folders that the
/// user may not make are made by root and given to the user.
const IN: &str = r#"
need() {
    [ -d "$1" ] || mkdir -p -- "$1" 2>/dev/null ||
        sudo -n install -d -o "$(id -u)" -g "$(id -g)" -- "$1"
}
set -e
if [ -n "$1" ]; then need "$1"; cd -- "$1"; fi
to=$2
case $to in '~/'*) to=$HOME/${to#'~/'} ;; esac
case $to in
'') to=./$3 ;;
*/) to=$to$3 ;;
*) if [ "$4" = file ] && [ -d "$to" ]; then to=$to/$3; fi ;;
esac
if [ "$4" = folder ]; then
    need "$to"
    exec tar -x -o -p -f - -C "$to"
fi
folder=$(dirname -- "$to")
need "$folder"
part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT
tar -x -o -p -f - -C "$part"
mv -f -- "$part/file" "$to" 2>/dev/null || sudo -n mv -f -- "$part/file" "$to"
"#;

/// In the guest: `sh -c OUT sh WORKDIR FROM`, the archive on standard output.
const OUT: &str = r#"
from=$2
case $from in '~/'*) from=$HOME/${from#'~/'} ;; esac
if [ -n "$1" ]; then cd -- "$1" || exit 66; fi
if ! [ -e "$from" ]; then echo "$2 does not exist" >&2; exit 66; fi
if [ -d "$from" ]; then
    hard=
    if tar --hard-dereference --version >/dev/null 2>&1; then hard=--hard-dereference; fi
    exec tar -c $hard -f - -C "$from" .
fi
cd -- "$(dirname -- "$from")"
exec tar -c -h -f - "./$(basename -- "$from")"
"#;

/// Where copies happen.
pub(crate) struct Place<'a> {
    pub client: &'a Client,
    pub name: &'a str,
    /// In the guest; its home if not given.
    pub working_directory: Option<&'a str>,
    /// On this host.
    pub folder: &'a Path,
}

impl Place<'_> {
    fn request(&self, script: &str, args: &[&str]) -> ExecRequest {
        let words = [
            "sh",
            "-c",
            script,
            "sh",
            self.working_directory.unwrap_or_default(),
        ];
        ExecRequest {
            command: words.iter().chain(args).map(|w| (*w).to_owned()).collect(),
            ..Default::default()
        }
    }
}

/// Refuses, before anything is begun, what can't be copied.
pub(crate) fn check(
    folder: &Path,
    copy_in: &[Copy],
    copy_out: &[Copy],
) -> Result<(), CommandError> {
    for copy in copy_in {
        let refused = |why: &str| {
            let text = format!("error: {} can't be copied: {why}", copy.from);
            CommandError::usage(text)
        };
        let source = folder.join(&copy.from).metadata();
        let source = source.map_err(|err| refused(&err.to_string()))?;
        if !source.is_dir() && !source.is_file() {
            return Err(refused("it is neither a file nor a folder"));
        }
    }
    for copy in copy_out {
        target(folder, copy)?;
    }
    Ok(())
}

/// Copies into the guest; returns what was left out.
pub(crate) async fn copy_in(place: &Place<'_>, copy: &Copy) -> Result<Vec<String>, CommandError> {
    let source = place.folder.join(&copy.from);
    let failed = |err: io::Error| Error::io(format_args!("Copying in {}", copy.from), err);
    let folder = source.metadata().map_err(failed)?.is_dir();
    let name = name_of(&source).unwrap_or_else(|| ".".into());
    let to = copy.to.as_deref().unwrap_or_default();
    let args = [
        to,
        &name.to_string_lossy(),
        if folder { "folder" } else { "file" },
    ];
    let (input, mut output) =
        session::open(place.client, place.name, &place.request(IN, &args)).await?;
    let (sender, pieces) = mpsc::channel(4);
    let packing = tokio::task::spawn_blocking(move || {
        pack::pack(&source, BufWriter::with_capacity(64 << 10, Pieces(sender)))
    });
    let mut skipped = Vec::new();
    let feed = async {
        let input = feed(input, pieces).await;
        match packing.await {
            Ok(Ok(left_out)) => skipped = left_out,
            // The guest ended first; what it says counts.
            Ok(Err(err)) if err.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(err)) => return failed(err),
            Err(_) => return Error::internal("The thread that packs ended"),
        }
        if let Some(mut input) = input {
            // If it can't be sent, the reading side learns why.
            let _ = input.eof().await;
        }
        std::future::pending().await
    };
    let mut said = Said::default();
    let end = tokio::select! {
        end = said.listen(&mut output, None) => end?,
        err = feed => return Err(err.into()),
    };
    match end {
        End::Exit(0) => Ok(skipped),
        _ => Err(said
            .error(format!("{} could not be copied in", copy.from))
            .into()),
    }
}

/// What became of a copy out of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum CopiedOut {
    Done,
    Missing,
}

/// Copies out of the guest, at most so many bytes.
pub(crate) async fn copy_out(
    place: &Place<'_>,
    copy: &Copy,
    max_bytes: u64,
) -> Result<CopiedOut, CommandError> {
    let (target, name) = target(place.folder, copy)?;
    let request = place.request(OUT, &[&copy.from]);
    let (mut input, mut output) = session::open(place.client, place.name, &request).await?;
    // A script that reads nothing needs no end of its input; if it is gone, reading tells why.
    let _ = input.eof().await;
    let (sender, pieces) = mpsc::channel(4);
    let bounds = unpack::Bounds {
        bytes: max_bytes,
        entries: MAX_ENTRIES,
    };
    let unpacking = tokio::task::spawn_blocking(move || {
        unpack::unpack(Arriving::new(pieces), &target, &name, bounds)
    });
    let mut said = Said::default();
    // An archive that was refused is not read to its end.
    let listened = said.listen(&mut output, Some(sender)).await;
    drop((input, output));
    let unpacked = unpacking
        .await
        .map_err(|_| Error::internal("The thread that unpacks ended"))?;
    match (listened, unpacked) {
        (Ok(End::Exit(MISSING)), _) => Ok(CopiedOut::Missing),
        // GNU tar: some file changed while it was read.
        (Ok(End::Exit(0 | 1)), Ok(())) => Ok(CopiedOut::Done),
        (Ok(End::Exit(0 | 1)) | Err(_), Err(err)) if !said.early => Err(err.into()),
        (Err(err), _) => Err(err),
        (Ok(_), _) => Err(said
            .error(format!("{} could not be copied out", copy.from))
            .into()),
    }
}

/// Where a copy goes on this host, and its name if that is a folder.
fn target(folder: &Path, copy: &Copy) -> Result<(PathBuf, OsString)> {
    let name = name_of(Path::new(&copy.from));
    let to = copy.to.as_deref();
    let name = match (name, to) {
        (Some(name), _) => name,
        (None, Some(to)) if !to.ends_with('/') => ".".into(),
        (None, _) => {
            let text = format!("{} has no name of its own to be copied out to", copy.from);
            return Err(Error::new(Code::InvalidArgument, text)
                .advise("Say where it goes: --copy-out PATH:FOLDER."));
        }
    };
    let target = match to {
        None => folder.join(&name),
        Some(to) if to.ends_with('/') => folder.join(to).join(&name),
        Some(to) => folder.join(to),
    };
    Ok((target, name))
}

fn name_of(path: &Path) -> Option<OsString> {
    // `x/.` means what is in x, as `.` does.
    if path.as_os_str().to_string_lossy().ends_with("/.") {
        return None;
    }
    path.file_name().map(ToOwned::to_owned)
}

/// Sends an archive; returns the way to the guest if it is still open.
async fn feed(mut input: ExecInput, mut pieces: mpsc::Receiver<Bytes>) -> Option<ExecInput> {
    while let Some(piece) = pieces.recv().await {
        input.stdin(piece).await.ok()?;
    }
    Some(input)
}

/// What a guest says on standard error.
#[derive(Default)]
struct Said {
    errors: Vec<u8>,
    /// The guest ended without success.
    early: bool,
}

impl Said {
    /// Listens until the command ends; its standard output goes to `to`, as long as that is read.
    async fn listen(
        &mut self,
        output: &mut ExecOutput,
        to: Option<mpsc::Sender<Bytes>>,
    ) -> Result<End, CommandError> {
        loop {
            match output.next().await? {
                ExecPart::Stdout(bytes) => {
                    if let Some(to) = &to
                        && to.send(bytes).await.is_err()
                    {
                        return Err(Error::internal("What was copied was not taken").into());
                    }
                }
                ExecPart::Stderr(bytes) => {
                    let free = MAX_ERRORS.saturating_sub(self.errors.len());
                    self.errors
                        .extend_from_slice(&bytes[..bytes.len().min(free)]);
                }
                ExecPart::Event(event) => {
                    if let Some(end) = session::ended(event) {
                        self.early = !matches!(end, Ok(End::Exit(0 | 1)));
                        return end;
                    }
                }
            }
        }
    }

    fn error(&self, what: String) -> Error {
        let mut err = Error::new(Code::ExecFailed, what);
        let text = String::from_utf8_lossy(&self.errors);
        err.details = text.lines().take(20).map(str::to_owned).collect();
        err
    }
}

/// Bytes written to it go into a queue.
struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.blocking_send(Bytes::copy_from_slice(bytes)) {
            Ok(()) => Ok(bytes.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes of a queue, to be read.
struct Arriving {
    pieces: mpsc::Receiver<Bytes>,
    now: Bytes,
}

impl Arriving {
    fn new(pieces: mpsc::Receiver<Bytes>) -> Self {
        let now = Bytes::new();
        Self { pieces, now }
    }
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.now = piece,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.now.len());
        self.now.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_copy_goes() {
        let read = |from: &str, to: Option<&str>| {
            let copy = Copy {
                from: from.into(),
                to: to.map(str::to_owned),
            };
            let (target, _) = target(Path::new("/here"), &copy).ok()?;
            Some(target.display().to_string())
        };
        for (from, to, expected) in [
            ("dist", None, Some("/here/dist")),
            ("/var/log/syslog", None, Some("/here/syslog")),
            ("dist", Some("out"), Some("/here/out")),
            ("dist", Some("out/"), Some("/here/out/dist")),
            ("a/dist/", Some("/tmp/x"), Some("/tmp/x")),
            (".", Some("out"), Some("/here/out")),
            (".", None, None),
            ("a/.", None, None),
            ("..", Some("x/"), None),
        ] {
            assert_eq!(read(from, to).as_deref(), expected, "{from} {to:?}");
        }
    }
}
