//! A snapshot written once more, under a new id: what repacking and copying share.

use std::ops::ControlFlow;
use std::sync::Arc;

use tokio::runtime::Runtime;

use crate::format::keys;
use crate::format::record::Commit;
use crate::format::{Malformed, frame, working_set};
use crate::pack::{Lineage, Packed, Progress, Request, SnapshotFile, SourceFile, pack_sources};
use crate::repair::Spares;
use crate::store::{ListedWorkingSet, Store};
use crate::{Error, ErrorKind, Name, Node, Snapshot, SnapshotId};

/// What to write, and where to.
pub(crate) struct Rewrite<'a> {
    /// The snapshot as it is, open and so pinned.
    pub(crate) snapshot: &'a Arc<Snapshot>,
    /// The node that has it open.
    pub(crate) node: &'a Node,
    /// Where the new one goes.
    pub(crate) target: &'a Store,
    /// A runtime for the target.
    pub(crate) runtime: &'a Runtime,
    /// The name in the new commit record.
    pub(crate) name: Name,
    /// Whose pages it may refer to.
    pub(crate) lineage: Lineage,
    /// It takes the old one's place.
    pub(crate) replaces: bool,
    /// Where frames of packs come from that are missing or damaged.
    pub(crate) spares: Option<Arc<Spares>>,
}

impl Rewrite<'_> {
    /// Writes it: same bytes, same labels and facts, and the working sets that are usable; answers
    /// with how many those are, too.
    pub(crate) fn run(
        &self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(Packed, u64), Error> {
        let commit = self.snapshot.commit();
        let facts = self.snapshot.facts().clone();
        let request = Request {
            labels: commit.labels.clone(),
            vmm: facts.vmm.clone(),
            vmm_version: facts.vmm_version.clone(),
            guest_page_bytes: facts.guest_page_bytes,
            lineage: self.lineage.clone(),
            replaces: self.replaces.then_some(commit.snapshot),
            ..Request::new(self.name.clone(), Vec::new())
        };
        let same_store = self.node.store().id() == self.target.id();
        let source = |file| {
            let (snapshot, spares) = (self.snapshot.clone(), self.spares.clone());
            SourceFile::below(SnapshotFile { snapshot, file, same_store, spares })
        };
        let sources: Vec<_> = (0..self.snapshot.files().len()).map(source).collect();
        let packed = pack_sources(self.target, self.runtime, &request, &facts, &sources, progress)?;
        let carried = self.carry_working_sets(packed.id)?;
        Ok((packed, carried))
    }

    /// Binds the usable working sets to the new snapshot, oldest first. One that is not usable costs
    /// speed only, and stays behind.
    fn carry_working_sets(&self, new: SnapshotId) -> Result<u64, Error> {
        let commit = self.runtime.block_on(self.target.commit(new))?;
        let source = self.node.store();
        let mut listed = self.node.block_on(source.working_sets(self.snapshot.id()))?;
        listed.reverse();
        let mut carried = 0;
        for one in listed {
            let chunks = match self.node.block_on(rebound(source, self.snapshot, one, &commit)) {
                Ok(chunks) => chunks,
                Err(error) if matches!(error.kind(), ErrorKind::Damaged | ErrorKind::NotFound) => {
                    tracing::warn!("a working set stays behind: {error}");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let object = |sequence| (keys::working_set(new, sequence), chunks.clone());
            self.runtime.block_on(self.target.create_next(&keys::working_sets(new), object))?;
            carried += 1;
        }
        Ok(carried)
    }
}

/// A working set of `old`, bound to the snapshot of `new`: its pages are the same pages.
async fn rebound(
    source: &Store,
    old: &Snapshot,
    listed: ListedWorkingSet,
    new: &Commit,
) -> Result<Vec<bytes::Bytes>, Error> {
    let key = keys::working_set(old.id(), listed.sequence);
    let damaged = |why: Malformed| Error::damaged(&key, why);
    let mut header = source.working_set_header(old, listed, None).await?;
    let object = source.objects().get(&key, working_set::MAX_OBJECT_BYTES).await?;
    let mut chunks = Vec::with_capacity(header.frames.len() + 1);
    let mut offset = 0;
    for frame in &mut header.frames {
        let from = usize::try_from(frame.entry.offset).unwrap_or(usize::MAX).min(object.len());
        let to = (from + frame.entry.stored_bytes as usize).min(object.len());
        let stored = object.slice(from..to);
        frame::decode(&frame.entry, &stored).map_err(damaged)?;
        frame.entry.offset = offset;
        offset = frame.entry.end();
        chunks.push(stored);
    }
    header.snapshot = new.snapshot;
    header.manifest_hash = new.manifest_hash;
    chunks.insert(0, working_set::encode(&header).into());
    Ok(chunks)
}
