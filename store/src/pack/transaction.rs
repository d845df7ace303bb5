//! Carrying out a packer's requests on a store: everything but the packs.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::index::Index;
use super::lease::Lease;
use super::machine::{Answer, Outcome, Packer, Request as Step, Verdict};
use super::{Filled, Packed, Request, lineage};
use crate::format::keys::{self, PackId};
use crate::format::manifest;
use crate::format::record::{self, Commit, Decision, FileRecord, MAX_RECORD_BYTES};
use crate::id::Hash;
use crate::store::{Store, read_record};
use crate::{Error, ErrorKind, SnapshotId};

/// Between two questions for a decision that is in doubt.
const BETWEEN_QUESTIONS: Duration = Duration::from_secs(1);

/// One packing: its [`Packer`] and what its requests came to.
pub(super) struct Transaction<'a> {
    packer: Packer,
    id: SnapshotId,
    store: &'a Store,
    request: &'a Request,
    began: Instant,
    /// Where there are parents.
    index: Option<Index>,
    lease: Option<Lease>,
    parents: Vec<Commit>,
    written: Option<Written>,
    in_doubt_since: Option<Instant>,
    failure: Option<Error>,
}

/// What is in the store, or will be, if the transaction commits.
struct Written {
    sealed: Vec<u8>,
    nonce: SnapshotId,
    packed: Packed,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(store: &'a Store, request: &'a Request) -> Result<Self, Error> {
        let id = SnapshotId::random();
        let lineage = &request.lineage;
        let has_parents = lineage.automatic || !lineage.parents.is_empty();
        Ok(Self {
            // What replaces another gets its names one by one, each only if it still stands for that.
            packer: Packer::new(id, has_parents, request.replaces.is_none()),
            id,
            store,
            request,
            began: Instant::now(),
            index: None,
            lease: None,
            parents: Vec::new(),
            written: None,
            in_doubt_since: None,
            failure: None,
        })
    }

    pub(super) fn id(&self) -> SnapshotId {
        self.id
    }

    /// What to carry out next: [`Step::Store`] by the caller, who ends it with
    /// [`Transaction::stored`]; everything else by [`Transaction::carry_out`].
    pub(super) fn next(&self) -> Option<Step> {
        self.packer.next()
    }

    pub(super) fn store(&self) -> &'a Store {
        self.store
    }

    pub(super) fn request(&self) -> &'a Request {
        self.request
    }

    /// What this node remembers; `None` where there are no parents.
    pub(super) fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Commit records of the parents, in the order in which they are asked for a page.
    pub(super) fn parents(&self) -> &[Commit] {
        &self.parents
    }

    /// Whether the manifest may refer to a pack of somebody else.
    pub(super) fn may_refer_to(&self, pack: &PackId) -> bool {
        self.packer.may_refer_to(pack) && !self.request.lineage.avoided.contains(pack)
    }

    pub(super) async fn carry_out(&mut self, step: Step) {
        let answer = match step {
            Step::TakeLease => self.take_lease().await,
            Step::Condemned => lineage::condemned(self.store).await.map(Answer::Condemned),
            Step::Parents => self.choose_parents().await,
            Step::Store => unreachable!("the packs are the caller's; this is a bug"),
            Step::Commit => self.commit().await,
            Step::ReadDecision => self.read_decision().await,
            Step::Name => self.name().await,
            Step::EndLease => self.end_lease().await,
        };
        self.take(answer);
    }

    /// All own packs are in the store, or it failed. Writes the manifest.
    pub(super) async fn stored(&mut self, filled: Result<Filled, Error>) {
        let answer = match filled {
            Ok(filled) => self.write_manifest(filled).await,
            Err(error) => Err(error),
        };
        self.take(answer);
    }

    fn take(&mut self, answer: Result<Answer, Error>) {
        let taken = answer.and_then(|answer| {
            self.packer.take(answer).map_err(|why| Error::local("packing", why))
        });
        if let Err(error) = taken {
            self.packer.fail();
            self.failure.get_or_insert(error);
        }
    }

    async fn take_lease(&mut self) -> Result<Answer, Error> {
        self.lease = Some(Lease::take(self.store, self.id).await?);
        Ok(Answer::Done)
    }

    async fn choose_parents(&mut self) -> Result<Answer, Error> {
        let index = Index::open(self.store.id(), self.request.lineage.index.as_deref())?;
        self.parents = lineage::choose(self.store, self.request, &index).await?;
        self.index = Some(index);
        let packs = self.parents.iter().flat_map(|commit| &commit.packs);
        Ok(Answer::Parents(packs.map(|pack| pack.pack).collect()))
    }

    async fn write_manifest(&mut self, filled: Filled) -> Result<Answer, Error> {
        let Filled { manifest, statistics, packs, parents } = filled;
        let request = self.request;
        let object =
            manifest::encode(&manifest).map_err(|error| Error::local(&request.name, error))?;
        let files = manifest.files.iter().map(|(file, _)| FileRecord {
            name: file.name.clone(),
            kind: file.kind,
            bytes: file.size,
        });
        let referred: BTreeSet<PackId> = packs.iter().map(|pack| pack.pack).collect();
        let commit = Commit {
            snapshot: self.id,
            nonce: SnapshotId::random(),
            created_unix_ms: record::now_unix_ms(),
            name: request.name.to_string(),
            manifest_hash: Hash::of(&object),
            manifest_bytes: object.len() as u64,
            packs,
            files: files.collect(),
            parents: parents.clone(),
            labels: request.labels.clone(),
            statistics,
        };
        let (nonce, manifest_bytes) = (commit.nonce, commit.manifest_bytes);
        let file_bytes = commit.files.iter().map(|file| file.bytes).sum();
        let sealed = record::seal(&Decision::Commit(Box::new(commit)));
        if sealed.len() as u64 > MAX_RECORD_BYTES {
            return Err(Error::refused(self.id, "refers to too many packs: repack it first"));
        }
        self.store.objects().create(&keys::manifest(self.id), &[object.into()]).await?;
        let (id, name) = (self.id, request.name.clone());
        let (sequence, left_bytes) = (None, 0);
        let packed = Packed {
            id,
            name,
            sequence,
            statistics,
            file_bytes,
            manifest_bytes,
            parents,
            left_bytes,
        };
        self.written = Some(Written { sealed, nonce, packed });
        Ok(Answer::Stored(referred, self.began.elapsed()))
    }

    /// Creates the commit record. From then on the snapshot exists.
    async fn commit(&mut self) -> Result<Answer, Error> {
        let sealed = self.written.as_ref().map(|written| written.sealed.clone());
        let record = [sealed.unwrap_or_default().into()];
        match self.store.objects().create(&keys::snap(self.id), &record).await {
            Ok(()) => Ok(Answer::Created),
            Err(error) => Ok(match error.kind() {
                ErrorKind::Exists => Answer::Exists,
                ErrorKind::Unreachable => self.unknown(error).await,
                _ => {
                    self.failure = Some(error);
                    Answer::NotWritten
                }
            }),
        }
    }

    async fn read_decision(&mut self) -> Result<Answer, Error> {
        let nonce = self.written.as_ref().map(|written| written.nonce);
        Ok(match read_record::<Decision>(self.store.objects(), &keys::snap(self.id)).await {
            Ok(Decision::Commit(commit)) if Some(commit.nonce) == nonce => {
                Answer::Decision(Some(Verdict::Ours))
            }
            Ok(Decision::Commit(_)) => Answer::Decision(Some(Verdict::Anothers)),
            Ok(Decision::Abort(abort)) => {
                let text =
                    format!("a collector ended this packing ({}): start it again", abort.reason);
                self.failure = Some(Error::refused(self.id, text));
                Answer::Decision(Some(Verdict::Aborted))
            }
            Err(error) => match error.kind() {
                ErrorKind::NotFound => Answer::Decision(None),
                ErrorKind::Unreachable | ErrorKind::Damaged => self.unknown(error).await,
                _ => return Err(error),
            },
        })
    }

    /// Asking again is safe, guessing is not.
    async fn unknown(&mut self, error: Error) -> Answer {
        let since = *self.in_doubt_since.get_or_insert_with(Instant::now);
        self.failure = Some(error);
        tokio::time::sleep(BETWEEN_QUESTIONS).await;
        Answer::Unknown(since.elapsed())
    }

    async fn name(&mut self) -> Result<Answer, Error> {
        // What was in doubt on the way here is decided.
        self.failure = None;
        let sequence = self.store.tag(&self.request.name, self.id).await?;
        if let Some(written) = &mut self.written {
            written.packed.sequence = Some(sequence);
        }
        Ok(Answer::Done)
    }

    /// Whatever came of it. What an unfinished transaction wrote is garbage that collectors take.
    async fn end_lease(&mut self) -> Result<Answer, Error> {
        match self.lease.take() {
            Some(lease) => lease.release().await,
            // Taking it failed, and may have reached the store.
            None => super::lease::delete(self.store, self.id).await,
        }
        Ok(Answer::Done)
    }

    /// What came of it all; there is no next step.
    pub(super) fn end(self) -> Result<Packed, Error> {
        let refused = |text: &str| Error::refused(self.id, text);
        let failure = self.failure.unwrap_or_else(|| refused("was not committed"));
        Err(match (self.packer.outcome(), self.written) {
            (Some(Outcome::Committed), Some(Written { packed, .. })) => {
                if packed.sequence.is_some() || self.request.replaces.is_some() {
                    return Ok(packed);
                }
                let text = format!(
                    "is packed as {id}, but has not got its name ('reap-pack tag {id} {name}' gives it): {failure}",
                    id = self.id,
                    name = self.request.name
                );
                Error::new(failure.kind(), &self.request.name, text)
            }
            (Some(Outcome::TooLate), _) => refused("packing took over 24 hours: start it again"),
            (Some(Outcome::Anothers), _) => {
                Error::exists(keys::snap(self.id), "was written by somebody else")
            }
            (Some(Outcome::InDoubt), _) => {
                let text = format!(
                    "may be committed or not; 'reap-pack show {}' tells when the store answers: {failure}",
                    self.id
                );
                Error::new(failure.kind(), &self.request.name, text)
            }
            _ => failure,
        })
    }
}
