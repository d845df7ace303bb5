//! Decoded frames in memory, least recently used out first, bounded in bytes.

use lru::LruCache;

use super::FrameKey;
use crate::Frame;

pub(super) struct MemoryCache {
    frames: LruCache<FrameKey, Frame>,
    bytes: u64,
    limit: u64,
}

impl MemoryCache {
    pub(super) fn new(limit: u64) -> Self {
        Self { frames: LruCache::unbounded(), bytes: 0, limit }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn get(&mut self, key: &FrameKey) -> Option<Frame> {
        self.frames.get(key).cloned()
    }

    /// Answers with what had to go, so that the caller frees it outside the lock.
    pub(super) fn insert(&mut self, key: FrameKey, frame: Frame) -> Vec<Frame> {
        self.bytes += frame.byte_count();
        let mut out: Vec<_> = self.frames.put(key, frame).into_iter().collect();
        self.bytes -= out.iter().map(Frame::byte_count).sum::<u64>();
        while self.bytes > self.limit
            && let Some((_, oldest)) = self.frames.pop_lru()
        {
            self.bytes -= oldest.byte_count();
            out.push(oldest);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::ObjectId;
    use crate::{PAGE_SIZE, SnapshotId};

    #[test]
    fn the_least_recently_used_frame_goes_first_and_bytes_stay_bounded() {
        let mut cache = MemoryCache::new(3 * PAGE_SIZE as u64);
        let object = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let frame = || Frame::new(vec![0; PAGE_SIZE]);
        for offset in 0..3 {
            assert!(cache.insert((object, offset), frame()).is_empty());
        }
        assert!(cache.get(&(object, 0)).is_some());
        assert_eq!(cache.insert((object, 3), frame()).len(), 1);
        assert!(cache.get(&(object, 1)).is_none(), "1 was used longest ago");
        assert_eq!(cache.bytes(), 3 * PAGE_SIZE as u64);
        assert_eq!(cache.insert((object, 3), frame()).len(), 1, "a repeated key replaces");
        assert_eq!(cache.bytes(), 3 * PAGE_SIZE as u64);
    }
}
