//! Reading an archive that nobody trusts, as a stream: only what [`super::Writer`] could have written is taken
//! (ordinary files and GNU's old sparse ones, names of printable ASCII), the whole of it is accounted for, and
//! what it may cost is given before. It must never panic, whatever the bytes (see `fuzz/`).
//!
//! Sparse members in the PAX form are refused by name: pileus writes none. Images that come from elsewhere may have
//! them; their reader is `packed/members`, and what both share is in `parts`.

use std::fs::File;
use std::io::{self, BufReader, Read};

use pileus_base::{Code, Digest, Error, Result};
use tar::{EntryType, GnuExtSparseHeader, Header};

use super::extents::{self, Extent};
use super::member::{BLOCK, MemberHash, Moved};
use super::parts::{self, Fault, MAX_WINDOW_LOG, MOST_PADDING, SparseMap};
use crate::sparse::SparseWriter;

/// Gets the place of each piece in the file, and the piece.
type Each<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

const CHUNK: usize = 256 << 10;

/// Decompresses; what it gives is a tar.
pub struct Input<R: Read>(zstd::stream::read::Decoder<'static, BufReader<R>>);

impl<R: Read> Input<R> {
    pub fn new(from: R) -> Result<Self> {
        let open = || {
            let mut decoder = zstd::stream::read::Decoder::new(from)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            Ok::<_, io::Error>(decoder)
        };
        open().map(Self).map_err(unreadable)
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

/// A member's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    /// Bytes of the file.
    pub size: u64,
    /// Where its data lies, in order.
    pub extents: Vec<Extent>,
    /// Bytes of data that follow.
    pub stored: u64,
    sparse: bool,
}

/// A tar as a stream of members.
pub struct Reader<R> {
    input: R,
    /// Bytes of the present member that were not read yet.
    left: u64,
    /// Zeros behind it.
    padding: u64,
    /// How many bytes the rest may have.
    budget: u64,
}

impl<R: Read> Reader<R> {
    /// Of at most so many bytes in all; see [`Reader::allow`].
    pub fn new(input: R, budget: u64) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
            budget,
        }
    }

    /// Lets the rest have so many bytes.
    pub fn allow(&mut self, budget: u64) {
        self.budget = budget;
    }

    /// The next member's header; `None` at the end, which is the end of the stream too.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        if self.left > 0 {
            return Err(Error::internal("A member was not read to its end"));
        }
        self.skip_padding()?;
        let mut header = Header::new_old();
        self.fill(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            self.end()?;
            return Ok(None);
        }
        let member = self.member(&header)?;
        self.left = member.stored;
        self.padding = member.stored.next_multiple_of(BLOCK) - member.stored;
        Ok(Some(member))
    }

    fn member(&mut self, header: &Header) -> Result<Member> {
        let name = name_of(header)?;
        let stored = parts::number(&header.as_bytes()[124..136])?;
        if header.link_name_bytes().is_some() {
            return Err(bad(&format!("{name} is a link")));
        }
        match header.entry_type() {
            EntryType::Regular => {
                let whole = Extent {
                    offset: 0,
                    len: stored,
                };
                Ok(Member {
                    name,
                    size: stored,
                    extents: (stored > 0).then_some(whole).into_iter().collect(),
                    stored,
                    sparse: false,
                })
            }
            EntryType::GNUSparse => self.sparse(header, name, stored),
            EntryType::XHeader | EntryType::XGlobalHeader => {
                Err(bad("it has PAX headers, which are not supported"))
            }
            _ => Err(bad(&format!("{name} is no file"))),
        }
    }

    fn sparse(&mut self, header: &Header, name: String, stored: u64) -> Result<Member> {
        let gnu = header.as_gnu();
        let gnu = gnu.ok_or_else(|| bad("a sparse member has no GNU header"))?;
        let size = parts::number(&gnu.realsize)?;
        let mut map = SparseMap::new(size, extents::MOST);
        map.add_all(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut entries = GnuExtSparseHeader::new();
            self.fill(entries.as_mut_bytes())?;
            map.add_all(entries.sparse())?;
            more = entries.is_extended();
        }
        let (extents, sum) = map.finish();
        if sum != stored {
            return Err(bad(&format!("the extents of {name} are not its size")));
        }
        Ok(Member {
            name,
            size,
            extents,
            stored,
            sparse: true,
        })
    }

    /// A small member's bytes.
    pub fn bytes(&mut self, member: &Member, limit: u64) -> Result<(Vec<u8>, Digest)> {
        if member.sparse || member.size > limit {
            return Err(bad(&format!(
                "{} is larger than {limit} bytes",
                member.name
            )));
        }
        let mut bytes = vec![0; member.size as usize];
        let mut hash = MemberHash::new(true);
        self.data(&mut bytes)?;
        hash.data(&bytes);
        Ok((bytes, hash.finish(member.size)))
    }

    /// Writes a member into an empty file, with holes where it has zeros.
    pub fn extract(&mut self, member: &Member, to: File, moved: Moved<'_>) -> Result<Digest> {
        let what = format!("Writing {}", member.name);
        let failed = |err| Error::io(&what, err);
        let mut writer = SparseWriter::new(to, member.size);
        let digest = self.walk(member, &mut |at, piece| {
            writer.skip_to(at);
            io::Write::write_all(&mut writer, piece).map_err(failed)?;
            moved(piece.len() as u64)
        })?;
        writer.skip_to(member.size);
        let file = writer.finish().map_err(failed)?;
        file.sync_all().map_err(failed)?;
        Ok(digest)
    }

    /// Reads a member and keeps nothing but its digest.
    pub fn discard(&mut self, member: &Member, moved: Moved<'_>) -> Result<Digest> {
        self.walk(member, &mut |_, piece| moved(piece.len() as u64))
    }

    fn walk(&mut self, member: &Member, each: Each<'_>) -> Result<Digest> {
        let mut hash = MemberHash::new(!member.sparse);
        let mut buffer = vec![0; CHUNK];
        for extent in &member.extents {
            hash.extent(*extent);
            let mut at = extent.offset;
            while at < extent.end() {
                let len = (extent.end() - at).min(CHUNK as u64) as usize;
                let piece = &mut buffer[..len];
                self.data(piece)?;
                hash.data(piece);
                each(at, piece)?;
                at += len as u64;
            }
        }
        Ok(hash.finish(member.size))
    }

    fn data(&mut self, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.left = self
            .left
            .checked_sub(len)
            .ok_or_else(|| Error::internal("A member was read beyond its end"))?;
        self.fill(bytes)
    }

    fn skip_padding(&mut self) -> Result<()> {
        let mut zeros = [0; BLOCK as usize];
        let padding = &mut zeros[..std::mem::take(&mut self.padding) as usize];
        self.fill(padding)?;
        match padding.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(bad("there is something between its members")),
        }
    }

    /// Behind the first zero block: a second one, and zeros up to the end of the stream.
    fn end(&mut self) -> Result<()> {
        let mut rest = [0; BLOCK as usize];
        self.fill(&mut rest)?;
        let mut padding = 0;
        loop {
            if rest.iter().any(|byte| *byte != 0) || padding > MOST_PADDING {
                return Err(bad("there is something behind its end"));
            }
            match self.input.read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(len) => {
                    rest[len..].fill(0);
                    padding += len as u64;
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(unreadable(err)),
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let left = self.budget.checked_sub(bytes.len() as u64);
        self.budget = left.ok_or_else(|| bad("it is larger than what it says of itself"))?;
        self.input.read_exact(bytes).map_err(unreadable)
    }
}

fn name_of(header: &Header) -> Result<String> {
    let bytes = header.as_bytes();
    parts::checksum(bytes)?;
    let prefixed = match (header.as_gnu(), header.as_ustar()) {
        (Some(_), _) => false,
        (_, Some(ustar)) => ustar.prefix[0] != 0,
        _ => return Err(bad("it is a tar of another age")),
    };
    let name = bytes[..100].split(|byte| *byte == 0).next();
    let name = name.unwrap_or_default();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-/".contains(byte);
    if prefixed || name.is_empty() || !name.iter().all(plain) {
        return Err(bad("a member has no name that an archive of pileus has"));
    }
    Ok(String::from_utf8_lossy(name).into_owned())
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        bad(&fault.to_string())
    }
}

/// The error of an archive that is not as it must be.
pub fn bad(why: &str) -> Error {
    Error::new(Code::BadArchive, format!("The archive is refused: {why}"))
        .advise("It is damaged or was not written by pileus. Nothing was kept of it.")
}

fn unreadable(err: io::Error) -> Error {
    // Whoever gives the bytes may know better.
    err.downcast().unwrap_or_else(broken)
}

fn broken(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::UnexpectedEof => bad("it ends in its middle"),
        io::ErrorKind::ConnectionAborted => {
            Error::new(Code::Cancelled, "The archive did not arrive as a whole").with_source(err)
        }
        _ if err.raw_os_error().is_some() => Error::io("Reading the archive", err),
        _ => bad(&format!("it can't be decompressed ({err})")).with_source(err),
    }
}
