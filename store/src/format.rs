//! Every stored byte, as `docs/FORMAT.md` describes it: pure encoding and decoding, no I/O.
//!
//! Every count and length is checked against a limit before anything is allocated for it.

mod codec;
pub mod frame;
pub mod keys;
pub mod manifest;
pub mod pack;
pub mod record;
pub mod working_set;

pub(crate) use codec::{Reader, Writer};

/// Why some bytes are not what they should be; the caller adds the object's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub String);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Malformed {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// `Ok` if `condition`, else [`Malformed`] with `text`.
pub(crate) fn require(condition: bool, text: &str) -> Result<(), Malformed> {
    if condition { Ok(()) } else { Err(text.into()) }
}
