//! A PAX header: records of `LENGTH KEY=VALUE\n`. What says a member's name, size or map is taken, once; times, owners
//! and the like are nobody's business here.

use std::collections::HashSet;

use pileus_base::Result;

use super::super::rule::Rule;

const MOST_RECORDS: usize = 1024;

/// What a header changes of the member behind it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pax {
    /// The member's name.
    pub path: Option<Vec<u8>>,
    /// Bytes that follow.
    pub size: Option<u64>,
    pub sparse: Option<Sparse>,
    link: bool,
}

/// How a member is sparse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sparse {
    /// Bytes of the file.
    pub size: u64,
    /// Pairs of place and length; in the data area (version 1.0) if there are none here (0.1).
    pub map: Option<Vec<u64>>,
}

/// GNU's records as they come.
#[derive(Default)]
struct Gnu {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    /// `realsize` of 1.0, `size` of 0.1.
    realsize: Option<u64>,
    size: Option<u64>,
    numblocks: Option<u64>,
    map: Option<Vec<u64>>,
    any: bool,
}

impl Pax {
    pub fn parse(text: &[u8]) -> Result<Self> {
        let (mut pax, mut gnu) = (Self::default(), Gnu::default());
        let mut seen = HashSet::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (record, behind) = record(rest).ok_or_else(|| Rule::PaxMalformed.refuse())?;
            rest = behind;
            let Some(at) = record.iter().position(|byte| *byte == b'=') else {
                return Err(Rule::PaxMalformed.because("a record has no value"));
            };
            let (key, value) = (&record[..at], &record[at + 1..]);
            if seen.len() >= MOST_RECORDS {
                return Err(
                    Rule::PaxTooLarge.because(format_args!("more than {MOST_RECORDS} records"))
                );
            }
            // The one form in which keys repeat has a rule of its own.
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                return Err(Rule::SparseVersion.because("0.0").advise(
                    "Pack it with `tar --format=gnu -S`, or with `--sparse-version=1.0`.",
                ));
            }
            if !seen.insert(key) {
                return Err(Rule::PaxMalformed.because("a record is there twice"));
            }
            match key {
                b"path" => pax.path = Some(name(value)?),
                b"linkpath" => pax.link = true,
                b"size" => pax.size = Some(number(value)?),
                _ => {
                    if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                        gnu.take(key, value)?;
                    }
                }
            }
        }
        if gnu.any {
            pax.path = gnu.name.clone().or(pax.path);
            pax.sparse = Some(gnu.finish()?);
        }
        Ok(pax)
    }

    /// Whether a global header with it would say what the members are.
    pub fn changes_members(&self) -> bool {
        *self != Self::default()
    }
}

impl Gnu {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.any = true;
        match key {
            b"major" => self.major = Some(number(value)?),
            b"minor" => self.minor = Some(number(value)?),
            b"name" => self.name = Some(name(value)?),
            b"realsize" => self.realsize = Some(number(value)?),
            b"size" => self.size = Some(number(value)?),
            b"numblocks" => self.numblocks = Some(number(value)?),
            b"map" => {
                let numbers = value.split(|byte| *byte == b',');
                self.map = Some(numbers.map(number).collect::<Result<_>>()?);
            }
            _ => return Err(Rule::SparseVersion.refuse()),
        }
        Ok(())
    }

    fn finish(self) -> Result<Sparse> {
        let malformed = || Rule::PaxMalformed.because("a sparse member is not told as a whole");
        match (self.major.zip(self.minor), self.map) {
            (Some((1, 0)), None) => {
                let known = self.name.is_some() && self.size.is_none() && self.numblocks.is_none();
                match self.realsize.filter(|_| known) {
                    Some(size) => Ok(Sparse { size, map: None }),
                    None => Err(malformed()),
                }
            }
            (None, Some(map)) => {
                let pairs = Some(map.len() as u64) == self.numblocks.and_then(|n| n.checked_mul(2));
                let known = self.name.is_some() && self.realsize.is_none() && pairs;
                match self.size.filter(|_| known) {
                    Some(size) => Ok(Sparse {
                        size,
                        map: Some(map),
                    }),
                    None => Err(malformed()),
                }
            }
            (Some((major, minor)), None) => {
                Err(Rule::SparseVersion.because(format_args!("{major}.{minor}")))
            }
            _ => Err(malformed()),
        }
    }
}

/// The first record of some, and what is behind it.
fn record(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = text.iter().take(8).position(|byte| *byte == b' ')?;
    let len = usize::try_from(number(&text[..space]).ok()?).ok()?;
    let (record, behind) = text.split_at_checked(len)?;
    let inner = record.strip_suffix(b"\n")?.get(space + 1..)?;
    Some((inner, behind))
}

fn name(value: &[u8]) -> Result<Vec<u8>> {
    match value.is_empty() || value.contains(&0) {
        true => Err(Rule::PaxMalformed.because("a name is none")),
        false => Ok(value.to_vec()),
    }
}

/// Decimal digits and nothing else.
pub fn number(text: &[u8]) -> Result<u64> {
    let digits = text.iter().all(u8::is_ascii_digit) && !text.is_empty();
    std::str::from_utf8(text)
        .ok()
        .filter(|_| digits)
        .and_then(|text| text.parse().ok())
        // So that sums of two of them can't overflow.
        .filter(|number| *number <= 1 << 62)
        .ok_or_else(|| Rule::PaxMalformed.because("a number is none"))
}
