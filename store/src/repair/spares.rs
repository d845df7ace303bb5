//! Where good bytes may be had: other objects of the store, another store, nodes' caches. Whatever they
//! give is verified by the hash that the store at hand has recorded.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use bytes::Bytes;

use super::Sources;
use crate::fetch::FrameSpec;
use crate::fetch::ObjectId;
use crate::fetch::disk::{DiskCache, Limits};
use crate::format::frame::{self, FrameEntry};
use crate::format::keys::PackId;
use crate::format::record::PackRef;
use crate::id::Hash;
use crate::store::Store;
use crate::verify::is_finding;
use crate::{Error, Frame};

/// See the module.
pub(crate) struct Spares {
    own: Store,
    from: Option<Store>,
    caches: Vec<DiskCache>,
    /// The packs that they are for.
    bad: HashSet<PackId>,
    /// Frames of other packs with the same bytes, by hash: of this store or of the other one.
    elsewhere: HashMap<Hash, (Store, PackId, FrameEntry)>,
}

impl Spares {
    /// Opens the caches, which no other process may use meanwhile. Nothing is evicted from them.
    pub(super) fn open(own: &Store, sources: &Sources) -> Result<Self, Error> {
        let caches = sources.caches.iter().map(|directory| open_cache(directory));
        let caches = caches.collect::<Result<_, _>>()?;
        let (own, from) = (own.clone(), sources.from.clone());
        Ok(Self { own, from, caches, bad: HashSet::new(), elsewhere: HashMap::new() })
    }

    /// A whole object of the other store, if it has one of this key and these bytes.
    pub(super) async fn object(
        &self,
        key: &str,
        bytes: u64,
        hash: Hash,
    ) -> Result<Option<Bytes>, Error> {
        let Some(from) = &self.from else { return Ok(None) };
        match from.objects().get(key, bytes).await {
            Ok(object) => Ok(Some(object).filter(|object| Hash::of(object) == hash)),
            Err(error) if is_finding(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The same of a pack.
    pub(super) async fn pack(&self, pack: &PackRef) -> Result<Option<Bytes>, Error> {
        self.object(&pack.pack.key(), pack.bytes, pack.hash).await
    }

    /// The other store.
    pub(super) fn from(&self) -> Option<&Store> {
        self.from.as_ref()
    }

    /// Whether the store's own pack is not to be relied on.
    pub(crate) fn is_for(&self, pack: &PackId) -> bool {
        self.bad.contains(pack)
    }

    /// Looks, for the packs of `bad`, through all manifests for frames in other packs that have the hashes of `wanted`.
    pub(super) async fn look_elsewhere(
        &mut self,
        wanted: &HashSet<Hash>,
        bad: &HashSet<PackId>,
    ) -> Result<(), Error> {
        self.bad.clone_from(bad);
        if wanted.is_empty() {
            return Ok(());
        }
        let stores: Vec<Store> = self.from.iter().cloned().chain([self.own.clone()]).collect();
        for store in stores {
            let own = store.id() == self.own.id();
            for id in store.ids().await? {
                let manifest = match store.read_snapshot(id).await {
                    Ok((_, manifest)) => manifest,
                    Err(error) if is_finding(&error) => continue,
                    Err(error) => return Err(error),
                };
                for packed in &manifest.frames {
                    let (pack, _) = manifest.packs[packed.pack as usize];
                    if wanted.contains(&packed.entry.hash) && !(own && bad.contains(&pack)) {
                        let place = (store.clone(), pack, packed.entry);
                        self.elsewhere.entry(packed.entry.hash).or_insert(place);
                    }
                }
            }
        }
        Ok(())
    }

    /// The decoded bytes of a frame, from wherever they are to be had.
    pub(crate) async fn frame(
        &self,
        pack: PackId,
        entry: FrameEntry,
    ) -> Result<Option<Frame>, Error> {
        if let Some(frame) = read(&self.own, pack, entry, entry.hash).await? {
            return Ok(Some(frame));
        }
        let spec = FrameSpec { object: ObjectId::Pack(pack), entry };
        if let Some(frame) = self.caches.iter().find_map(|cache| cached(cache, &spec)) {
            return Ok(Some(frame));
        }
        if let Some(from) = &self.from
            && let Some(frame) = read(from, pack, entry, entry.hash).await?
        {
            return Ok(Some(frame));
        }
        match self.elsewhere.get(&entry.hash) {
            Some((store, pack, other)) => read(store, *pack, *other, entry.hash).await,
            None => Ok(None),
        }
    }
}

/// A frame of a store, if it is there and is what is wanted.
async fn read(
    store: &Store,
    pack: PackId,
    entry: FrameEntry,
    wanted: Hash,
) -> Result<Option<Frame>, Error> {
    let range = entry.offset..entry.end();
    let key = pack.key();
    let error = match store.objects().get_range(&key, range).await {
        Ok(stored) => return Ok(decode(&entry, &stored).filter(|_| entry.hash == wanted)),
        Err(error) => error,
    };
    // An object that ends before the range is answered in many ways.
    if is_finding(&error) || store.objects().length(&key).await? < entry.end() {
        return Ok(None);
    }
    Err(error)
}

fn cached(cache: &DiskCache, spec: &FrameSpec) -> Option<Frame> {
    let stored = cache.read(std::slice::from_ref(spec)).pop()??;
    decode(&spec.entry, &stored)
}

fn decode(entry: &FrameEntry, stored: &[u8]) -> Option<Frame> {
    frame::decode(entry, stored).ok().map(Frame::new)
}

fn open_cache(directory: &Path) -> Result<DiskCache, Error> {
    if !directory.join("node").exists() {
        return Err(Error::not_found(directory.display(), "is no cache directory of reapd"));
    }
    let limits = Limits { bytes: u64::MAX, free_floor: 0 };
    DiskCache::open(directory, limits)
}
