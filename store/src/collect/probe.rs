//! Does this store keep create-only? Collection is safe on no other.

use futures::future::join_all;

use crate::objects::Objects;
use crate::{Error, ErrorKind, SnapshotId};

/// Creators that race for one key.
const CREATORS: usize = 16;

/// An error of kind `Refused` if the store lets a second creator of a key succeed, one after the other or
/// at the same time.
pub(super) async fn probe(objects: &Objects) -> Result<(), Error> {
    let keys = [0, 1].map(|_| format!("gc/probe/{}", SnapshotId::random()));
    let outcome = both(objects, &keys).await;
    for key in &keys {
        // A key that stays is a few bytes that the next listing of `gc` shows.
        if let Err(error) = objects.delete(key).await {
            tracing::warn!("{key} is not deleted: {error}");
        }
    }
    outcome
}

async fn both(objects: &Objects, keys: &[String; 2]) -> Result<(), Error> {
    let refused = |how: &str| {
        let text = format!(
            "this store lets {how}: nothing can be collected safely here, use a store that honours If-None-Match"
        );
        Err(Error::refused(objects.url(), text))
    };
    objects.create(&keys[0], &[content(0)]).await?;
    match objects.create(&keys[0], &[content(1)]).await {
        Err(error) if error.kind() == ErrorKind::Exists => {}
        Err(error) => return Err(error),
        Ok(()) => return refused("an object be created twice"),
    }
    let racing = (0..CREATORS).map(|number| {
        let bytes = [content(number)];
        async move { objects.create(&keys[1], &bytes).await }
    });
    let mut winners = 0;
    for outcome in join_all(racing).await {
        match outcome {
            Ok(()) => winners += 1,
            Err(error) if error.kind() == ErrorKind::Exists => {}
            Err(error) => return Err(error),
        }
    }
    if winners == 1 { Ok(()) } else { refused("several racing creators of one object succeed") }
}

/// Each creator's own bytes, so that none takes another's object for its own.
fn content(number: usize) -> bytes::Bytes {
    format!("{number} {}\n", SnapshotId::random()).into()
}
