//! Working sets of a node: the newest of a profile, and publishing what was learned beside other nodes
//! that do the same.

use std::sync::Arc;

use crate::format::keys;
use crate::store::ListedWorkingSet;
use crate::working_set::build;
use crate::working_set::learning::LearnedSet;
use crate::{Error, ErrorKind, Node, Profile, Snapshot, WorkingSet};

/// How many sets are looked at, newest first, for one of a profile.
const MAX_LOOKED_AT: usize = 256;
/// How often a publication starts over because another node published meanwhile.
const TRIES: usize = 32;

/// What a node has learned since it read a set.
pub struct Learned<'a> {
    /// The set that it was read from; `None` where there was none.
    pub sequence: Option<u64>,
    /// That set.
    pub base: &'a LearnedSet,
    /// What became of it here.
    pub now: &'a LearnedSet,
}

impl Node {
    /// The newest usable working set of `snapshot` for `profile`, if there is one that was not removed.
    /// A damaged or foreign one is passed over with a warning: it costs speed, never correctness.
    pub async fn working_set_of(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
    ) -> Result<Option<Arc<WorkingSet>>, Error> {
        let listed = self.store().working_sets(snapshot.id()).await?;
        let newest = self.newest_of(snapshot, profile, &listed).await?;
        Ok(newest.filter(|set| set.data_pages() + set.zero_pages() > 0))
    }

    /// The same among `listed`, also one without pages: that is what a removed set leaves.
    async fn newest_of(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
        listed: &[ListedWorkingSet],
    ) -> Result<Option<Arc<WorkingSet>>, Error> {
        for listed in listed.iter().take(MAX_LOOKED_AT) {
            match self.open_working_set(snapshot, *listed).await {
                Ok(set) if set.profile() == profile => return Ok(Some(set)),
                Ok(_) => {}
                Err(error) => tracing::warn!("working set is not used: {error}"),
            }
        }
        Ok(None)
    }

    /// Publishes what was learned for `profile`, at most `limit_bytes` of pages, and answers with the set
    /// that is newest then. Sequences are created in order and never twice: whoever finds one taken reads what
    /// the other published, merges and tries again, so that no node's pages are lost. Where the
    /// other's set holds all of it by and large, that one is the answer.
    pub async fn publish_learned(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
        learned: &Learned<'_>,
        limit_bytes: u64,
    ) -> Result<Arc<WorkingSet>, Error> {
        for _ in 0..TRIES {
            let listed = self.store().working_sets(snapshot.id()).await?;
            let newest = self.newest_of(snapshot, profile, &listed).await?;
            let others = newest.filter(|set| learned.sequence != Some(set.sequence()));
            let merged = match &others {
                Some(set) => {
                    let theirs = LearnedSet::of(set);
                    let merged = learned.now.merge(learned.base, &theirs, limit_bytes);
                    if !merged.is_worth_publishing(&theirs) {
                        return Ok(set.clone());
                    }
                    merged
                }
                None => learned.now.clone(),
            };
            let highest = listed.first().map(|listed| listed.sequence);
            match self.publish_as(snapshot, profile, &merged, highest).await {
                Err(error) if error.kind() == ErrorKind::Exists => {}
                published => return published,
            }
        }
        let text = "other nodes publish working sets all the time: it is tried again with the next";
        Err(Error::refused(snapshot.id(), text))
    }

    /// Publishes a set without pages for `profile`, so that there is none any more: objects are not deleted,
    /// or their sequence would be used twice. Answers with its sequence, `None` if there was no set.
    pub async fn remove_working_set(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
    ) -> Result<Option<u64>, Error> {
        for _ in 0..TRIES {
            let listed = self.store().working_sets(snapshot.id()).await?;
            let newest = self.newest_of(snapshot, profile, &listed).await?;
            if newest.is_none_or(|set| set.data_pages() + set.zero_pages() == 0) {
                return Ok(None);
            }
            let highest = listed.first().map(|listed| listed.sequence);
            match self.publish_as(snapshot, profile, &LearnedSet::default(), highest).await {
                Ok(set) => return Ok(Some(set.sequence())),
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::refused(snapshot.id(), "nodes publish working sets all the time: try again"))
    }

    /// Creates the set that follows `highest`; an error of kind `Exists` if there is one meanwhile.
    async fn publish_as(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
        set: &LearnedSet,
        highest: Option<u64>,
    ) -> Result<Arc<WorkingSet>, Error> {
        let id = snapshot.id();
        let sequence = keys::next_sequence(&keys::working_sets(id), highest)?;
        let chunks = build(snapshot, &set.content(profile)).await?;
        let stored_bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.store().objects().create(&keys::working_set(id, sequence), &chunks).await?;
        self.open_working_set(snapshot, ListedWorkingSet { sequence, stored_bytes }).await
    }
}
