//! Headers that go before a member's own and say more of it, and what a name means.

use pileus_base::Result;

use super::super::rule::Rule;
use super::pax::Pax;

/// Headers that go before a member.
#[derive(Default)]
pub struct Before {
    pub pax: Option<Pax>,
    pub name: Option<Vec<u8>>,
}

impl Before {
    pub fn is_empty(&self) -> bool {
        self.pax.is_none() && self.name.is_none()
    }

    pub fn add_pax(&mut self, pax: Pax) -> Result<()> {
        if self.name.is_some() && pax.path.is_some() {
            return Err(Rule::HeaderName.because("it has two"));
        }
        match self.pax.replace(pax) {
            None => Ok(()),
            Some(_) => Err(Rule::PaxMalformed.because("a member has two")),
        }
    }

    /// The data of GNU's header for long names, which ends with a NUL.
    pub fn add_name(&mut self, mut text: Vec<u8>) -> Result<()> {
        if text.pop() != Some(0) || text.is_empty() || text.contains(&0) {
            return Err(Rule::HeaderName.because("a long name is none"));
        }
        let other = self.pax.as_ref().is_some_and(|pax| pax.path.is_some());
        match self.name.replace(text) {
            None if !other => Ok(()),
            _ => Err(Rule::HeaderName.because("it has two")),
        }
    }
}

/// A name without what says "here": `./disk.img`, `/disk.img`, `a/../disk.img`, `disk.img/`.
pub fn plain(name: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join(&b'/')
}
