//! An object store in memory that fails as real ones do, and that knows what must never happen.
//!
//! Each request travels: it waits, arrives, has its effect, and its answer waits again. A caller that
//! dies or gives up on the way leaves a request that arrives all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{Instant, sleep};

use crate::SnapshotId;
use crate::format::keys::{self, NameKey, PackId};
use crate::format::record::{Condemned, Decision, unseal};

/// Keys of one page of a listing.
const PAGE_KEYS: usize = 3;

/// A rule that is broken on purpose; the simulation must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    None,
    /// A commit or abort replaces the decision that is there.
    DecisionsAreReplaced,
    /// Packers do not see what collectors condemn.
    CondemnedIsHidden,
    /// Collectors do not see that packers are at work.
    LeasesAreHidden,
    /// Collectors do not see pins.
    PinsAreHidden,
}

/// How often things go wrong, in 10,000 requests.
#[derive(Clone, Copy)]
pub(super) struct Rates {
    pub(super) error_before: u32,
    pub(super) error_after: u32,
    pub(super) hang: u32,
    pub(super) duplicate: u32,
    pub(super) wrong_body: u32,
}

impl Rates {
    pub(super) const NONE: Self =
        Self { error_before: 0, error_after: 0, hang: 0, duplicate: 0, wrong_body: 0 };
}

/// What happened; a run in which the interesting things did not happen proves nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Events(pub(super) BTreeMap<&'static str, u64>);

impl Events {
    pub(super) fn count(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    modified_unix_ms: u64,
}

pub(super) struct State {
    pub(super) rng: StdRng,
    pub(super) rates: Rates,
    pub(super) events: Events,
    /// The first thing that must never happen and did.
    pub(super) violation: Option<String>,
    objects: BTreeMap<String, Object>,
    committed: BTreeMap<SnapshotId, BTreeSet<PackId>>,
    condemned: BTreeSet<PackId>,
    served: BTreeMap<u64, SnapshotId>,
    next_serving: u64,
    bug: Bug,
    began: Instant,
}

/// Clones share the objects.
#[derive(Clone)]
pub(super) struct Bucket(Arc<Mutex<State>>);

impl Bucket {
    pub(super) fn new(seed: u64, bug: Bug) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: StdRng::seed_from_u64(seed),
            rates: Rates::NONE,
            events: Events::default(),
            violation: None,
            objects: BTreeMap::new(),
            committed: BTreeMap::new(),
            condemned: BTreeSet::new(),
            served: BTreeMap::new(),
            next_serving: 0,
            bug,
            began: Instant::now(),
        })))
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock())
    }

    /// A number below `end`.
    pub(super) fn below(&self, end: u64) -> u64 {
        self.with(|state| state.rng.random_range(0..end))
    }
}

impl State {
    /// Somebody reads from `snapshot` until [`State::stop_serving`].
    pub(super) fn serve(&mut self, snapshot: SnapshotId) -> u64 {
        self.next_serving += 1;
        self.served.insert(self.next_serving, snapshot);
        self.events.count("a reader serves");
        if self.objects.contains_key(&keys::tomb(snapshot)) {
            self.events.count("a reader serves what is removed meanwhile");
        }
        self.check_whole(snapshot, "is served");
        self.next_serving
    }

    pub(super) fn stop_serving(&mut self, serving: u64) {
        self.served.remove(&serving);
    }

    pub(super) fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// Committed, and not removed.
    pub(super) fn live(&self) -> BTreeMap<SnapshotId, BTreeSet<PackId>> {
        let live = |id: &&SnapshotId| !self.objects.contains_key(&keys::tomb(**id));
        let ids = self.committed.keys().filter(live);
        ids.map(|id| (*id, self.committed[id].clone())).collect()
    }

    pub(super) fn is_committed(&self, id: SnapshotId) -> bool {
        self.committed.contains_key(&id)
    }

    pub(super) fn keys(&self, prefix: &str) -> BTreeSet<String> {
        self.objects.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// As an operator does for nodes that will not come back.
    pub(super) fn delete_pins(&mut self) {
        self.objects.retain(|key, _| !key.starts_with("pin/"));
    }

    fn check_whole(&mut self, id: SnapshotId, why: &str) {
        let Some(packs) = self.committed.get(&id) else { return };
        let wanted = packs.iter().map(PackId::key).chain([keys::manifest(id)]);
        if let Some(lost) = wanted.into_iter().find(|key| !self.objects.contains_key(key)) {
            self.violate(format!("{lost} is gone and {id}, which needs it, {why}"));
        }
    }

    fn now_unix_ms(&self) -> u64 {
        1_000_000 + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn put(&mut self, key: &str, bytes: Bytes, create: bool) -> Result<(), object_store::Error> {
        let replaces = self.bug == Bug::DecisionsAreReplaced && key.starts_with("snap/");
        if create && !replaces && self.objects.contains_key(key) {
            return Err(object_store::Error::AlreadyExists {
                path: key.to_owned(),
                source: "it is there".into(),
            });
        }
        if !create && !key.starts_with("lease/") && !key.starts_with("pin/") {
            self.violate(format!("{key} is written without create-only"));
        }
        if let Some(txn) = key.strip_prefix("snap/").and_then(|txn| txn.parse().ok()) {
            match unseal::<Decision>(&bytes) {
                Ok(Decision::Commit(commit)) => {
                    let packs: BTreeSet<_> = commit.packs.iter().map(|pack| pack.pack).collect();
                    if packs.iter().any(|pack| pack.txn != txn) {
                        self.events.count("a commit refers to packs of others");
                    }
                    self.events.count("a commit");
                    self.committed.insert(txn, packs);
                    self.check_whole(txn, "is committed just now");
                }
                Ok(Decision::Abort(_)) => {
                    self.committed.remove(&txn);
                    self.events.count("an abort");
                }
                Err(why) => self.violate(format!("{key}: {why}")),
            }
        }
        if key.starts_with("gc/condemned/")
            && let Ok(condemned) = unseal::<Condemned>(&bytes)
        {
            self.condemned.extend(condemned.packs);
        }
        if key == keys::HALT {
            self.violate("collection is halted, and nothing was lost".to_owned());
        }
        let modified_unix_ms = self.now_unix_ms();
        self.objects.insert(key.to_owned(), Object { bytes, modified_unix_ms });
        Ok(())
    }

    /// Whether a name has a newer record than this one, or the one that this hints at.
    fn is_replaced(&self, key: &str) -> bool {
        let (Some(name), Some(NameKey::Record(of) | NameKey::Hint(of, _))) =
            (keys::name_of(key), keys::name_key(key))
        else {
            return false;
        };
        let records = self.objects.keys().filter(|other| other.starts_with(&keys::refs(&name)));
        records.filter_map(|other| keys::sequence_of(other)).any(|other| other > of)
    }

    fn delete(&mut self, key: &str) {
        if self.objects.remove(key).is_none() {
            return;
        }
        let kind = key.split('/').next().unwrap_or_default();
        let may_go = match kind {
            "pack" | "manifest" | "ws" | "lease" | "pin" | "gc" => true,
            "ref" => self.is_replaced(key),
            _ => false,
        };
        if !may_go {
            self.violate(format!("{key} is deleted"));
        }
        if !["pack", "manifest"].contains(&kind) {
            return;
        }
        self.events.count("a pack or manifest is deleted");
        if let Some(pack) = key.strip_prefix("pack/").and_then(|pack| pack.parse().ok())
            && !self.condemned.contains(&pack)
        {
            self.violate(format!("{key} is deleted and was never condemned"));
        }
        for id in self.live().into_keys() {
            self.check_whole(id, "exists");
        }
        for id in self.served.values().copied().collect::<Vec<_>>() {
            self.check_whole(id, "is served");
        }
    }
}

/// Who makes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Packer,
    Collector,
    Reader,
    Operator,
}

/// One process's way to the bucket.
pub(super) struct Client {
    bucket: Bucket,
    role: Role,
    life: Arc<Mutex<Life>>,
}

#[derive(Default)]
pub(super) struct Life {
    /// Killed: nothing more is sent.
    pub(super) dead: bool,
    /// Stopped (SIGSTOP) until then.
    pub(super) stalled_until: Option<Instant>,
    /// What a collector's run failed to read, and did not read well since: it must not delete.
    not_read: BTreeSet<String>,
    /// Until when nothing that it sends arrives, and then all that was not refused, late.
    pub(super) cut_off_until: Option<Instant>,
}

/// What happens to one request.
struct Plan {
    before: Duration,
    travel: Duration,
    after: Duration,
    /// When the caller gives up waiting.
    patience: Duration,
    fails_before: bool,
    fails_after: bool,
    duplicate: Option<Duration>,
}

impl Client {
    pub(super) fn new(bucket: &Bucket, role: Role) -> (Arc<Self>, Arc<Mutex<Life>>) {
        let life = Arc::new(Mutex::new(Life::default()));
        (Arc::new(Self { bucket: bucket.clone(), role, life: life.clone() }), life)
    }

    fn plan(&self, writes: bool) -> Plan {
        self.bucket.with(|state| {
            let Rates { error_before, error_after, hang, duplicate, .. } = state.rates;
            let rng = &mut state.rng;
            let mut happens = |rate: u32| rng.random_range(0..10_000) < rate;
            let (fails_before, fails_after) = (happens(error_before), happens(error_after));
            let (hangs, repeats) = (happens(hang), writes && happens(duplicate));
            let mut ms = |most: u64| Duration::from_millis(rng.random_range(0..most));
            let travel = if hangs { ms(900_000) } else { ms(20) };
            // As a proxy's second try comes, and as a request that was stuck somewhere does.
            let latest = if ms(2).is_zero() { 60_000 } else { 3_600_000 };
            let duplicate = repeats.then(|| ms(latest));
            let (before, after) = (ms(20), ms(20));
            for (what, happened) in [
                ("an error before effect", fails_before),
                ("an error after effect", fails_after && !fails_before),
                ("a hanging request", hangs && !fails_before),
                ("a late duplicate", duplicate.is_some() && !fails_before),
            ] {
                if happened {
                    state.events.count(what);
                }
            }
            let patience = Duration::from_secs(5);
            Plan { before, travel, after, patience, fails_before, fails_after, duplicate }
        })
    }

    async fn alive(&self) {
        loop {
            let (dead, stalled) = {
                let life = self.life.lock();
                (life.dead, life.stalled_until.filter(|until| *until > Instant::now()))
            };
            match stalled {
                _ if dead => futures::future::pending().await,
                Some(until) => tokio::time::sleep_until(until).await,
                None => return,
            }
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        writes: bool,
        mut effect: impl FnMut(&mut State) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut plan = self.plan(writes);
        self.alive().await;
        let cut_off_until = self.life.lock().cut_off_until;
        if let Some(until) = cut_off_until.filter(|until| *until > Instant::now()) {
            let late = Duration::from_millis(self.bucket.below(200_000));
            plan.travel = until - Instant::now() + late;
            plan.fails_before = self.bucket.below(2) == 0;
        }
        sleep(plan.before).await;
        self.alive().await;
        if plan.fails_before {
            return Err(failure("refused"));
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let bucket = self.bucket.clone();
        tokio::spawn(async move {
            sleep(plan.travel).await;
            let outcome = bucket.with(&mut effect);
            // The caller may have given up.
            sender.send(outcome).unwrap_or_default();
            if let Some(later) = plan.duplicate {
                sleep(later).await;
                bucket.with(effect).map(|_| ()).unwrap_or_default();
            }
        });
        let outcome = tokio::time::timeout(plan.patience, receiver).await;
        sleep(plan.after).await;
        self.alive().await;
        match outcome {
            Ok(Ok(outcome)) if !plan.fails_after => outcome,
            _ => Err(failure("no answer")),
        }
    }

    fn hides(&self, prefix: &str) -> bool {
        match self.bucket.with(|state| state.bug) {
            Bug::CondemnedIsHidden => self.role == Role::Packer && prefix == "gc/condemned",
            Bug::LeasesAreHidden => self.role == Role::Collector && prefix == "lease",
            Bug::PinsAreHidden => self.role == Role::Collector && prefix == "pin",
            _ => false,
        }
    }

    async fn list_page(&self, prefix: String, after: String) -> Result<Vec<ObjectMeta>> {
        let page = move |state: &mut State| {
            let under = |key: &&String| key.starts_with(&prefix) && **key > after;
            let keys: Vec<String> =
                state.objects.keys().filter(under).take(PAGE_KEYS).cloned().collect();
            Ok(keys.into_iter().map(|key| meta(&key, &state.objects[&key])).collect())
        };
        self.call(false, page).await
    }
}

fn failure(text: &'static str) -> object_store::Error {
    object_store::Error::Generic { store: "simulation", source: text.into() }
}

fn meta(key: &str, object: &Object) -> ObjectMeta {
    let ms = i64::try_from(object.modified_unix_ms).unwrap_or(i64::MAX);
    ObjectMeta {
        location: Path::from(key),
        last_modified: (std::time::UNIX_EPOCH + Duration::from_millis(ms.unsigned_abs())).into(),
        size: object.bytes.len() as u64,
        e_tag: None,
        version: None,
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.role)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// An `Arc` of its own, because a listing outlives the call.
#[derive(Debug)]
pub(super) struct Remote(pub(super) Arc<Client>);

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[async_trait]
impl ObjectStore for Remote {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let (key, bytes) = (location.to_string(), Bytes::from(payload));
        let create = matches!(options.mode, PutMode::Create);
        self.0.call(true, move |state| state.put(&key, bytes.clone(), create)).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        unimplemented!("nothing is uploaded in parts")
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let key = location.to_string();
        let found = move |state: &mut State| match state.objects.get(&key) {
            Some(object) => Ok((meta(&key, object), object.bytes.clone())),
            None => Err(object_store::Error::NotFound {
                path: key.clone(),
                source: "it is not there".into(),
            }),
        };
        let name = location.to_string();
        let (meta, bytes) = self.0.call(false, found).await.inspect_err(|error| {
            if !matches!(error, object_store::Error::NotFound { .. }) {
                self.0.life.lock().not_read.insert(name.clone());
            }
        })?;
        let wrong = self.0.bucket.with(|state| {
            let wrong = state.rng.random_range(0..10_000) < state.rates.wrong_body;
            if wrong && !options.head {
                state.events.count("a wrong body");
            }
            wrong && !options.head
        });
        let bytes = if wrong {
            self.0.life.lock().not_read.insert(name);
            let mut changed = bytes.to_vec();
            match self.0.bucket.below(2) {
                0 => changed.truncate(changed.len() / 2),
                _ => changed[bytes.len() / 2] ^= 4,
            }
            changed.into()
        } else {
            self.0.life.lock().not_read.remove(&name);
            bytes
        };
        let range = 0..bytes.len() as u64;
        let body = futures::stream::once(async move { Ok(bytes) }).boxed();
        Ok(GetResult {
            payload: GetResultPayload::Stream(body),
            meta,
            range,
            attributes: Default::default(),
            extensions: Default::default(),
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let client = self.0.clone();
        locations
            .then(move |location| {
                let client = client.clone();
                async move {
                    let location = location?;
                    let key = location.to_string();
                    let deletes = key.starts_with("pack/") && client.role == Role::Collector;
                    let not_read = client.life.lock().not_read.first().cloned();
                    if deletes && let Some(not_read) = not_read {
                        let text =
                            format!("{key} is deleted by a run that could not read {not_read}");
                        client.bucket.with(|state| state.violate(text));
                    }
                    let delete = move |state: &mut State| {
                        state.delete(&key);
                        Ok(())
                    };
                    client.call(true, delete).await.map(|()| location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let client = self.0.clone();
        let prefix = prefix.map(ToString::to_string).unwrap_or_default();
        if client.hides(&prefix) {
            return futures::stream::empty().boxed();
        }
        if client.role == Role::Collector && prefix == "pack" {
            // A run begins.
            client.life.lock().not_read.clear();
        }
        let prefix = if prefix.is_empty() { prefix } else { format!("{prefix}/") };
        let pages = futures::stream::unfold(Some(String::new()), move |after| {
            let (client, prefix) = (client.clone(), prefix.clone());
            let listed = prefix.clone();
            async move {
                match client.list_page(prefix, after?).await {
                    Ok(page) => {
                        let last = page.last().map(|last| last.location.to_string());
                        let more = last.filter(|_| page.len() == PAGE_KEYS);
                        Some((page.into_iter().map(Ok).collect::<Vec<_>>(), more))
                    }
                    Err(error) => {
                        client.life.lock().not_read.insert(listed.clone());
                        Some((vec![Err(error)], None))
                    }
                }
            }
        });
        pages.flat_map(futures::stream::iter).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        unimplemented!("nothing is listed by folder")
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unimplemented!("nothing is copied")
    }
}
