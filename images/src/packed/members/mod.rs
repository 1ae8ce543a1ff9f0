//! The tar within a packed image, as a stream that nobody trusts: GNU tar's, the ancestor's (GNU's old sparse members),
//! `--format=posix` (PAX headers, sparse members 0.1 and 1.0), or ours, with its members in any order. Only four names
//! count; everything else is read over, within a budget. It must never panic, whatever the bytes (see `fuzz/`).
//!
//! ```text
//! mod      the walk from member to member       budgets, names, kinds, padding, the end
//! header   one header of 512 bytes              name, size, type
//! before   headers that go before a member      PAX, long names
//! pax      a PAX header's records               bounded; what changes a member is taken or refused
//! sparse   where a sparse member has its data   old GNU, PAX 0.1 and 1.0
//! ```
//!
//! Next step: `unpack` (where the data goes), `layer` (judges layer.qcow2).

mod before;
mod header;
mod pax;
mod sparse;

use std::io::{self, BufRead};

use pileus_base::{Error, Result, Size};

use super::rule::Rule;
use crate::archive::extents::Extent;
use crate::archive::parts::{Fault, MOST_PADDING};
use before::{Before, plain};
use header::{Header, Type};
use pax::Pax;

/// A tar's headers and data begin at multiples of this.
const BLOCK: u64 = 512;
/// Bytes of a PAX header, or of a long name.
const MOST_EXTENDED: u64 = 1 << 20;
const MOST_NAME: u64 = 64 << 10;

/// What the walk holds to.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Bytes of the disk.
    pub disk: u64,
    /// Bytes of each of machine.json and manifest.json.
    pub small: u64,
    /// Bytes of members that nobody needs.
    pub skipped: u64,
    /// Headers in all.
    pub members: u64,
    /// Extents of a member.
    pub extents: usize,
}

/// The members that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Disk,
    Layer,
    Machine,
    Manifest,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Disk, Self::Layer, Self::Machine, Self::Manifest];

    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => super::DISK,
            Self::Layer => super::LAYER,
            Self::Machine => super::MACHINE,
            Self::Manifest => super::MANIFEST,
        }
    }

    fn of(name: &[u8]) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name().as_bytes() == name)
    }
}

/// A member's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub kind: Kind,
    /// Bytes of the file.
    pub size: u64,
    /// Where its data lies, in order.
    pub extents: Vec<Extent>,
}

/// Gets the place of each piece in the file, and the piece.
pub type Each<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

/// A tar as a stream of members.
#[derive(Debug)]
pub struct Walk<R> {
    input: R,
    bounds: Bounds,
    /// Bytes of the present member's data that were not read yet.
    left: u64,
    /// Zeros behind it.
    padding: u64,
    headers: u64,
    skipped: u64,
    seen: Vec<Kind>,
}

impl<R: BufRead> Walk<R> {
    pub fn new(input: R, bounds: Bounds) -> Self {
        Self {
            input,
            bounds,
            left: 0,
            padding: 0,
            headers: 0,
            skipped: 0,
            seen: Vec::new(),
        }
    }

    /// The next member that counts; `None` at the end, which is the end of the stream too. The one before must have
    /// been read.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        if self.left > 0 {
            return Err(Error::internal("A member was not read to its end"));
        }
        loop {
            self.pad()?;
            let Some(found) = self.whole_header()? else {
                self.end()?;
                return Ok(None);
            };
            if let Some(member) = self.judge(found)? {
                return Ok(Some(member));
            }
        }
    }

    /// Reads the member that [`Walk::next_member`] gave.
    pub fn read(&mut self, member: &Member, each: Each<'_>) -> Result<()> {
        for extent in &member.extents {
            let mut at = extent.offset;
            while at < extent.end() {
                let want = extent.end() - at;
                let piece = some(&mut self.input)?;
                let len = piece.len().min(usize::try_from(want).unwrap_or(usize::MAX));
                each(at, &piece[..len])?;
                self.input.consume(len);
                at += len as u64;
                self.left = self.left.saturating_sub(len as u64);
            }
        }
        Ok(())
    }

    /// A header with those that go before it; `None` at the tar's end.
    fn whole_header(&mut self) -> Result<Option<Found>> {
        let mut before = Before::default();
        loop {
            let mut block = [0; BLOCK as usize];
            self.fill(&mut block)?;
            if block.iter().all(|byte| *byte == 0) {
                return match before.is_empty() {
                    true => Ok(None),
                    false => {
                        Err(Rule::Truncated
                            .because("a header that goes before a member is the last"))
                    }
                };
            }
            self.headers += 1;
            if self.headers > self.bounds.members {
                return Err(Rule::TooManyMembers
                    .because(format_args!("the limit is {}", self.bounds.members)));
            }
            let header = Header::new(block, self.headers == 1)?;
            match header.kind() {
                Type::Pax => {
                    let text = self.extended(&header, MOST_EXTENDED)?;
                    before.add_pax(Pax::parse(&text)?)?;
                }
                Type::GlobalPax => {
                    let text = self.extended(&header, MOST_EXTENDED)?;
                    if Pax::parse(&text)?.changes_members() {
                        return Err(Rule::PaxGlobal.refuse());
                    }
                }
                Type::LongName => before.add_name(self.extended(&header, MOST_NAME)?)?,
                Type::LongLink => drop(self.extended(&header, MOST_NAME)?),
                _ => return self.found(&header, before).map(Some),
            }
        }
    }

    fn found(&mut self, header: &Header, before: Before) -> Result<Found> {
        let pax = before.pax.unwrap_or_default();
        let mut found = Found {
            name: header.name()?,
            kind: header.kind(),
            size: pax.size.map_or_else(|| header.size(), Ok)?,
            extents: None,
            stored: 0,
        };
        found.stored = found.size;
        if let Some(name) = before.name.or(pax.path) {
            found.name = name;
        }
        if found.kind == Type::Folder {
            let end = found.name.iter().rposition(|byte| *byte != b'/');
            found.name.truncate(end.map_or(0, |end| end + 1));
        }
        match (found.kind, pax.sparse) {
            (Type::OldSparse, None) if pax.size.is_none() => self.old_sparse(header, &mut found)?,
            (Type::OldSparse, _) => {
                return Err(
                    Rule::PaxMalformed.because("it changes a sparse member of the old form")
                );
            }
            (Type::File, Some(how)) => self.pax_sparse(how, &mut found)?,
            (_, Some(_)) => return Err(Rule::PaxMalformed.because("what is no file is sparse")),
            _ => {}
        }
        Ok(found)
    }

    /// A member that counts, within its bounds; one that doesn't was read over.
    fn judge(&mut self, mut found: Found) -> Result<Option<Member>> {
        let shown = String::from_utf8_lossy(&found.name)
            .escape_debug()
            .to_string();
        let Some(kind) = Kind::of(&found.name) else {
            if let Some(kind) = Kind::of(&plain(&found.name)) {
                return Err(Rule::MemberPath.because(&shown).advise(format!(
                    "The name has to be just {}: pack with `tar -SC FOLDER -c disk.img layer.qcow2 machine.json`, \
                     not with `.` or a path.",
                    kind.name()
                )));
            }
            return self.skip(&found).map(|()| None);
        };
        if !matches!(found.kind, Type::File | Type::OldSparse) {
            return Err(Rule::MemberKind.because(format_args!("{shown} is {}", found.kind.what())));
        }
        if self.seen.contains(&kind) {
            return Err(Rule::DuplicateMember.because(&shown));
        }
        self.seen.push(kind);
        self.bounded(kind, found.size)?;
        let whole = Extent {
            offset: 0,
            len: found.size,
        };
        let dense = || (whole.len > 0).then_some(whole).into_iter().collect();
        self.left = found.stored;
        self.padding = padding(found.stored);
        Ok(Some(Member {
            kind,
            size: found.size,
            extents: found.extents.take().unwrap_or_else(dense),
        }))
    }

    fn bounded(&self, kind: Kind, size: u64) -> Result<()> {
        let (rule, limit) = match kind {
            Kind::Disk => (Rule::DiskTooLarge, self.bounds.disk),
            // A layer that says something of every cluster of the largest disk, with tables to spare.
            Kind::Layer => (
                Rule::MemberTooLarge,
                self.bounds
                    .disk
                    .saturating_add(self.bounds.disk / 16)
                    .saturating_add(1 << 20),
            ),
            Kind::Machine | Kind::Manifest => (Rule::MemberTooLarge, self.bounds.small),
        };
        if size > limit {
            return Err(rule.because(format_args!(
                "{} has {}, the limit is {}",
                kind.name(),
                Size(size),
                Size(limit)
            )));
        }
        if kind == Kind::Disk && (size == 0 || !size.is_multiple_of(BLOCK)) {
            return Err(Rule::DiskSize.because(format_args!("it has {size} bytes")));
        }
        Ok(())
    }

    fn skip(&mut self, found: &Found) -> Result<()> {
        if found.kind.has_no_data() && found.stored > 0 {
            return Err(Rule::MemberData.because(found.kind.what()));
        }
        let skipped = self.skipped.checked_add(found.stored);
        self.skipped = skipped
            .filter(|skipped| *skipped <= self.bounds.skipped)
            .ok_or_else(|| {
                Rule::SkippedTooLarge
                    .because(format_args!("the limit is {}", Size(self.bounds.skipped)))
            })?;
        self.padding = padding(found.stored);
        let mut left = found.stored;
        while left > 0 {
            let len = some(&mut self.input)?.len();
            let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.input.consume(len);
            left -= len as u64;
        }
        Ok(())
    }

    /// The data of a header that goes before others.
    fn extended(&mut self, header: &Header, limit: u64) -> Result<Vec<u8>> {
        let size = header.size()?;
        if size > limit {
            return Err(
                Rule::PaxTooLarge.because(format_args!("{size} bytes, the limit is {limit}"))
            );
        }
        let mut text = vec![0; size as usize];
        self.fill(&mut text)?;
        self.padding = padding(size);
        self.pad()?;
        Ok(text)
    }

    /// The zeros behind a member's data.
    fn pad(&mut self) -> Result<()> {
        let mut zeros = [0; BLOCK as usize];
        let padding = &mut zeros[..std::mem::take(&mut self.padding) as usize];
        self.fill(padding)?;
        match padding.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(Rule::Padding.refuse()),
        }
    }

    /// Behind the first zero block: a second one, zeros up to the end of the stream, and all members were there.
    fn end(&mut self) -> Result<()> {
        let mut rest = [0; BLOCK as usize];
        self.fill(&mut rest)?;
        if rest.iter().any(|byte| *byte != 0) {
            return Err(Rule::TarTrailing.refuse());
        }
        let mut padding = 0;
        loop {
            let more = some_or_none(&mut self.input)?;
            if more.is_empty() {
                break;
            }
            padding += more.len() as u64;
            if padding > MOST_PADDING || more.iter().any(|byte| *byte != 0) {
                return Err(Rule::TarTrailing.refuse());
            }
            let len = more.len();
            self.input.consume(len);
        }
        for kind in [Kind::Disk, Kind::Layer, Kind::Machine] {
            if !self.seen.contains(&kind) {
                return Err(Rule::MissingMember.because(kind.name()).advise(
                    "A packed image has disk.img, layer.qcow2 and machine.json at its top.",
                ));
            }
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.input.read_exact(bytes).map_err(unreadable)
    }
}

/// A header, and what those before it say.
struct Found {
    name: Vec<u8>,
    kind: Type,
    /// Bytes of the file.
    size: u64,
    /// Of a sparse one.
    extents: Option<Vec<Extent>>,
    /// Bytes of data that follow; a map before them was read, and is in whole blocks.
    stored: u64,
}

fn padding(stored: u64) -> u64 {
    stored.next_multiple_of(BLOCK) - stored
}

/// At least one byte.
fn some(input: &mut impl BufRead) -> Result<&[u8]> {
    let bytes = some_or_none(input)?;
    match bytes.is_empty() {
        false => Ok(bytes),
        true => Err(Rule::Truncated.refuse()),
    }
}

fn some_or_none(input: &mut impl BufRead) -> Result<&[u8]> {
    input.fill_buf().map_err(unreadable)
}

fn unreadable(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::UnexpectedEof => Rule::Truncated.refuse(),
        _ => Error::io("Reading the archive", err),
    }
}

fn fault(fault: Fault) -> Error {
    match fault {
        Fault::Number => Rule::HeaderNumber.refuse(),
        Fault::Checksum => Rule::HeaderChecksum.refuse(),
        Fault::Extent | Fault::EmptyExtent => Rule::SparseMap.because(fault),
        Fault::TooManyExtents => Rule::TooManyExtents.refuse(),
    }
}

#[cfg(test)]
mod tests;
