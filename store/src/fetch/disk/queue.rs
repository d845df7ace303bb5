//! Frames on their way into the disk cache, bounded in bytes. Who brings them never waits.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::fetch::FrameKey;

pub(super) struct Queue {
    limit: u64,
    state: Mutex<State>,
    /// Something was pushed, or nothing will be any more.
    pushed: Condvar,
    written: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<(FrameKey, Bytes)>,
    /// What waits and what is being written.
    keys: HashSet<FrameKey>,
    /// Of what waits and what is being written.
    bytes: u64,
    /// How many frames were ever pushed, taken, and written or given up.
    pushed: u64,
    taken: u64,
    written: u64,
    closed: bool,
}

impl Queue {
    pub(super) fn new(limit: u64) -> Self {
        let (pushed, written) = (Condvar::new(), Condvar::new());
        Self { limit, state: Mutex::default(), pushed, written }
    }

    /// Whether the frame was taken: not where the writer is behind.
    pub(super) fn push(&self, key: FrameKey, stored: Bytes) -> bool {
        let mut state = self.state.lock();
        let bytes = state.bytes + stored.len() as u64;
        if state.closed || bytes > self.limit {
            return false;
        }
        state.bytes = bytes;
        state.pushed += 1;
        state.keys.insert(key);
        state.waiting.push((key, stored));
        drop(state);
        self.pushed.notify_one();
        true
    }

    /// Whether a frame waits or is being written.
    pub(super) fn holds(&self, key: &FrameKey) -> bool {
        self.state.lock().keys.contains(key)
    }

    /// For the writer: all that waits, perhaps nothing after `patience`. `None` ends it.
    pub(super) fn take(&self, patience: Duration) -> Option<Vec<(FrameKey, Bytes)>> {
        let mut state = self.state.lock();
        if state.waiting.is_empty() && !state.closed {
            self.pushed.wait_for(&mut state, patience);
        }
        if state.waiting.is_empty() && state.closed {
            return None;
        }
        state.taken = state.pushed;
        Some(std::mem::take(&mut state.waiting))
    }

    /// For the writer: what it took is written, or will not be.
    pub(super) fn done(&self) {
        let mut state = self.state.lock();
        state.written = state.taken;
        state.bytes = state.waiting.iter().map(|(_, stored)| stored.len() as u64).sum();
        state.keys = state.waiting.iter().map(|(key, _)| *key).collect();
        drop(state);
        self.written.notify_all();
    }

    /// Waits until all that was pushed before is written, or given up.
    pub(super) fn wait(&self) {
        let mut state = self.state.lock();
        let wanted = state.pushed;
        while state.written < wanted {
            self.written.wait(&mut state);
        }
    }

    /// Nothing is taken in any more; the writer ends after what it has.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.pushed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapshotId;
    use crate::fetch::ObjectId;

    #[test]
    fn bytes_are_bounded_also_while_they_are_written() {
        let queue = Queue::new(100);
        let push = |bytes| {
            let key = (ObjectId::WorkingSet(SnapshotId::from_bytes([7; 16]), 3), 0);
            queue.push(key, Bytes::from(vec![0; bytes]))
        };
        assert!(push(60) && push(40));
        assert!(!push(1), "the queue is full");
        assert_eq!(queue.take(Duration::ZERO).expect("open").len(), 2);
        assert!(!push(1), "nothing is written yet");
        queue.done();
        queue.wait();
        assert!(push(100));
        queue.close();
        assert!(!push(0), "closed");
        assert_eq!(queue.take(Duration::ZERO).expect("one is left").len(), 1);
        assert!(queue.take(Duration::ZERO).is_none());
    }
}
