//! SFTP version 3 as bytes: requests are written, answers are read. The answers come from a guest, which
//! may be hostile: every length is checked against what is there, names and lists are bounded, and nothing
//! is left over at the end of a packet. No I/O here.
//!
//! ```text
//! u32 length │ u8 type │ u32 id │ …        string: u32 length + bytes
//! ```
//!
//! Next step: `session.rs`, which sends and receives these.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pileus_base::{Code, Error, Result};

/// Largest packet that is taken. OpenSSH's own bound, which covers its longest listings.
pub(crate) const MAX_PACKET: usize = 256 << 10;
/// Names in one answer; OpenSSH sends 100.
const MAX_NAMES: u32 = 10_000;
/// Longest name or path that is taken.
const MAX_PATH: usize = 4096;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Ask {
    Init = 1,
    Open = 3,
    Close = 4,
    Read = 5,
    Write = 6,
    Lstat = 7,
    Setstat = 9,
    Fsetstat = 10,
    Opendir = 11,
    Readdir = 12,
    Remove = 13,
    Mkdir = 14,
    Realpath = 16,
    Stat = 17,
    Rename = 18,
    Readlink = 19,
    Symlink = 20,
    Extended = 200,
}

/// Flags of [`Ask::Open`].
pub(crate) mod flags {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const CREATE: u32 = 8;
    pub const TRUNCATE: u32 = 16;
    pub const EXCLUSIVE: u32 = 32;
}

/// Codes of [`Answer::Status`].
pub(crate) mod status {
    pub const OK: u32 = 0;
    pub const EOF: u32 = 1;
    pub const NO_SUCH_FILE: u32 = 2;
    pub const DENIED: u32 = 3;
    pub const FAILURE: u32 = 4;
    pub const UNSUPPORTED: u32 = 8;
}

const ATTR_SIZE: u32 = 1;
const ATTR_OWNER: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_TIMES: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;

/// A request that is being written.
#[derive(Debug)]
pub(crate) struct Packet(BytesMut);

impl Packet {
    pub fn new(ask: Ask, id: u32) -> Self {
        let mut bytes = BytesMut::with_capacity(64);
        bytes.put_u32(0);
        bytes.put_u8(ask as u8);
        bytes.put_u32(id);
        Self(bytes)
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.put_u32(value);
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.put_u64(value);
        self
    }

    pub fn string(mut self, bytes: &[u8]) -> Self {
        // What is sent is shorter than a packet; see CHUNK and MAX_PATH.
        self.0.put_u32(u32::try_from(bytes.len()).unwrap_or(0));
        self.0.extend_from_slice(bytes);
        self
    }

    /// Attributes that hold a mode, or none.
    pub fn mode(self, mode: Option<u32>) -> Self {
        match mode {
            Some(mode) => self.u32(ATTR_PERMISSIONS).u32(mode),
            None => self.u32(0),
        }
    }

    /// The packet with its length in front.
    pub fn finish(mut self) -> Bytes {
        let len = u32::try_from(self.0.len() - 4).unwrap_or(0);
        self.0[..4].copy_from_slice(&len.to_be_bytes());
        self.0.freeze()
    }
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Status { code: u32, message: String },
    Handle(Bytes),
    Data(Bytes),
    Names(Vec<Name>),
    Attrs(Attrs),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub name: Bytes,
    pub attrs: Attrs,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attrs {
    pub size: Option<u64>,
    /// Kind and permissions as in `st_mode`.
    pub mode: Option<u32>,
}

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Folder,
    Link,
    Other,
}

impl Attrs {
    pub fn kind(&self) -> Kind {
        match self.mode.map(|mode| mode & 0o170_000) {
            Some(0o100_000) => Kind::File,
            Some(0o040_000) => Kind::Folder,
            Some(0o120_000) => Kind::Link,
            _ => Kind::Other,
        }
    }
}

/// Cuts what comes into packets.
#[derive(Debug, Default)]
pub(crate) struct Frames(BytesMut);

impl Frames {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole packet, without its length.
    pub fn next(&mut self) -> Result<Option<Bytes>> {
        let Some(len) = self.0.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*len) as usize;
        if len == 0 || len > MAX_PACKET {
            return Err(nonsense("a packet of an impossible length"));
        }
        if self.0.len() < 4 + len {
            return Ok(None);
        }
        self.0.advance(4);
        Ok(Some(self.0.split_to(len).freeze()))
    }
}

/// Reads the first packet: whether the server knows to rename onto an existing file.
pub(crate) fn version(packet: Bytes) -> Result<bool> {
    let mut read = Reader(packet);
    if read.u8()? != 2 || read.u32()? != 3 {
        return Err(nonsense("another version than 3"));
    }
    let mut posix_rename = false;
    while !read.0.is_empty() {
        let name = read.string(MAX_PATH)?;
        let value = read.string(MAX_PATH)?;
        posix_rename |= name == b"posix-rename@openssh.com"[..] && value == b"1"[..];
    }
    Ok(posix_rename)
}

/// Reads an answer and the id of its request.
pub(crate) fn answer(packet: Bytes) -> Result<(u32, Answer)> {
    let mut read = Reader(packet);
    let kind = read.u8()?;
    let id = read.u32()?;
    let answer = match kind {
        101 => {
            let code = read.u32()?;
            let message = read.string(MAX_PATH)?;
            let message = String::from_utf8_lossy(&message).into_owned();
            // The language of the message, which some servers leave out.
            if !read.0.is_empty() {
                read.string(MAX_PATH)?;
            }
            Answer::Status { code, message }
        }
        102 => Answer::Handle(read.string(256)?),
        103 => Answer::Data(read.string(MAX_PACKET)?),
        104 => Answer::Names(read.names()?),
        105 => Answer::Attrs(read.attrs()?),
        _ => return Err(nonsense("an answer of an unknown kind")),
    };
    if !read.0.is_empty() {
        return Err(nonsense("a packet with something behind its end"));
    }
    Ok((id, answer))
}

struct Reader(Bytes);

impl Reader {
    fn u8(&mut self) -> Result<u8> {
        self.0.try_get_u8().map_err(|_| short())
    }

    fn u32(&mut self) -> Result<u32> {
        self.0.try_get_u32().map_err(|_| short())
    }

    fn u64(&mut self) -> Result<u64> {
        self.0.try_get_u64().map_err(|_| short())
    }

    fn string(&mut self, limit: usize) -> Result<Bytes> {
        let len = self.u32()? as usize;
        if len > limit {
            return Err(nonsense("a text that is too long"));
        }
        if len > self.0.len() {
            return Err(short());
        }
        Ok(self.0.split_to(len))
    }

    fn names(&mut self) -> Result<Vec<Name>> {
        let count = self.u32()?;
        if count > MAX_NAMES {
            return Err(nonsense("a list that is too long"));
        }
        let mut names = Vec::new();
        for _ in 0..count {
            let name = self.string(MAX_PATH)?;
            // A line as of `ls -l`; nothing of it is used.
            self.string(2 * MAX_PATH)?;
            let attrs = self.attrs()?;
            names.push(Name { name, attrs });
        }
        Ok(names)
    }

    fn attrs(&mut self) -> Result<Attrs> {
        let flags = self.u32()?;
        let known = ATTR_SIZE | ATTR_OWNER | ATTR_PERMISSIONS | ATTR_TIMES | ATTR_EXTENDED;
        if flags & !known != 0 {
            return Err(nonsense("attributes of an unknown kind"));
        }
        let mut attrs = Attrs::default();
        if flags & ATTR_SIZE != 0 {
            attrs.size = Some(self.u64()?);
        }
        if flags & ATTR_OWNER != 0 {
            self.u64()?;
        }
        if flags & ATTR_PERMISSIONS != 0 {
            attrs.mode = Some(self.u32()?);
        }
        if flags & ATTR_TIMES != 0 {
            self.u64()?;
        }
        if flags & ATTR_EXTENDED != 0 {
            let count = self.u32()?;
            if count > 64 {
                return Err(nonsense("too many attributes"));
            }
            for _ in 0..count {
                self.string(MAX_PATH)?;
                self.string(MAX_PATH)?;
            }
        }
        Ok(attrs)
    }
}

fn short() -> Error {
    nonsense("a packet that ends too early")
}

pub(crate) fn nonsense(what: &str) -> Error {
    Error::new(
        Code::ExecFailed,
        format!("The guest's file server can't be understood: it sent {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(parts: &[&[u8]]) -> Bytes {
        parts.concat().into()
    }

    #[test]
    fn a_request_is_what_the_protocol_says() {
        let bytes = Packet::new(Ask::Open, 7)
            .string(b"a\xff")
            .u32(flags::READ)
            .mode(None)
            .finish();
        let expected: &[u8] = &[
            0, 0, 0, 19, 3, 0, 0, 0, 7, 0, 0, 0, 2, b'a', 0xff, 0, 0, 0, 1, 0, 0, 0, 0,
        ];
        assert_eq!(&bytes[..], expected);
    }

    #[test]
    fn packets_in_any_cutting() {
        let all = [&[0, 0, 0, 2, 1, 2][..], &[0, 0, 0, 1, 9]].concat();
        for cut in 0..all.len() {
            let mut frames = Frames::default();
            let mut found = Vec::new();
            for part in [&all[..cut], &all[cut..]] {
                frames.add(part);
                while let Some(packet) = frames.next().unwrap() {
                    found.push(packet.to_vec());
                }
            }
            assert_eq!(found, [vec![1, 2], vec![9]], "{cut}");
        }
        for bad in [[0, 0, 0, 0], [0xff; 4]] {
            let mut frames = Frames::default();
            frames.add(&bad);
            assert!(frames.next().is_err());
        }
    }

    #[test]
    fn answers_are_taken_whole_or_not_at_all() {
        let names = body(&[
            &[104, 0, 0, 0, 5, 0, 0, 0, 1],
            &[0, 0, 0, 1, 0xff, 0, 0, 0, 0],
            &[0, 0, 0, 5],
            &9_u64.to_be_bytes(),
            &0o100_644_u32.to_be_bytes(),
        ]);
        let (id, parsed) = answer(names.clone()).unwrap();
        let Answer::Names(list) = parsed else {
            panic!("{parsed:?}");
        };
        assert_eq!(
            (id, &list[0].name[..], list[0].attrs.size),
            (5, &b"\xff"[..], Some(9))
        );
        assert_eq!(list[0].attrs.kind(), Kind::File);
        for len in 0..names.len() {
            assert!(answer(names.slice(..len)).is_err(), "{len}");
        }
        assert!(answer(body(&[&names, &[0]])).is_err());
        // A list that promises more than there is.
        assert!(answer(body(&[&[104, 0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff]])).is_err());
        // A text longer than the packet.
        assert!(answer(body(&[&[103, 0, 0, 0, 5, 0, 3, 0, 0, 1]])).is_err());
        assert!(answer(body(&[&[99, 0, 0, 0, 5]])).is_err());
    }

    #[test]
    fn the_greeting_tells_what_the_server_can() {
        let name = b"posix-rename@openssh.com";
        let with = body(&[&[2, 0, 0, 0, 3, 0, 0, 0, 24], name, &[0, 0, 0, 1, b'1']]);
        assert!(version(with).unwrap());
        assert!(!version(body(&[&[2, 0, 0, 0, 3]])).unwrap());
        assert!(version(body(&[&[2, 0, 0, 0, 6]])).is_err());
    }
}
