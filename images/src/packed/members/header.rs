//! One header of 512 bytes: POSIX's, GNU's, or of the time before them.

use pileus_base::Result;
use tar::{GnuHeader, Header as Raw};

use super::super::rule::Rule;
use super::fault;
use crate::archive::parts::{self, Fault};

/// What follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    File,
    /// GNU's old form, with the map in the header.
    OldSparse,
    HardLink,
    Link,
    Device,
    Folder,
    Fifo,
    Pax,
    GlobalPax,
    LongName,
    LongLink,
    /// Nobody's business.
    Other,
}

impl Type {
    fn of(flag: u8) -> Self {
        match flag {
            // A contiguous file is a file everywhere.
            b'0' | 0 | b'7' => Self::File,
            b'S' => Self::OldSparse,
            b'1' => Self::HardLink,
            b'2' => Self::Link,
            b'3' | b'4' => Self::Device,
            b'5' => Self::Folder,
            b'6' => Self::Fifo,
            b'x' => Self::Pax,
            b'g' => Self::GlobalPax,
            b'L' => Self::LongName,
            b'K' => Self::LongLink,
            _ => Self::Other,
        }
    }

    /// For a person.
    pub fn what(self) -> &'static str {
        match self {
            Self::File | Self::OldSparse => "a file",
            Self::HardLink => "a hard link",
            Self::Link => "a symbolic link",
            Self::Device => "a device",
            Self::Folder => "a folder",
            Self::Fifo => "a named pipe",
            _ => "of an unknown kind",
        }
    }

    /// Readers don't agree on whether there is any behind these.
    pub fn has_no_data(self) -> bool {
        matches!(
            self,
            Self::HardLink | Self::Link | Self::Device | Self::Folder | Self::Fifo
        )
    }
}

#[derive(Debug)]
pub struct Header(Raw);

impl Header {
    /// The first of an archive tells whether there is a tar at all.
    pub fn new(block: [u8; 512], first: bool) -> Result<Self> {
        let damaged = |err| match (err, first) {
            (Fault::Checksum, true) => Rule::NotTar.refuse(),
            _ => fault(err),
        };
        parts::checksum(&block).map_err(damaged)?;
        let mut raw = Raw::new_old();
        raw.as_mut_bytes().copy_from_slice(&block);
        let magic = &block[257..265];
        if raw.as_gnu().is_none() && raw.as_ustar().is_none() && magic != [0; 8] {
            return Err(Rule::NotTar.because("it is a tar of an unknown kind"));
        }
        Ok(Self(raw))
    }

    pub fn kind(&self) -> Type {
        Type::of(self.0.as_bytes()[156])
    }

    pub fn gnu(&self) -> Option<&GnuHeader> {
        self.0.as_gnu()
    }

    /// Bytes of data that follow.
    pub fn size(&self) -> Result<u64> {
        let field = &self.0.as_bytes()[124..136];
        // GNU's volume labels have none.
        if field == [0; 12] && self.kind() == Type::Other {
            return Ok(0);
        }
        parts::number(field).map_err(fault)
    }

    pub fn name(&self) -> Result<Vec<u8>> {
        let until_nul = |field: &[u8]| {
            let end = field.iter().position(|byte| *byte == 0);
            field[..end.unwrap_or(field.len())].to_vec()
        };
        let name = until_nul(&self.0.as_bytes()[..100]);
        if name.is_empty() {
            return Err(Rule::HeaderName.because("it is empty"));
        }
        match self.0.as_ustar().map(|ustar| until_nul(&ustar.prefix)) {
            Some(prefix) if !prefix.is_empty() => Ok([&prefix[..], &name].join(&b'/')),
            _ => Ok(name),
        }
    }
}
