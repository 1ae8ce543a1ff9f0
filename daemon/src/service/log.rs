//! The serial console's log: the end of it, and what is added.

use std::io::SeekFrom;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use pileus_base::{Result, ResultExt};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::Service;

const BLOCK: usize = 64 << 10;
/// How often a log that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Service {
    /// The log's last lines (all if not said), and with `follow` what comes. A guest writes it, so
    /// its bytes are passed on as they are and must be made harmless before a terminal sees them.
    pub fn log(
        &self,
        name: &str,
        follow: bool,
        tail: Option<u32>,
    ) -> Result<impl Stream<Item = Result<Bytes>> + use<>> {
        let instance = self.parts.registry.get(name)?;
        let path = self.parts.layout.instance(instance.id).join("console.log");
        let reader = Reader {
            path,
            at: None,
            tail,
            follow,
        };
        Ok(futures_util::stream::unfold(reader, |mut reader| async {
            let next = reader.next().await.transpose()?;
            Some((next, reader))
        }))
    }
}

struct Reader {
    path: PathBuf,
    at: Option<u64>,
    tail: Option<u32>,
    follow: bool,
}

impl Reader {
    /// The next piece; nothing when the log is at its end and is not followed.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let piece = self.read().await?;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
            if !self.follow {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn read(&mut self) -> Result<Bytes> {
        let mut file = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file,
            // An instance that never ran has no log yet.
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Bytes::new()),
            Err(err) => return Err(err).io("Opening the console's log"),
        };
        let what = "Reading the console's log";
        let len = file.metadata().await.io(what)?.len();
        let at = match self.at {
            // The log was cut because it grew too long.
            Some(at) if at > len => 0,
            Some(at) => at,
            None => self.first(&mut file, len).await.io(what)?,
        };
        file.seek(SeekFrom::Start(at)).await.io(what)?;
        let mut block = vec![0; BLOCK];
        let read = file.read(&mut block).await.io(what)?;
        block.truncate(read);
        self.at = Some(at + read as u64);
        Ok(block.into())
    }

    /// Where the last `tail` lines begin.
    async fn first(&self, file: &mut tokio::fs::File, len: u64) -> std::io::Result<u64> {
        let Some(wanted) = self.tail else {
            return Ok(0);
        };
        let mut found = 0;
        let mut end = len;
        while end > 0 {
            let start = end.saturating_sub(BLOCK as u64);
            let mut block = vec![0; usize::try_from(end - start).unwrap_or(BLOCK)];
            file.seek(SeekFrom::Start(start)).await?;
            file.read_exact(&mut block).await?;
            for (at, byte) in block.iter().enumerate().rev() {
                let here = start + at as u64;
                // A line end at the very end closes the last line, it begins none.
                if *byte == b'\n' && here + 1 != len {
                    found += 1;
                    if found == wanted {
                        return Ok(here + 1);
                    }
                }
            }
            end = start;
        }
        Ok(if wanted == 0 { len } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tail_of(text: &str, tail: Option<u32>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, text).unwrap();
        let mut reader = Reader {
            path,
            at: None,
            tail,
            follow: false,
        };
        let mut all = Vec::new();
        while let Some(piece) = reader.next().await.unwrap() {
            all.extend_from_slice(&piece);
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn the_last_lines() {
        assert_eq!(tail_of("a\nb\nc\n", None).await, "a\nb\nc\n");
        assert_eq!(tail_of("a\nb\nc\n", Some(2)).await, "b\nc\n");
        assert_eq!(tail_of("a\nb\nc", Some(1)).await, "c");
        assert_eq!(tail_of("a\nb\n", Some(9)).await, "a\nb\n");
        assert_eq!(tail_of("a\nb\n", Some(0)).await, "");
        assert_eq!(tail_of("", Some(3)).await, "");
        let long = "x".repeat(200_000);
        assert_eq!(
            tail_of(&format!("{long}\n{long}\nend\n"), Some(2)).await,
            format!("{long}\nend\n")
        );
    }

    #[tokio::test]
    async fn a_log_that_was_cut_is_followed_from_its_new_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "long long\n").unwrap();
        let mut reader = Reader {
            path: path.clone(),
            at: None,
            tail: None,
            follow: true,
        };
        reader.next().await.unwrap();
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "new\n");
    }
}
