//! One error for the crate: what the caller can do, the object it is about, and the cause.

use std::fmt;
use std::sync::Arc;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The input is wrong (a name, a URL, a file): tell the user, do not retry.
    Invalid,
    /// The named thing is not there.
    NotFound,
    /// The thing to be created is there already.
    Exists,
    /// Stored bytes are not what was written, and fetching them again did not help.
    Damaged,
    /// The store did not answer (in time); trying again later may help.
    Unreachable,
    /// A local file or the kernel refused.
    Local,
    /// The store, the process or the transaction is in a state that forbids this.
    Refused,
}

/// A failure, cheap to clone because every waiter of one fetch gets it.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    object: String,
    message: String,
}

impl Error {
    /// An error of `kind` about `object` (an object key, a path, a name).
    pub fn new(kind: ErrorKind, object: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self(Arc::new(Inner { kind, object: object.to_string(), message: message.to_string() }))
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What the error is about.
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// What happened to it.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.object, self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.0.kind)
    }
}

impl std::error::Error for Error {}

macro_rules! constructors {
    ($($function:ident => $kind:ident),*) => {
        impl Error {
            $(#[doc = concat!("An error of kind [`ErrorKind::", stringify!($kind), "`].")]
            pub fn $function(object: impl fmt::Display, message: impl fmt::Display) -> Self {
                Self::new(ErrorKind::$kind, object, message)
            })*
        }
    };
}
constructors!(invalid => Invalid, not_found => NotFound, exists => Exists, damaged => Damaged,
    unreachable => Unreachable, local => Local, refused => Refused);
