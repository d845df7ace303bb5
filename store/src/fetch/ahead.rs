//! An object that is read before anybody knows what is in it: a working set whose snapshot is still being
//! opened. Its first bytes are asked for over many connections at once; when its header is there and the
//! snapshot may be read, its frames are taken from these bytes as from any other read, and verified.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

use super::{Fetcher, ObjectId};
use crate::Urgency;

/// Most bytes that are read ahead of one object; of a longer one the rest is asked for when it is known what is
/// wanted. At 90 MB/s a connection this much takes 6 ms, a round 30 ms.
const MOST_BYTES: u64 = 8 << 20;
/// Over how many requests they are spread.
const PARTS: u64 = 16;
/// A part is at least this long: a shorter one does not pay for its request.
const SHORTEST_BYTES: u64 = 128 << 10;

/// The first bytes of an object, on their way.
pub(crate) struct Ahead {
    part_bytes: u64,
    end: u64,
    parts: Vec<Part>,
}

/// `None` where the bytes did not come.
type Part = Shared<BoxFuture<'static, Option<Bytes>>>;

impl Ahead {
    /// How many bytes come first, and by themselves.
    pub(crate) fn first_bytes(&self) -> u64 {
        self.part_bytes.min(self.end)
    }

    /// Whether these bytes of the object are among those that are read.
    pub(super) fn holds(&self, range: &Range<u64>) -> bool {
        range.end <= self.end
    }

    /// These bytes of the object, when they are here; `None` if they do not come.
    pub(crate) async fn bytes(&self, range: Range<u64>) -> Option<Bytes> {
        if !self.holds(&range) || range.is_empty() {
            return None;
        }
        let index = |at: u64| usize::try_from(at / self.part_bytes).unwrap_or(usize::MAX);
        let (first, last) = (index(range.start), index(range.end - 1));
        let parts = self.parts.get(first..=last)?.iter().cloned();
        let parts = futures::future::try_join_all(parts.map(|part| async { part.await.ok_or(()) }));
        let parts = parts.await.ok()?;
        let from = usize::try_from(range.start - first as u64 * self.part_bytes).ok()?;
        let length = usize::try_from(range.end - range.start).ok()?;
        let all = match &parts[..] {
            [one] => one.clone(),
            several => several.concat().into(),
        };
        Some(all.slice(from..from + length))
    }
}

impl Fetcher {
    /// Begins to read the first bytes of an object of a remote store. `None` where it does not pay: a local store
    /// is read frame by frame, and a node that has some of the object's frames on its disk has most of them.
    pub(crate) fn read_ahead(&self, object: ObjectId, object_bytes: u64) -> Option<Arc<Ahead>> {
        let on_disk = self.0.disk.as_ref().is_some_and(|disk| disk.has_some_of(&object));
        if on_disk || self.0.objects.local_root().is_some() || object_bytes == 0 {
            return None;
        }
        let end = object_bytes.min(MOST_BYTES);
        let part_bytes = end.div_ceil(PARTS).max(SHORTEST_BYTES);
        let parts = (0..end.div_ceil(part_bytes)).map(|number| {
            let range = number * part_bytes..((number + 1) * part_bytes).min(end);
            let part = self.clone().read_part(object, range).boxed().shared();
            // Each goes on by itself, whoever waits for it.
            self.0.runtime.spawn(part.clone());
            part
        });
        Some(Arc::new(Ahead { part_bytes, end, parts: parts.collect() }))
    }

    /// Tried once: who wants these bytes and does not get them asks for them as for any others.
    async fn read_part(self, object: ObjectId, range: Range<u64>) -> Option<Bytes> {
        let (key, objects) = (object.key(), &self.0.objects);
        let length = range.end - range.start;
        self.count_store_read(length);
        let read = match range.start {
            // The header is in it: a record that is waited for, not a prefetch.
            0 => objects.get_range(&key, range).await,
            _ => {
                let _pass = objects.prefetch_pass().await;
                objects.try_range(&key, range, Urgency::Prefetch).await
            }
        };
        match read {
            Ok(bytes) if bytes.len() as u64 == length => Some(bytes),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!("not read ahead: {error}");
                None
            }
        }
    }
}
