//! Who works with the bucket, each as a process that may be killed or stopped.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::bucket::{Bucket, Bug, Client, Life, Remote, Role};
use crate::collect::{Options, collect};
use crate::node::Pin;
use crate::objects::Objects;
use crate::pack::simulated::{self, Packs};
use crate::pack::{Lineage, Request};
use crate::store::Store;
use crate::{Error, ErrorKind, PAGE_SIZE, SnapshotId};

/// How long actors are started, and how long they are waited for then.
const BUSY: Duration = Duration::from_secs(300);
const PATIENCE: Duration = Duration::from_secs(4 * 3600);
/// Shorter than a lease is renewed for: a stop of a minute makes a lease stale.
const LEASE_TIMEOUT: Duration = Duration::from_secs(60);

/// Clones share everything.
#[derive(Clone)]
pub(super) struct World {
    pub(super) bucket: Bucket,
    packs: Arc<Packs>,
    /// Oldest first.
    acknowledged: Arc<Mutex<Vec<SnapshotId>>>,
    removed: Arc<Mutex<BTreeSet<SnapshotId>>>,
}

/// A process.
struct Process {
    store: Store,
    life: Arc<Mutex<Life>>,
}

impl World {
    pub(super) fn new(seed: u64, bug: Bug) -> Self {
        Self {
            bucket: Bucket::new(seed, bug),
            packs: Arc::default(),
            acknowledged: Arc::default(),
            removed: Arc::default(),
        }
    }

    fn process(&self, role: Role) -> Process {
        let (client, life) = Client::new(&self.bucket, role);
        Process { store: Store::over(Objects::over(Arc::new(Remote(client)))), life }
    }

    fn count(&self, what: &'static str) {
        self.bucket.with(|state| state.events.count(what));
    }

    async fn pause(&self, most: Duration) {
        let most = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
        sleep(Duration::from_millis(self.bucket.below(most))).await;
    }

    /// Three packers, two collectors, two readers and an operator, each started again and again.
    pub(super) async fn run(&self) {
        let roles = [
            Role::Packer,
            Role::Packer,
            Role::Packer,
            Role::Collector,
            Role::Collector,
            Role::Reader,
            Role::Reader,
            Role::Operator,
        ];
        let lines = roles.into_iter().enumerate().map(|(number, role)| {
            let number = u8::try_from(number).unwrap_or(u8::MAX);
            self.line(role, SnapshotId::from_bytes([number; 16]))
        });
        futures::future::join_all(lines).await;
    }

    /// One process after the other, of one role on one node.
    async fn line(&self, role: Role, node: SnapshotId) {
        let end = Instant::now() + BUSY;
        while Instant::now() < end {
            self.pause(Duration::from_secs(10)).await;
            let process = self.process(role);
            let life = process.life.clone();
            let (world, killed) = (self.clone(), self.fate(&life));
            let work = async move {
                match role {
                    Role::Packer => world.pack(&process.store).await,
                    Role::Collector => world.collect(&process.store).await,
                    Role::Reader => world.read(&process.store, node).await,
                    Role::Operator => world.remove(&process.store).await,
                }
            };
            tokio::select! {
                biased;
                () = work => {}
                () = killed => {}
                () = sleep(PATIENCE) => {
                    self.bucket.with(|state| state.violate(format!("a {role:?} hangs")));
                }
            }
            life.lock().dead = true;
        }
    }

    /// Now and then a process is killed, or stopped for a while.
    fn fate(&self, life: &Arc<Mutex<Life>>) -> impl Future<Output = ()> + use<> {
        let (world, life) = (self.clone(), life.clone());
        async move {
            let fate = world.bucket.below(7);
            world.pause(Duration::from_secs(if fate == 2 { 20 } else { 2 })).await;
            match fate {
                0 => {
                    world.count("an actor is killed");
                    life.lock().dead = true;
                }
                1 => {
                    world.count("an actor stalls");
                    let seconds = 1 + world.bucket.below(900);
                    life.lock().stalled_until = Some(Instant::now() + Duration::from_secs(seconds));
                    futures::future::pending().await
                }
                2 => {
                    world.count("an actor is cut off");
                    let seconds = 1 + world.bucket.below(900);
                    life.lock().cut_off_until = Some(Instant::now() + Duration::from_secs(seconds));
                    futures::future::pending().await
                }
                _ => futures::future::pending().await,
            }
        }
    }

    async fn pack(&self, store: &Store) {
        let parents = (0..self.bucket.below(3)).filter_map(|_| self.choose()).collect();
        let request = Request {
            lineage: Lineage { parents, ..Lineage::default() },
            ..Request::new("f".parse().expect("a name"), Vec::new())
        };
        let mut content = [0; PAGE_SIZE];
        content[..16].copy_from_slice(SnapshotId::random().as_bytes());
        let work = Duration::from_millis(self.bucket.below(20_000));
        match simulated::pack(store, &request, &content, work, &self.packs).await {
            Ok(packed) => {
                self.count("a commit that is acknowledged");
                if !self.bucket.with(|state| state.is_committed(packed.id)) {
                    let text = format!("{} is acknowledged and not committed", packed.id);
                    self.bucket.with(|state| state.violate(text));
                }
                self.acknowledged.lock().push(packed.id);
            }
            Err(error) if error.to_string().contains("a collector ended") => {
                self.count("a packing that a collector ended");
            }
            Err(error) if error.to_string().contains("may be committed or not") => {
                self.count("a commit whose outcome is in doubt");
            }
            Err(_) => self.count("a packing that failed"),
        }
    }

    async fn collect(&self, store: &Store) {
        match collect(store, options()).await {
            Ok(_) => self.count("a collection that ended"),
            Err(_) => self.count("a collection that was refused or failed"),
        }
    }

    /// With a store that works.
    pub(super) async fn collect_quietly(&self) -> Result<(), Error> {
        collect(&self.process(Role::Collector).store, options()).await.map(|_| ())
    }

    /// Opens a snapshot, reads from it for a while, lets go and opens it again,
    /// as VMs of one function come and go.
    async fn read(&self, store: &Store, node: SnapshotId) {
        let Some(id) = self.choose() else { return };
        for _ in 0..5 {
            let mut pin = Pin::new(store, node, id);
            match pin.open(store.read_snapshot(id)).await {
                Ok(_) => self.serve(id).await,
                Err(error) if error.to_string().contains("was removed") => {
                    self.count("an opening that finds its snapshot removed");
                }
                Err(_) => self.count("an opening that failed"),
            }
            for _ in 0..3 {
                if pin.let_go().await.is_ok() {
                    break;
                }
            }
        }
    }

    async fn serve(&self, id: SnapshotId) {
        let serving = Serving { world: self, number: self.bucket.with(|state| state.serve(id)) };
        self.pause(Duration::from_secs(60)).await;
        drop(serving);
    }

    /// An acknowledged snapshot, the newest as often as all others: what is young is what races are about.
    fn choose(&self) -> Option<SnapshotId> {
        let known = self.acknowledged.lock();
        let newest = known.len().checked_sub(1)?;
        let any = usize::try_from(self.bucket.below(known.len() as u64)).unwrap_or(newest);
        Some(known[if self.bucket.below(2) == 0 { newest } else { any }])
    }

    async fn remove(&self, store: &Store) {
        let Some(id) = self.choose() else { return };
        // Even where it is not known whether it was.
        self.removed.lock().insert(id);
        match store.remove(id, id).await {
            Ok(()) => self.count("a removal"),
            Err(_) => self.count("a removal that may have failed"),
        }
    }

    /// What was acknowledged and not removed can be read by a process that knows nothing.
    pub(super) async fn check_acknowledged(&self) {
        let store = self.process(Role::Operator).store;
        let kept: Vec<_> = {
            let removed = self.removed.lock();
            let known = self.acknowledged.lock();
            known.iter().filter(|id| !removed.contains(id)).copied().collect()
        };
        for id in kept {
            if let Err(error) = self.check_whole(&store, id).await {
                self.bucket.with(|state| state.violate(format!("{id} was acknowledged: {error}")));
            }
        }
    }

    async fn check_whole(&self, store: &Store, id: SnapshotId) -> Result<(), Error> {
        let (commit, _) = store.read_snapshot(id).await?;
        for pack in &commit.packs {
            let key = pack.pack.key();
            let object = store.objects().get(&key, pack.bytes).await?;
            if crate::Hash::of(&object) != pack.hash {
                return Err(Error::new(ErrorKind::Damaged, key, "has other bytes"));
            }
        }
        Ok(())
    }
}

/// Until it is dropped, also by being killed.
struct Serving<'a> {
    world: &'a World,
    number: u64,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.world.bucket.with(|state| state.stop_serving(self.number));
    }
}

fn options() -> Options {
    Options { dry_run: false, confirmed: true, lease_timeout: LEASE_TIMEOUT }
}
