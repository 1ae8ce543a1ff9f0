//! What a packed image can be refused for.

/// A rule that an archive breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// It ends in its middle.
    Truncated,
}
