//! Carrying out a collector's requests on a store.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::machine::{Answer, Collector, Fate, Request};
use super::{Collected, GarbageObject, Options, tidy};
use crate::format::keys;
use crate::format::record::{self, Abort, CollectionReport, Condemned, Decision};
use crate::store::{Store, read_record};
use crate::{Error, ErrorKind, SnapshotId, probe};

/// How long a packer at work is waited for.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks at those that are waited for: twice as long each time.
const GLANCES: std::ops::Range<Duration> = Duration::from_millis(100)..Duration::from_secs(5);
/// GETs in flight.
const PARALLEL: usize = 16;
/// Without a confirmation, no run takes a larger part of the bytes of all packs than this, in per cent.
const LARGEST_PART: u64 = 30;

/// See [`super::collect`].
pub(super) async fn run(store: &Store, options: Options) -> Result<Collected, Error> {
    refuse_if_halted(store).await?;
    if !options.dry_run {
        probe::probe(store.objects()).await?;
    }
    let (id, lease_timeout) = (SnapshotId::random(), options.lease_timeout);
    let mut run = Run { store, id, condemned_at: None, lease_timeout };
    let mut collector = Collector::new();
    let outcome = run.drive(&mut collector, options).await;
    if outcome.is_err() && run.condemned_at.is_some() {
        // A list that stays only keeps packers from sharing what is on it, until another run clears it away.
        let key = run.key();
        store.objects().delete(&key).await.unwrap_or_default();
    }
    outcome
}

async fn refuse_if_halted(store: &Store) -> Result<(), Error> {
    if store.objects().exists(keys::HALT).await? {
        let text = "collection is halted, because somebody found a live snapshot's object missing: read it, \
                    verify the store, and delete it to go on";
        return Err(Error::refused(keys::HALT, text));
    }
    Ok(())
}

struct Run<'a> {
    store: &'a Store,
    id: SnapshotId,
    /// When the condemned list was written, by the store's clock in milliseconds since 1970 and by ours.
    condemned_at: Option<(u64, Instant)>,
    lease_timeout: Duration,
}

impl Run<'_> {
    fn key(&self) -> String {
        format!("gc/condemned/{}", self.id)
    }

    async fn drive(
        &mut self,
        collector: &mut Collector,
        options: Options,
    ) -> Result<Collected, Error> {
        while let Some(request) = collector.next() {
            if collector.is_about_to_condemn() {
                self.look_for_losses(collector).await?;
                let collected = self.collected(collector);
                if options.dry_run {
                    return Ok(collected);
                }
                if !options.confirmed {
                    self.brake(collector, &collected).await?;
                }
            }
            if collector.is_about_to_delete() {
                refuse_if_halted(self.store).await?;
            }
            let answer = self.carry_out(request).await?;
            collector
                .take(answer)
                .map_err(|why| Error::refused(self.store.objects().url(), why))?;
        }
        let collected = self.collected(collector);
        if !options.dry_run {
            let now_unix_ms = self.report(&collected).await?;
            tidy::tidy(self.store.objects(), now_unix_ms, collector).await?;
        }
        Ok(collected)
    }

    fn collected(&self, collector: &Collector) -> Collected {
        let deleted: BTreeSet<&String> = collector.deleted().iter().collect();
        let plan = collector.plan().into_iter();
        let garbage = plan
            .filter(|(key, ..)| deleted.is_empty() || deleted.contains(key))
            .map(|(key, bytes, reason)| GarbageObject { key, bytes, reason });
        Collected {
            run: self.id,
            live_snapshots: collector.live().len() as u64,
            pack_bytes: collector.pack_bytes(),
            garbage: garbage.collect(),
            deleted: !deleted.is_empty(),
        }
    }

    async fn carry_out(&mut self, request: Request) -> Result<Answer, Error> {
        let objects = self.store.objects();
        Ok(match request {
            Request::List(prefix) => {
                let listed = objects.list(prefix).await?.into_iter();
                Answer::Listed(listed.map(|object| (object.key, object.bytes)).collect())
            }
            Request::Fates(txns) => Answer::Fates(self.read_fates(txns).await?),
            Request::Condemn(packs) => {
                let record = Condemned { run: self.id, packs: packs.into_iter().collect() };
                objects.create(&self.key(), &[record::seal(&record).into()]).await?;
                let listed = objects.list("gc/condemned").await?;
                let own = listed.into_iter().find(|object| object.key == self.key());
                let own =
                    own.ok_or_else(|| Error::refused(self.key(), "was written and is not listed"))?;
                self.condemned_at = Some((own.modified_unix_ms, Instant::now()));
                Answer::Done
            }
            Request::Settle { txns, wait } => Answer::Fates(self.settle(txns, wait).await?),
            Request::OwnCondemned => Answer::There(objects.exists(&self.key()).await?),
            Request::Delete(doomed) => {
                objects.delete_all(&doomed).await?;
                Answer::Done
            }
            Request::Release => {
                objects.delete(&self.key()).await?;
                Answer::Done
            }
        })
    }

    async fn read_fates(
        &self,
        txns: BTreeSet<SnapshotId>,
    ) -> Result<BTreeMap<SnapshotId, Fate>, Error> {
        let reading = futures::stream::iter(txns)
            .map(|txn| async move { Ok((txn, self.read_fate(txn).await?)) });
        reading.buffer_unordered(PARALLEL).try_collect().await
    }

    async fn read_fate(&self, txn: SnapshotId) -> Result<Fate, Error> {
        Ok(match read_record(self.store.objects(), &keys::snap(txn)).await? {
            Decision::Commit(commit) => {
                Fate::Committed(commit.packs.iter().map(|pack| pack.pack).collect())
            }
            Decision::Abort(_) => Fate::Aborted,
        })
    }

    /// Makes a decision for those whose packer is gone; waits for the others if `wait`.
    async fn settle(
        &self,
        txns: BTreeSet<SnapshotId>,
        wait: bool,
    ) -> Result<BTreeMap<SnapshotId, Fate>, Error> {
        let mut fates = BTreeMap::new();
        let mut open = txns;
        let (began, mut glance) = (Instant::now(), GLANCES.start);
        while !open.is_empty() {
            let leases = self.lease_times().await?;
            for txn in open.clone() {
                let settled = match self.is_stale(leases.get(&txn).copied()) {
                    true => self.decide(txn).await,
                    false => self.read_fate(txn).await,
                };
                match settled {
                    Ok(fate) => fates.insert(txn, fate),
                    // At work.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                open.remove(&txn);
            }
            let Some(at_work) = open.first().filter(|_| wait) else { break };
            if began.elapsed() > PATIENCE {
                let text = "a packer is at work with this lease: collect again when it is done";
                return Err(Error::refused(keys::lease(*at_work), text));
            }
            tokio::time::sleep(glance).await;
            glance = GLANCES.end.min(glance * 2);
        }
        Ok(fates)
    }

    async fn lease_times(&self) -> Result<BTreeMap<SnapshotId, u64>, Error> {
        let listed = self.store.objects().list("lease").await?.into_iter();
        let time = |object: crate::objects::ListedObject| {
            Some((keys::id_of(&object.key)?, object.modified_unix_ms))
        };
        Ok(listed.filter_map(time).collect())
    }

    /// Whether the packer is gone, by the store's own clock alone. Safety does not depend on it.
    fn is_stale(&self, renewed_unix_ms: Option<u64>) -> bool {
        let (Some(renewed), Some((then, since))) = (renewed_unix_ms, self.condemned_at) else {
            return true;
        };
        let now = u128::from(then) + since.elapsed().as_millis();
        now.saturating_sub(u128::from(renewed)) > self.lease_timeout.as_millis()
    }

    /// The decision of a transaction; an abort if it has none.
    async fn decide(&self, txn: SnapshotId) -> Result<Fate, Error> {
        let abort = Abort {
            snapshot: txn,
            nonce: SnapshotId::random(),
            run: self.id,
            reason: "its lease was not renewed".into(),
        };
        let key = keys::snap(txn);
        let sealed = record::seal(&Decision::Abort(abort));
        match self.store.objects().create(&key, &[sealed.into()]).await {
            Ok(()) => Ok(Fate::Aborted),
            Err(error) if error.kind() == ErrorKind::Exists => self.read_fate(txn).await,
            Err(error) => Err(error),
        }
    }

    /// Objects of live snapshots that were not listed were written since, or are lost; or the snapshot
    /// was removed since, and another run was faster.
    async fn look_for_losses(&self, collector: &Collector) -> Result<(), Error> {
        let objects = self.store.objects();
        for (key, snapshot) in collector.not_listed() {
            if objects.exists(&key).await? {
                continue;
            }
            if self.store.is_removed(snapshot).await? {
                let text = "went with its snapshot while this run looked: collect again";
                return Err(Error::refused(key, text));
            }
            super::halt(objects, &key).await;
            let text = "a live snapshot refers to it and it is gone: collection is halted";
            return Err(Error::damaged(key, text));
        }
        Ok(())
    }

    /// What looks like somebody's mistake needs a confirmation.
    async fn brake(&self, collector: &Collector, collected: &Collected) -> Result<(), Error> {
        let refuse = |text: String| {
            let remedy = "look at 'reap-pack gc --dry-run', then confirm with --yes";
            Err(Error::refused(self.store.objects().url(), format!("{text}: {remedy}")))
        };
        let bytes = collected.garbage_bytes();
        if bytes * 100 > collector.pack_bytes() * LARGEST_PART {
            return refuse(format!("{bytes} bytes of {} would go", collector.pack_bytes()));
        }
        if let Some(before) = self.last_report().await?
            && collected.live_snapshots < before.live_snapshots.div_ceil(2)
        {
            let (now, then) = (collected.live_snapshots, before.live_snapshots);
            return refuse(format!("{now} snapshots are live, {then} were at the last collection"));
        }
        Ok(())
    }

    async fn last_report(&self) -> Result<Option<CollectionReport>, Error> {
        let listed = self.store.objects().list("gc/report").await?;
        match listed.into_iter().max_by_key(|object| object.modified_unix_ms) {
            Some(newest) => Ok(Some(read_record(self.store.objects(), &newest.key).await?)),
            None => Ok(None),
        }
    }

    /// Leaves this run's report, and none that is older than it; answers with the store's time.
    async fn report(&self, collected: &Collected) -> Result<u64, Error> {
        let older = self.store.objects().list("gc/report").await?;
        let report = CollectionReport {
            run: self.id,
            live_snapshots: collected.live_snapshots,
            deleted_objects: if collected.deleted { collected.garbage.len() as u64 } else { 0 },
            deleted_bytes: if collected.deleted { collected.garbage_bytes() } else { 0 },
            written_unix_ms: record::now_unix_ms(),
        };
        let key = format!("gc/report/{}", self.id);
        let objects = self.store.objects();
        objects.create(&key, &[record::seal(&report).into()]).await?;
        let listed = objects.list("gc/report").await?;
        let own = listed.iter().find(|object| object.key == key);
        for object in older {
            objects.delete(&object.key).await?;
        }
        // Somebody else's newer run may have taken it away; then nothing counts as old.
        Ok(own.map_or(0, |own| own.modified_unix_ms))
    }
}
