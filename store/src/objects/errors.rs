//! What a failed request comes to: what the caller can do, and one line that says it.

use super::Objects;
use super::credentials::Credentials;
use crate::{Error, ErrorKind};

/// What stores answer when it is the keys that they do not accept, rather than what is asked. S3 answers
/// 400 or 403 with these.
const KEYS_REFUSED: [&str; 7] = [
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
];

/// Whether the store did not accept the credentials.
pub(super) fn keys_refused(error: &object_store::Error) -> bool {
    let text = chain(error);
    KEYS_REFUSED.iter().any(|code| text.contains(&format!("<Code>{code}</Code>")))
}

/// Whether that may be so: a HEAD is answered without a reason.
pub(super) fn keys_may_be_refused(error: &object_store::Error) -> bool {
    use object_store::Error as Source;
    matches!(error, Source::PermissionDenied { .. } | Source::Unauthenticated { .. })
        || chain(error).contains("400 Bad Request")
}

/// Whether the object ends before the range that was asked for. Objects never change: asking again does not help.
fn ends_before(error: &object_store::Error) -> bool {
    let object_store::Error::Generic { .. } = error else { return false };
    let text = chain(error);
    text.contains("416 Range Not Satisfiable") || text.contains("InvalidRange") || is_short(&text)
}

/// What `object_store` says of an answer that holds less than was asked for.
fn is_short(text: &str) -> bool {
    text.contains("Requested ") && text.contains(", got ")
}

impl Objects {
    /// An error about an object.
    pub(super) fn explain(&self, key: &str, error: &object_store::Error) -> Error {
        use object_store::Error as Source;
        let object = format!("{}/{key}", self.url.trim_end_matches('/'));
        if keys_refused(error) {
            return self.explain_refused_keys(&object, error);
        }
        let kind = match error {
            Source::NotFound { .. } => ErrorKind::NotFound,
            Source::AlreadyExists { .. } | Source::Precondition { .. } => ErrorKind::Exists,
            Source::PermissionDenied { .. } | Source::Unauthenticated { .. } => ErrorKind::Refused,
            Source::NotSupported { .. } | Source::NotImplemented { .. } => ErrorKind::Refused,
            _ if ends_before(error) => ErrorKind::Damaged,
            _ if self.local_root.is_some() => ErrorKind::Local,
            _ => ErrorKind::Unreachable,
        };
        match (kind, error) {
            (ErrorKind::Damaged, _) => {
                Error::damaged(object, "ends before the range that was asked for")
            }
            (ErrorKind::NotFound, _) => Error::not_found(object, "is not there"),
            (ErrorKind::Exists, _) => Error::exists(object, "is there already"),
            (_, Source::PermissionDenied { .. } | Source::Unauthenticated { .. })
                if self.local_root.is_none() =>
            {
                let source = self.credentials.describe();
                Error::new(kind, object, format!("{} (credentials: {source})", chain(error)))
            }
            _ => Error::new(kind, object, chain(error)),
        }
    }

    /// Where a file is read again, somebody will renew it: that is worth waiting for as a store is.
    fn explain_refused_keys(&self, object: &str, error: &object_store::Error) -> Error {
        let source = self.credentials.describe();
        let text =
            format!("the store does not accept the credentials ({source}): {}", chain(error));
        let kind = match self.credentials {
            Credentials::SharedFile(_) => ErrorKind::Unreachable,
            _ => ErrorKind::Refused,
        };
        Error::new(kind, object, text)
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(code: &str) -> object_store::Error {
        let body = format!("Server returned 403: <Error><Code>{code}</Code><Key>a</Key></Error>");
        object_store::Error::PermissionDenied { path: "a".into(), source: body.into() }
    }

    #[test]
    fn refused_keys_are_told_from_refused_requests() {
        assert!(keys_refused(&answered("ExpiredToken")));
        assert!(keys_refused(&answered("InvalidAccessKeyId")));
        assert!(!keys_refused(&answered("AccessDenied")));
    }

    #[test]
    fn an_object_that_is_too_short_is_told_from_a_store_that_fails() {
        let answered =
            |text: &str| object_store::Error::Generic { store: "S3", source: text.into() };
        assert!(ends_before(&answered(
            "Server returned error response: 416 Range Not Satisfiable"
        )));
        assert!(ends_before(&answered("Requested 5..9, got 5..7")));
        assert!(!ends_before(&answered(
            "Server returned error response: 500 Internal Server Error"
        )));
    }

    #[test]
    fn causes_are_one_line() {
        let inner = std::io::Error::other("two\nlines");
        let error = object_store::Error::Generic { store: "S3", source: Box::new(inner) };
        assert_eq!(chain(&error), "Generic S3 error: two lines");
    }
}
