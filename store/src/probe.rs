//! Does this store keep create-only? Decisions, names and collection are safe on no other: a commit would replace
//! the abort that a collector made, and of two packers that move a name both would be told that they did.

use futures::future::join_all;

use crate::format::keys;
use crate::format::record::MAX_RECORD_BYTES;
use crate::objects::Objects;
use crate::{Error, ErrorKind, SnapshotId};

/// Creators that race for one key.
const CREATORS: usize = 16;
/// Races, each for a key of its own. In the first one most creators still make their connections and come too late.
const RACES: usize = 4;
/// Bytes that each creator writes: a store that looks first and writes then takes longer over them.
const CONTENT_BYTES: usize = 4096;

/// An error of kind `Refused` if the store lets a second creator of a key succeed, one after the other or
/// at the same time. Costs some 70 small requests in seven rounds: before a store is
/// made, before anything is collected, and when a daemon starts.
pub(crate) async fn probe(objects: &Objects) -> Result<(), Error> {
    let keys: Vec<_> = (0..=RACES).map(|_| format!("gc/probe/{}", SnapshotId::random())).collect();
    let outcome = try_all(objects, &keys[0], &keys[1..]).await;
    // A key that stays is a few bytes that the next listing of `gc` shows.
    if let Err(error) = objects.delete_all(&keys).await {
        tracing::warn!("keys under gc/probe/ are not deleted: {error}");
    }
    outcome
}

/// The same for a store that does not even refuse one creator after the other, in two requests: before each pack. What is
/// created again has the bytes that it had.
pub(crate) async fn probe_quickly(objects: &Objects) -> Result<(), Error> {
    let there = objects.get(keys::FORMAT, MAX_RECORD_BYTES).await?;
    match objects.is_created_again(keys::FORMAT, there).await? {
        false => Ok(()),
        true => Err(refused(objects, TWICE)),
    }
}

const TWICE: &str = "an object be created twice";

fn refused(objects: &Objects, how: &str) -> Error {
    let text = format!(
        "this store lets {how}: nothing can be packed or collected safely here, use a store that honours If-None-Match"
    );
    Error::refused(objects.url(), text)
}

async fn try_all(objects: &Objects, twice: &str, races: &[String]) -> Result<(), Error> {
    objects.create(twice, &[content(0)]).await?;
    match objects.create(twice, &[content(1)]).await {
        Err(error) if error.kind() == ErrorKind::Exists => {}
        Err(error) => return Err(error),
        Ok(()) => return Err(refused(objects, TWICE)),
    }
    for key in races {
        if winners(objects, key).await? != 1 {
            return Err(refused(objects, "several racing creators of one object succeed"));
        }
    }
    Ok(())
}

/// How many of those who create `key` at the same time are told that they did.
async fn winners(objects: &Objects, key: &str) -> Result<usize, Error> {
    let racing = (0..CREATORS).map(|number| {
        let bytes = [content(number)];
        async move { objects.create(key, &bytes).await }
    });
    let mut winners = 0;
    for outcome in join_all(racing).await {
        match outcome {
            Ok(()) => winners += 1,
            Err(error) if error.kind() == ErrorKind::Exists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(winners)
}

/// Each creator's own bytes, so that none takes another's object for its own.
fn content(number: usize) -> bytes::Bytes {
    let own = format!("{number} {}\n", SnapshotId::random());
    own.repeat(CONTENT_BYTES / own.len()).into()
}
