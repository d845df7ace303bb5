//! Working sets of a node: the newest of a profile, and publishing what was learned beside other nodes
//! that do the same.

use std::sync::Arc;

use tokio::task::{JoinError, JoinHandle, JoinSet};

use crate::fetch::{Ahead, ObjectId};
use crate::format::keys;
use crate::store::ListedWorkingSet;
use crate::working_set::build;
use crate::working_set::learning::LearnedSet;
use crate::{
    Error, ErrorKind, Name, Node, Profile, Snapshot, SnapshotId, WorkingSet, WorkingSetContent,
};

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

/// The working sets of a snapshot, newest first, and the first bytes of the newest, on their way.
type LookedAhead = (Vec<ListedWorkingSet>, Option<Arc<Ahead>>);

fn no_set(error: JoinError) -> Error {
    Error::local("looking for a working set", error)
}

/// A set without pages says that there is none.
fn has_pages(set: &Arc<WorkingSet>) -> bool {
    set.data_pages() + set.zero_pages() > 0
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
        let newest = self.newest_of(snapshot, profile, &listed, None).await?;
        Ok(newest.filter(has_pages))
    }

    /// Opens what `name` stands for, with the newest usable working set for `profile`, and begins to bring that
    /// set's frames: for a restore that is to come at once. A node that knows nothing of either needs three
    /// rounds of requests for all of it: the set is looked for while the snapshot is opened, and read before
    /// it is known to be usable.
    pub async fn open_with_working_set(
        &self,
        name: &Name,
        profile: &Profile,
    ) -> Result<(Arc<Snapshot>, Option<Arc<WorkingSet>>), Error> {
        self.open_named(name, |id| self.open_with_set_of(id, profile)).await
    }

    async fn open_with_set_of(
        &self,
        id: SnapshotId,
        profile: &Profile,
    ) -> Result<(Arc<Snapshot>, Option<Arc<WorkingSet>>), Error> {
        // In a task of its own: decoding the manifest must not hold it up.
        let node = self.clone();
        let looking = self.runtime().spawn(async move { node.look_ahead(id).await });
        // With the manifest and before it is known that the snapshot may be read: what is decoded meanwhile is
        // verified as ever, and nobody has it before that. It ends with this call.
        let (node, profile) = (self.clone(), profile.clone());
        let find = |snapshot: &Arc<Snapshot>| {
            let snapshot = snapshot.clone();
            let mut finding = JoinSet::new();
            let found = async move { node.find_ahead(&snapshot, &profile, looking).await };
            finding.spawn_on(found, self.runtime().handle());
            finding
        };
        let (snapshot, mut finding) =
            self.open_and(id, self.store().read_snapshot(id), find).await?;
        let found = finding.join_next().await.transpose().map_err(no_set)?;
        Ok((snapshot, found.transpose()?.flatten()))
    }

    /// The newest working set, where it was looked for; begins to decode what of it is read ahead.
    async fn find_ahead(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
        looking: JoinHandle<Result<LookedAhead, Error>>,
    ) -> Result<Option<Arc<WorkingSet>>, Error> {
        let (listed, ahead) = looking.await.map_err(no_set)??;
        let newest = self.newest_of(snapshot, profile, &listed, ahead.as_ref()).await?;
        let newest = newest.filter(has_pages);
        if let (Some(set), Some(ahead)) = (&newest, &ahead)
            && listed.first().is_some_and(|listed| listed.sequence == set.sequence())
        {
            snapshot.fetcher().decode_ahead(set.specs(), ahead);
        }
        Ok(newest)
    }

    /// While it is asked which set is the newest, it is taken for the first: it is, until a node has learned more.
    async fn look_ahead(&self, id: SnapshotId) -> Result<LookedAhead, Error> {
        let guess = self.0.fetcher.guess_ahead(id);
        let listed = self.store().working_sets(id).await?;
        let ahead = listed.first().and_then(|newest| match guess {
            Some(guess) if newest.sequence == keys::FIRST_SEQUENCE => {
                Some(guess.of_length(newest.stored_bytes))
            }
            _ => {
                let object = ObjectId::WorkingSet(id, newest.sequence);
                self.0.fetcher.read_ahead(object, newest.stored_bytes)
            }
        });
        Ok((listed, ahead.map(Arc::new)))
    }

    /// The same among `listed`, also one without pages: that is what a removed set leaves.
    async fn newest_of(
        &self,
        snapshot: &Arc<Snapshot>,
        profile: &Profile,
        listed: &[ListedWorkingSet],
        ahead: Option<&Arc<Ahead>>,
    ) -> Result<Option<Arc<WorkingSet>>, Error> {
        for (number, listed) in listed.iter().take(MAX_LOOKED_AT).enumerate() {
            // Only the newest is read ahead.
            let ahead = ahead.filter(|_| number == 0);
            let mut opened = self.open_set(snapshot, *listed, ahead.map(Arc::as_ref)).await;
            if opened.as_ref().is_err_and(|error| error.kind() == ErrorKind::Damaged) {
                // As records are: it may be whole in the store.
                opened = self.open_set(snapshot, *listed, None).await;
            }
            match opened {
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
            let newest = self.newest_of(snapshot, profile, &listed, None).await?;
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
            let content = merged.content(profile, limit_bytes);
            match self.publish_as(snapshot, &content, highest).await {
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
            let newest = self.newest_of(snapshot, profile, &listed, None).await?;
            if newest.as_ref().is_none_or(|set| !has_pages(set)) {
                return Ok(None);
            }
            let highest = listed.first().map(|listed| listed.sequence);
            let nothing = LearnedSet::default().content(profile, 0);
            match self.publish_as(snapshot, &nothing, highest).await {
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
        content: &WorkingSetContent,
        highest: Option<u64>,
    ) -> Result<Arc<WorkingSet>, Error> {
        let id = snapshot.id();
        let sequence = keys::next_sequence(&keys::working_sets(id), highest)?;
        let chunks = build(snapshot, content).await?;
        let stored_bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.store().objects().create(&keys::working_set(id, sequence), &chunks).await?;
        self.open_working_set(snapshot, ListedWorkingSet { sequence, stored_bytes }).await
    }
}
