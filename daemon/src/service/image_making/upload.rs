//! What a build's client sends: its request as a line, then the tars of the steps that copy. They wait in a file
//! without a name until their steps are carried out; nobody here looks into them, they are for the guest.

use std::io;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pileus_api::image_making::{BuildRequest, MOST_COPIED, MOST_REQUEST};
use pileus_base::{Code, Error, Result, ResultExt, Size};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::super::Service;

/// A request that has come as a whole.
pub struct Upload {
    pub request: BuildRequest,
    pub copies: Copies,
}

/// The tars, one after the other.
pub struct Copies {
    file: std::fs::File,
    at: u64,
}

impl Copies {
    /// The next tar, which has so many bytes.
    pub(super) fn next(&mut self, bytes: u64) -> Result<impl AsyncRead + Send + Unpin + use<>> {
        use std::io::{Seek, SeekFrom};
        let what = "Reading what the client sent";
        // Its own place in the file: a step that ended early left some unread.
        let mut file = self.file.try_clone().io(what)?;
        file.seek(SeekFrom::Start(self.at)).io(what)?;
        self.at = self.at.saturating_add(bytes);
        Ok(tokio::fs::File::from_std(file).take(bytes))
    }
}

fn broken(err: impl std::fmt::Display) -> Error {
    Error::new(
        Code::InvalidArgument,
        format!("The recipe could not be received: {err}"),
    )
}

/// The error of an upload that can't be read on; one of ours says why itself.
fn unreadable(err: io::Error) -> Error {
    err.downcast().unwrap_or_else(broken)
}

impl Service {
    /// Takes in what a client sends.
    pub async fn receive_build(
        &self,
        mut body: impl Stream<Item = io::Result<Bytes>> + Unpin,
    ) -> Result<Upload> {
        let mut line = Vec::new();
        let rest = loop {
            let Some(piece) = body.next().await else {
                // Nothing follows: then its end is the line's.
                break Bytes::new();
            };
            let piece = piece.map_err(unreadable)?;
            if let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
                line.extend_from_slice(&piece[..end]);
                break piece.slice(end + 1..);
            }
            line.extend_from_slice(&piece);
            if line.len() > MOST_REQUEST {
                break Bytes::new();
            }
        };
        if line.len() > MOST_REQUEST {
            let most = Size(MOST_REQUEST as u64);
            return Err(broken(format_args!("it has more than {most}")));
        }
        let request: BuildRequest = serde_json::from_slice(&line).map_err(broken)?;
        let total = request
            .copies
            .iter()
            .try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes));
        let total = total.filter(|total| *total <= MOST_COPIED).ok_or_else(|| {
            let most = Size(MOST_COPIED);
            Error::new(
                Code::InvalidArgument,
                format!("The recipe's files have more than {most}"),
            )
            .advise("Have a step fetch what is large.")
        })?;
        let folder = self.parts.layout.instances();
        self.parts.store.check_room(&folder, total)?;
        let file = super::super::blocking(move || {
            tempfile::tempfile_in(&folder).io("Making room for a recipe's files")
        })
        .await?;
        let mut file = tokio::fs::File::from_std(file);
        let mut left = total;
        let mut piece = Ok(rest);
        loop {
            let bytes = piece.map_err(unreadable)?;
            let come = bytes.len() as u64;
            left = left
                .checked_sub(come)
                .ok_or_else(|| broken("there is more of it than it says"))?;
            file.write_all(&bytes)
                .await
                .io("Writing a recipe's files")?;
            match body.next().await {
                Some(next) => piece = next,
                None => break,
            }
        }
        if left > 0 {
            return Err(broken(format_args!(
                "{left} bytes of its files are missing"
            )));
        }
        file.flush().await.io("Writing a recipe's files")?;
        file.rewind().await.io("Writing a recipe's files")?;
        Ok(Upload {
            request,
            copies: Copies {
                file: file.into_std().await,
                at: 0,
            },
        })
    }
}
