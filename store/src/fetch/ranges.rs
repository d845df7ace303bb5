//! Which bytes to ask for: neighbouring frames of one object become one request.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{Ahead, FrameSpec, ObjectId};
use crate::Urgency;

/// Between two frames, this many unwanted bytes are read rather than starting another request.
const LARGEST_GAP_BYTES: u64 = 32 << 10;
/// A request is at most this long.
const LONGEST_BYTES: u64 = 4 << 20;
/// And at least this long before it pays to spread the bytes over more connections: 1.4 ms at 90 MB/s.
pub(super) const SHORTEST_BYTES: u64 = 128 << 10;
/// The same where requests come one by one, all day, from whoever reads through the mount: 12 ms, next to 30 ms until a
/// store answers at all. What the kernel asks for at once is shorter, and so is one request.
const SHORTEST_NEAR_BYTES: u64 = 1 << 20;
/// Over how many requests a batch is spread, when it is long enough.
pub(super) const SPREAD: u64 = 16;

/// The same two for streaming, where nobody waits for a certain frame and requests are what costs: a
/// gap takes 23 ms at 90 MB/s, a request 30 ms.
const LARGEST_STREAMED_GAP_BYTES: u64 = 2 << 20;
pub(crate) const LONGEST_STREAMED_BYTES: u64 = 12 << 20;

/// What requests should be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Every frame is a request of its own.
    Alone,
    /// Soon there, at whatever number of requests: spread over connections.
    Spread,
    /// The same, where so many stored bytes of one caller are on their way in all.
    Part(u64),
    /// Soon there, and few requests.
    Near,
    /// As few as possible.
    Long,
    /// As [`Self::Spread`], for the disk cache.
    SpreadToDisk,
    /// As [`Self::Long`], for the disk cache.
    LongToDisk,
}

impl Shape {
    /// Frames are wanted on the disk, also those that are in memory.
    pub(super) fn is_to_disk(self) -> bool {
        matches!(self, Self::SpreadToDisk | Self::LongToDisk)
    }
}

/// A read of some neighbouring frames of one object.
#[derive(Clone)]
pub(super) struct RangeRead {
    /// Never reused; flights name the read that owns them by it.
    pub(super) number: u64,
    pub(super) urgency: Urgency,
    /// By offset, not empty, of one object; from the disk cache as they lie there.
    pub(super) frames: Vec<FrameSpec>,
    /// From the disk cache, else from the store.
    pub(super) from_cache: bool,
    /// What was asked of the store before it was known which frames there are, if that has these.
    pub(super) ahead: Option<Arc<Ahead>>,
    /// How often the store was read for these frames before.
    pub(super) tries: u32,
    /// When the first try began.
    pub(super) since: Instant,
}

impl RangeRead {
    pub(super) fn object(&self) -> ObjectId {
        self.frames[0].object
    }

    /// The bytes of the object that hold all frames.
    pub(super) fn range(&self) -> Range<u64> {
        let end = self.frames.iter().map(|frame| frame.entry.end()).max();
        self.frames[0].entry.offset..end.unwrap_or_default()
    }

    /// The same read of `frames`, from the store, once more.
    pub(super) fn again(&self, frames: Vec<FrameSpec>) -> Self {
        let tries = if self.from_cache { self.tries } else { self.tries + 1 };
        Self { frames, from_cache: false, ahead: None, tries, ..self.clone() }
    }

    /// Where the bytes come from, for logs.
    pub(super) fn source(&self) -> &'static str {
        if self.from_cache { "the disk cache" } else { "the store" }
    }
}

/// Length of the requests over which so many bytes are spread.
fn spread(bytes: u64) -> u64 {
    (bytes / SPREAD).clamp(SHORTEST_BYTES, LONGEST_BYTES)
}

/// Groups frames into requests.
pub(super) fn merge(mut frames: Vec<FrameSpec>, shape: Shape) -> Vec<Vec<FrameSpec>> {
    frames.sort_by_key(FrameSpec::key);
    let total: u64 = frames.iter().map(|frame| u64::from(frame.entry.stored_bytes)).sum();
    let (gap, longest) = match shape {
        Shape::Alone => (0, 0),
        Shape::Near => {
            (LARGEST_GAP_BYTES, (total / SPREAD).clamp(SHORTEST_NEAR_BYTES, LONGEST_BYTES))
        }
        Shape::Spread | Shape::SpreadToDisk => (LARGEST_GAP_BYTES, spread(total)),
        Shape::Part(bytes) => (LARGEST_GAP_BYTES, spread(bytes)),
        Shape::Long | Shape::LongToDisk => (LARGEST_STREAMED_GAP_BYTES, LONGEST_STREAMED_BYTES),
    };
    let mut groups: Vec<Vec<FrameSpec>> = Vec::new();
    for frame in frames {
        let joins = |group: &Vec<FrameSpec>| {
            let (first, last) = (&group[0], &group[group.len() - 1]);
            first.object == frame.object
                && frame.entry.offset <= last.entry.end() + gap
                && frame.entry.end() - first.entry.offset <= longest
        };
        match groups.last_mut() {
            Some(group) if joins(group) => group.push(frame),
            _ => groups.push(vec![frame]),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapshotId;
    use crate::format::frame::{Codec, FrameEntry};
    use crate::id::Hash;

    fn frame(object: ObjectId, offset: u64, stored_bytes: u32) -> FrameSpec {
        let hash = Hash([0; 32]);
        FrameSpec {
            object,
            entry: FrameEntry { offset, stored_bytes, pages: 16, codec: Codec::Zstd, hash },
        }
    }

    #[test]
    fn neighbours_share_a_request_and_strangers_do_not() {
        let one = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let other = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let frames = vec![
            frame(one, 30_000, 10_000),
            frame(one, 20_000, 10_000),
            frame(one, 500_000, 10_000),
            frame(other, 40_000, 10_000),
        ];
        let groups = merge(frames, Shape::Spread);
        let sizes: Vec<_> = groups.iter().map(Vec::len).collect();
        assert_eq!(sizes.iter().sum::<usize>(), 4);
        assert_eq!(groups.len(), 3, "{sizes:?}");
        assert!(groups.iter().any(|group| group.len() == 2 && group[0].entry.offset == 20_000));
    }

    #[test]
    fn long_batches_make_long_requests_and_short_ones_are_spread() {
        let object = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let batch = |count: u64| {
            merge(
                (0..count).map(|number| frame(object, number * 16_384, 16_384)).collect(),
                Shape::Spread,
            )
        };
        assert_eq!(batch(8).len(), 1, "128 KiB are one request");
        assert_eq!(batch(128).len(), 16, "2 MiB are spread");
        assert_eq!(batch(8192).len(), 32, "128 MiB are requests of 4 MiB");
    }

    #[test]
    fn what_one_read_of_the_mount_wants_is_one_request() {
        let object = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let frames = (0..16).map(|number| frame(object, number * 32_768, 32_768)).collect();
        assert_eq!(merge(frames, Shape::Near).len(), 1);
    }

    #[test]
    fn streaming_makes_few_requests_across_small_gaps() {
        let object = ObjectId::WorkingSet(SnapshotId::random(), 1);
        let every_eighth = (0..1024).map(|number| frame(object, number * 131_072, 16_384));
        let groups = merge(every_eighth.collect(), Shape::Long);
        assert_eq!(groups.len(), 11, "128 MiB with gaps are requests of 12 MiB");
        let far = vec![frame(object, 0, 16_384), frame(object, 3 << 20, 16_384)];
        assert_eq!(merge(far, Shape::Long).len(), 2);
    }
}
