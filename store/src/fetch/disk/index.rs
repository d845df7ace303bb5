//! What the disk cache holds and where, what is pinned, and which segment goes next. No I/O.
//!
//! A cache holds millions of frames, so a frame's name is packed into 8 bytes and its place into 12:
//! objects are numbered, and places say which segment by its number.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::RangeInclusive;

use crate::fetch::{FrameKey, ObjectId};

/// A segment with so large a share of pinned bytes, in eighths, is left alone: to move them would free too
/// little.
const LEFT_ALONE_EIGHTHS: u64 = 7;

/// A frame's name: its object's number here, and its offset there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    object: u32,
    offset: u32,
}

/// Where a frame's stored bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Place {
    /// One past its last byte; places end within their segment, of less than 4 GiB.
    pub(super) fn end(&self) -> u32 {
        self.offset.saturating_add(self.length)
    }
}

/// What is pinned, here or not.
#[derive(Clone, Copy)]
struct Pin {
    count: u32,
    bytes: u32,
}

#[derive(Default)]
struct Segment {
    /// Of its files.
    bytes: u64,
    pinned_bytes: u64,
    used: bool,
    /// Of all frames that were written to it; some may be elsewhere by now.
    keys: Vec<Key>,
}

#[derive(Default)]
pub(super) struct Index {
    objects: Objects,
    frames: HashMap<Key, Place>,
    pins: HashMap<Key, Pin>,
    segments: BTreeMap<u32, Segment>,
    /// The next to go first.
    turns: VecDeque<u32>,
    bytes: u64,
    pinned_bytes: u64,
    promised_bytes: u64,
}

impl Index {
    /// Bytes of all segments.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of pinned frames that are here.
    pub(super) fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    /// Bytes of all pinned frames, here or not.
    pub(super) fn promised_bytes(&self) -> u64 {
        self.promised_bytes
    }

    pub(super) fn frame_count(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Whether a frame of one of these objects is here, or pinned.
    pub(super) fn has_some_of(&self, objects: RangeInclusive<ObjectId>) -> bool {
        self.objects.numbers.range(objects).next().is_some()
    }

    /// Makes room in memory for so many more frames.
    pub(super) fn reserve(&mut self, frames: usize) {
        self.frames.reserve(frames);
    }

    /// A new segment, the last to go.
    pub(super) fn add_segment(&mut self, number: u32) {
        self.segments.insert(number, Segment::default());
        self.turns.push_back(number);
    }

    /// The files of a segment have become longer.
    pub(super) fn grow(&mut self, number: u32, bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.bytes += bytes;
            self.bytes += bytes;
        }
    }

    pub(super) fn find(&self, frame: &FrameKey) -> Option<Place> {
        self.place(&self.key(frame)?).copied()
    }

    /// The same, for reading: its segment counts as used.
    pub(super) fn find_to_read(&mut self, frame: &FrameKey) -> Option<Place> {
        let place = self.find(frame)?;
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.used = true;
        }
        Some(place)
    }

    /// A frame is there; whether its name can be kept: it must lie in the first 4 GiB of its object.
    pub(super) fn insert(&mut self, frame: &FrameKey, place: Place) -> bool {
        let Ok(offset) = u32::try_from(frame.1) else { return false };
        self.remove(frame);
        let Some(segment) = self.segments.get_mut(&place.segment) else { return false };
        let key = Key { object: self.objects.use_one(&frame.0), offset };
        segment.keys.push(key);
        if self.pins.contains_key(&key) {
            segment.pinned_bytes += u64::from(place.length);
            self.pinned_bytes += u64::from(place.length);
        }
        self.frames.insert(key, place);
        true
    }

    /// Forgets a frame. A pin of it stays, for when it comes again.
    pub(super) fn remove(&mut self, frame: &FrameKey) {
        let Some(key) = self.key(frame) else { return };
        let here = self.place(&key).copied();
        if let Some(place) = here
            && self.pins.contains_key(&key)
        {
            self.count_pinned(place, false);
        }
        if self.frames.remove(&key).is_some() {
            self.objects.let_go(key.object);
        }
    }

    /// Pins frames with their stored bytes: whatever of them is here or comes later is not evicted.
    /// Answers with their names for [`Index::unpin`], or with the bytes that all pins would come to where
    /// that is over `limit`; then nothing was pinned.
    pub(super) fn pin(
        &mut self,
        frames: impl IntoIterator<Item = (FrameKey, u32)>,
        limit: u64,
    ) -> Result<Vec<Key>, u64> {
        let mut keys = Vec::new();
        for (frame, bytes) in frames {
            let Ok(offset) = u32::try_from(frame.1) else { continue };
            let key = Key { object: self.objects.use_one(&frame.0), offset };
            keys.push(key);
            let pin = self.pins.entry(key).or_insert(Pin { count: 0, bytes });
            pin.count += 1;
            if pin.count == 1 {
                self.promised_bytes += u64::from(bytes);
                if let Some(place) = self.place(&key).copied() {
                    self.count_pinned(place, true);
                }
            }
        }
        match self.promised_bytes {
            over if over > limit => {
                self.unpin(&keys);
                Err(over)
            }
            _ => Ok(keys),
        }
    }

    /// Ends what [`Index::pin`] began.
    pub(super) fn unpin(&mut self, keys: &[Key]) {
        for key in keys {
            let Some(pin) = self.pins.get_mut(key) else { continue };
            pin.count -= 1;
            if pin.count == 0 {
                self.promised_bytes -= u64::from(pin.bytes);
                self.pins.remove(key);
                if let Some(place) = self.place(key).copied() {
                    self.count_pinned(place, false);
                }
            }
            self.objects.let_go(key.object);
        }
    }

    /// The segment to evict next: the oldest that was not used since it was last looked at and is not
    /// nearly all pinned; never the one that is `open` for writing.
    pub(super) fn victim(&mut self, open: Option<u32>) -> Option<u32> {
        let round = self.turns.len();
        for turn in 0..2 * round {
            let number = *self.turns.front()?;
            let Some(segment) = self.segments.get_mut(&number) else {
                self.turns.pop_front();
                continue;
            };
            let another_turn = std::mem::take(&mut segment.used) && turn < round;
            let pinned = segment.pinned_bytes * 8 > segment.bytes * LEFT_ALONE_EIGHTHS;
            if Some(number) != open && !another_turn && !pinned {
                return Some(number);
            }
            self.turns.rotate_left(1);
        }
        None
    }

    /// The pinned frames of a segment; they must move before it can go.
    pub(super) fn pinned_in(&self, number: u32) -> Vec<(FrameKey, Place)> {
        let segment = self.segments.get(&number).filter(|segment| segment.pinned_bytes > 0);
        let keys = segment.map_or(&[][..], |segment| &segment.keys);
        let pinned = keys.iter().filter(|key| self.pins.contains_key(key)).filter_map(|key| {
            let place = self.place(key).filter(|place| place.segment == number)?;
            Some(((self.objects.id(key.object)?, u64::from(key.offset)), *place))
        });
        pinned.collect()
    }

    /// Takes a segment off: none of its frames is found any more. Answers with what [`Index::forget`]
    /// needs; `None` where something in it is pinned.
    pub(super) fn take(&mut self, number: u32) -> Option<Vec<Key>> {
        if self.segments.get(&number)?.pinned_bytes > 0 {
            return None;
        }
        let segment = self.segments.remove(&number)?;
        self.turns.retain(|other| *other != number);
        self.bytes -= segment.bytes;
        Some(segment.keys)
    }

    /// Frees the memory of frames whose segment was taken off.
    pub(super) fn forget(&mut self, keys: &[Key], number: u32) {
        for key in keys {
            if self.frames.get(key).is_some_and(|place| place.segment == number) {
                self.frames.remove(key);
                self.objects.let_go(key.object);
            }
        }
    }

    fn key(&self, frame: &FrameKey) -> Option<Key> {
        let offset = u32::try_from(frame.1).ok()?;
        Some(Key { object: self.objects.number(&frame.0)?, offset })
    }

    fn place(&self, key: &Key) -> Option<&Place> {
        self.frames.get(key).filter(|place| self.segments.contains_key(&place.segment))
    }

    fn count_pinned(&mut self, place: Place, more: bool) {
        let bytes = u64::from(place.length);
        let Some(segment) = self.segments.get_mut(&place.segment) else { return };
        for count in [&mut segment.pinned_bytes, &mut self.pinned_bytes] {
            *count = if more { *count + bytes } else { *count - bytes };
        }
    }
}

/// Objects by small numbers, which are used again when nothing refers to them.
#[derive(Default)]
struct Objects {
    numbers: BTreeMap<ObjectId, u32>,
    slots: Vec<(ObjectId, u32)>,
    free: Vec<u32>,
    /// Frames come object after object.
    last: Option<(ObjectId, u32)>,
}

impl Objects {
    fn number(&self, id: &ObjectId) -> Option<u32> {
        self.numbers.get(id).copied()
    }

    fn id(&self, number: u32) -> Option<ObjectId> {
        self.slots.get(number as usize).map(|(id, _)| *id)
    }

    /// The object's number, with one more use of it.
    fn use_one(&mut self, id: &ObjectId) -> u32 {
        let number = match self.last {
            Some((last, number)) if last == *id => number,
            _ => self.number_or_new(id),
        };
        self.last = Some((*id, number));
        self.slots[number as usize].1 += 1;
        number
    }

    fn number_or_new(&mut self, id: &ObjectId) -> u32 {
        if let Some(number) = self.number(id) {
            return number;
        }
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = (*id, 0);
                number
            }
            None => {
                self.slots.push((*id, 0));
                // Fewer than there are frames, of which memory holds no 2^32.
                u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 objects")
            }
        };
        self.numbers.insert(*id, number);
        number
    }

    fn let_go(&mut self, number: u32) {
        let slot = &mut self.slots[number as usize];
        slot.1 -= 1;
        if slot.1 == 0 {
            self.numbers.remove(&slot.0);
            self.free.push(number);
            self.last = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapshotId;

    fn object(number: u8) -> ObjectId {
        ObjectId::WorkingSet(SnapshotId::from_bytes([number; 16]), 1)
    }

    /// Segments 0, 1, ... of ten frames of 10 bytes; frame `n` is in segment `n / 10`.
    fn filled(segments: u32) -> Index {
        let mut index = Index::default();
        for segment in 0..segments {
            index.add_segment(segment);
            index.grow(segment, 100);
            for frame in 0..10 {
                let place = Place { segment, offset: frame * 10, length: 10 };
                assert!(index.insert(&frame_key(segment * 10 + frame), place));
            }
        }
        index
    }

    fn frame_key(number: u32) -> FrameKey {
        (object((number / 10) as u8), u64::from(number))
    }

    fn evict(index: &mut Index, number: u32) {
        let keys = index.take(number).expect("nothing is pinned");
        index.forget(&keys, number);
    }

    #[test]
    fn the_oldest_unused_segment_goes_and_the_open_one_never() {
        let mut index = filled(3);
        assert_eq!(index.victim(Some(2)), Some(0));
        index.find_to_read(&frame_key(3)).expect("is there");
        assert_eq!(index.victim(Some(2)), Some(1), "0 was used and gets another turn");
        evict(&mut index, 1);
        assert_eq!(index.find(&frame_key(15)), None);
        assert_eq!((index.bytes(), index.frame_count(), index.segment_count()), (200, 20, 2));
        assert_eq!(index.victim(Some(2)), Some(0), "but not for ever");
        evict(&mut index, 0);
        assert_eq!(index.victim(Some(2)), None);
        assert_eq!(index.victim(None), Some(2));
    }

    #[test]
    fn pinned_frames_keep_their_segment_until_they_are_elsewhere() {
        let mut index = filled(2);
        let pinned = [(frame_key(3), 10), (frame_key(77), 10)];
        let keys = index.pin(pinned, 100).expect("within the limit");
        assert_eq!((index.pinned_bytes(), index.promised_bytes()), (10, 20));
        assert_eq!(index.victim(Some(1)), Some(0));
        assert!(index.take(0).is_none(), "it holds a pinned frame");
        let found = index.pinned_in(0);
        assert_eq!(found, vec![(frame_key(3), Place { segment: 0, offset: 30, length: 10 })]);
        let moved = Place { segment: 1, offset: 100, length: 10 };
        assert!(index.insert(&frame_key(3), moved));
        evict(&mut index, 0);
        assert_eq!(index.find(&frame_key(3)), Some(moved));
        assert_eq!(index.pinned_bytes(), 10);
        assert!(index.insert(&frame_key(77), Place { segment: 1, offset: 110, length: 10 }));
        assert_eq!(index.pinned_bytes(), 20, "it was pinned before it came");
        index.unpin(&keys);
        assert_eq!((index.pinned_bytes(), index.promised_bytes()), (0, 0));
        evict(&mut index, 1);
        assert_eq!(index.frame_count(), 0);
        assert!(index.objects.numbers.is_empty(), "nothing refers to an object");
    }

    #[test]
    fn a_segment_that_is_nearly_all_pinned_is_passed_over() {
        let mut index = filled(3);
        let all = (0..9).map(|number| (frame_key(number), 10));
        let keys = index.pin(all, 1000).expect("within the limit");
        assert_eq!(index.victim(Some(2)), Some(1));
        evict(&mut index, 1);
        assert_eq!(index.victim(Some(2)), None);
        index.unpin(&keys);
        assert_eq!(index.victim(Some(2)), Some(0));
    }

    #[test]
    fn pins_over_the_limit_are_refused_whole() {
        let mut index = filled(1);
        let first = index.pin([(frame_key(0), 10)], 50).expect("within the limit");
        let many = (0..6).map(|number| (frame_key(number), 10));
        assert_eq!(index.pin(many, 50), Err(60), "a frame that is pinned twice counts once");
        assert_eq!((index.pinned_bytes(), index.promised_bytes()), (10, 10));
        index.unpin(&first);
        assert_eq!(index.pinned_bytes(), 0);
    }

    #[test]
    fn a_frame_beyond_four_gib_of_its_object_is_not_kept() {
        let mut index = filled(1);
        let far = (object(0), 1 << 32);
        assert!(!index.insert(&far, Place { segment: 0, offset: 0, length: 10 }));
        assert_eq!(index.find(&far), None);
    }
}
