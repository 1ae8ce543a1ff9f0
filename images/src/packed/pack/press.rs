//! A stream → frames of zstd, one of each piece of it, made by many threads and given in order. A frame depends on
//! its piece alone, so who makes it, and beside how many others, makes no difference to the bytes.
//!
//! ```text
//! this thread ── a piece's number, room for its frame ──→ threads: read, compress
//!      ↑  puts frames in order, and gives their room anew      │
//!      └───────────────────────── frames ──────────────────────┘
//! ```

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use pileus_base::{Error, Result, ResultExt};
use zstd::zstd_safe::{CCtx, CParameter, Strategy, compress_bound, get_error_name};

use super::stream::Stream;

/// Bytes of the stream in a frame. Of longer ones the archive gets hardly smaller.
const PIECE: u64 = 4 << 20;
/// The ancestor's level …
const LEVEL: i32 = 3;
/// … and what is better here for disks: one table of matches in place of two. That takes a quarter less time, and the
/// archive gets hardly larger: by 2 % at most, of files of a system.
const FASTER: [CParameter; 4] = [
    CParameter::Strategy(Strategy::ZSTD_fast),
    CParameter::WindowLog(21),
    CParameter::HashLog(16),
    CParameter::MinMatch(5),
];

/// Takes a frame, and is told of how many bytes of the stream it is.
type Put<'a> = &'a mut dyn FnMut(&[u8], u64) -> Result<()>;

/// A piece to be compressed, or one that was.
struct Frame {
    number: u64,
    bytes: Vec<u8>,
}

/// Compresses all of `stream` in `threads` threads (at least one).
pub fn press(stream: &Stream<'_>, threads: usize, put: Put<'_>) -> Result<()> {
    let threads = threads.max(1);
    let (give, wanted) = channel();
    let wanted = Mutex::new(wanted);
    std::thread::scope(|scope| {
        let (made, frames) = channel();
        for _ in 0..threads {
            let (wanted, made) = (&wanted, made.clone());
            scope.spawn(move || work(stream, wanted, &made));
        }
        drop(made);
        // Two for each thread, so that none waits for its turn; and one that is being put.
        let room = 2 * threads + 1;
        // Nothing is wanted any more when this has ended, whatever way it does.
        in_order(stream, room, give, frames, put)
    })
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "dropped, they end the threads"
)]
fn in_order(
    stream: &Stream<'_>,
    room: usize,
    give: Sender<Frame>,
    frames: Receiver<Result<Frame>>,
    put: Put<'_>,
) -> Result<()> {
    let gone = || Error::internal("The threads that compress an archive have ended");
    let pieces = stream.len().div_ceil(PIECE);
    let mut rooms = vec![Vec::new(); room];
    let mut made: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let (mut given, mut done) = (0, 0);
    while done < pieces {
        while given < pieces
            && let Some(bytes) = rooms.pop()
        {
            let number = given;
            give.send(Frame { number, bytes }).map_err(|_| gone())?;
            given += 1;
        }
        if let Some(bytes) = made.remove(&done) {
            put(&bytes, length(stream, done))?;
            done += 1;
            rooms.push(bytes);
        } else {
            let frame: Frame = frames.recv().map_err(|_| gone())??;
            made.insert(frame.number, frame.bytes);
        }
    }
    Ok(())
}

fn length(stream: &Stream<'_>, number: u64) -> u64 {
    (stream.len() - number * PIECE).min(PIECE)
}

/// Makes frames until none is wanted any more.
fn work(stream: &Stream<'_>, wanted: &Mutex<Receiver<Frame>>, made: &Sender<Result<Frame>>) {
    let next = || wanted.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let all = || -> Result<()> {
        let mut context = context()?;
        let mut piece = Vec::new();
        while let Ok(mut frame) = next() {
            piece.resize(length(stream, frame.number) as usize, 0);
            stream
                .read_at(&mut piece, frame.number * PIECE)
                .io("Reading the disk")?;
            frame.bytes.clear();
            frame.bytes.reserve(compress_bound(piece.len()));
            context
                .compress2(&mut frame.bytes, &piece)
                .map_err(|code| Error::internal(get_error_name(code)))?;
            if made.send(Ok(frame)).is_err() {
                break;
            }
        }
        Ok(())
    };
    // Told, as else who waits for this frame waits for ever.
    let ended = catch_unwind(AssertUnwindSafe(all));
    let ended = ended.unwrap_or_else(|_| Err(Error::internal("A thread that compresses panicked")));
    if let Err(err) = ended {
        let _ = made.send(Err(err));
    }
}

fn context() -> Result<CCtx<'static>> {
    let mut context =
        CCtx::try_create().ok_or_else(|| Error::internal("No memory for a zstd encoder"))?;
    let mut set = |parameter| {
        let set = context.set_parameter(parameter);
        set.map_err(|code| Error::internal(get_error_name(code)))
    };
    set(CParameter::CompressionLevel(LEVEL))?;
    set(CParameter::ChecksumFlag(true))?;
    FASTER.into_iter().try_for_each(|one| set(one).map(drop))?;
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::extents::Extent;
    use crate::archive::out::Tar;
    use pileus_base::Code;
    use std::os::unix::fs::FileExt;

    #[test]
    fn each_piece_is_a_frame_that_needs_no_other() {
        let disk = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..9_u32 << 18)
            .flat_map(|n| (n / 3).to_le_bytes())
            .collect();
        disk.write_all_at(&bytes, 0).unwrap();
        let size = bytes.len() as u64;
        let extents = [Extent {
            offset: 0,
            len: size,
        }];
        let stream = Stream::new(Tar::new(Vec::new()), &disk, size, &extents).unwrap();
        for threads in [0, 1, 2, 7] {
            let (mut got, mut lengths) = (Vec::new(), Vec::new());
            press(&stream, threads, &mut |frame, length| {
                got.extend(zstd::decode_all(frame).unwrap());
                lengths.push(length);
                assert_eq!(got.len() as u64, lengths.iter().sum::<u64>());
                Ok(())
            })
            .unwrap();
            assert_eq!(lengths, [PIECE, PIECE, stream.len() - 2 * PIECE]);
            assert!(got[512..][..bytes.len()] == bytes);
        }
        let full = || Err(Error::new(Code::NoSpace, "full"));
        let err = press(&stream, 2, &mut |_, _| full()).unwrap_err();
        assert_eq!(err.code, Code::NoSpace);
        disk.set_len(5 << 20).unwrap();
        assert!(press(&stream, 2, &mut |_, _| Ok(())).is_err());
    }
}
