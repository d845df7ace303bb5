//! Identities: transactions (which are also snapshot ids), page ids, and human names.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// Longest accepted name of a snapshot, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// The transaction that wrote a snapshot, which is the snapshot's id: 128 random bits, written as
/// 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// A new random id.
    pub fn random() -> Self {
        #[cfg(test)]
        if let Some(bytes) = crate::simulation::seeded_id() {
            return Self(bytes);
        }
        Self(rand::random())
    }

    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Hex(&self.0))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SnapshotId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse_hex::<16>(text)
            .map(Self)
            .ok_or_else(|| Error::invalid(text, "a snapshot id is 32 lower-case hex digits"))
    }
}

impl serde::Serialize for SnapshotId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for SnapshotId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// BLAKE3 of some bytes; of a page's bytes it is the *page id*.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_hex(&text)
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a hash is 64 lower-case hex digits"))
    }
}

/// A human name for a snapshot, such as `resnet:v3`: 1 to 128 of `A-Z a-z 0-9 . _ : @ + -`,
/// beginning with a letter or a digit, without `..`. Names are directory names on the mount and
/// parts of object keys, so nothing else is let in.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        check_name(text)?;
        Ok(Self(text.to_owned()))
    }
}

impl serde::Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Longest name of a profile.
const MAX_PROFILE_BYTES: usize = 64;

/// Which use of a snapshot a working set is for: empty for the usual one, else 1 to 64 characters by the
/// rule of [`Name`].
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Profile(String);

impl Profile {
    /// The profile as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Profile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_PROFILE_BYTES {
            return Err(Error::invalid(format!("{text:?}"), "a profile has at most 64 characters"));
        }
        if !text.is_empty() {
            check_name(text)?;
        }
        Ok(Self(text.to_owned()))
    }
}

/// Checks `text` against the rule of [`Name`]; disks are named by the same rule.
pub fn check_name(text: &str) -> Result<(), Error> {
    let rule = "a name is 1 to 128 of A-Z a-z 0-9 . _ : @ + -, begins with a letter or digit, \
                and has no '..'";
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:@+-".contains(&byte);
    let good = text.len() <= MAX_NAME_BYTES
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(allowed)
        && !text.contains("..");
    if good { Ok(()) } else { Err(Error::invalid(format!("{text:?}"), rule)) }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
    }
    Some(bytes)
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_back() {
        let id = SnapshotId::random();
        assert_eq!(id.to_string().parse::<SnapshotId>().expect("parses"), id);
        assert!("xyz".parse::<SnapshotId>().is_err());
        assert!(
            id.to_string().to_uppercase().parse::<SnapshotId>().is_err()
                || !id.to_string().contains(|c: char| c.is_ascii_lowercase())
        );
    }

    #[test]
    fn names_refuse_what_is_no_file_name() {
        for good in ["a", "resnet:v3", "A.b_c-d@e+f", &"x".repeat(128)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "a..b", "-a", ".a", "ä", "a\n", &"x".repeat(129)]
        {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
            assert!(bad.is_empty() || bad.parse::<Profile>().is_err(), "{bad}");
        }
        assert_eq!(
            "".parse::<Profile>().map_err(|error| error.to_string()),
            Ok(Profile::default())
        );
        assert!("x".repeat(64).parse::<Profile>().is_ok());
        assert!("x".repeat(65).parse::<Profile>().is_err());
    }
}
