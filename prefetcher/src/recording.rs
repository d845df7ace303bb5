//! A recording: the first touches of a restore, in order, until no more come.

use std::time::{Duration, Instant};

use reap_store::Touch;

use crate::page_state::Bitmap;

/// Called once with what was recorded.
pub type OnRecorded = Box<dyn FnOnce(Vec<Touch>) + Send>;

/// A recording under way.
pub(crate) struct Recording {
    file: u32,
    began: Instant,
    touches: Vec<Touch>,
    seen: Bitmap,
    last: Option<Instant>,
    done: OnRecorded,
}

impl Recording {
    /// Of file number `file` of the snapshot, with `pages` pages.
    pub(crate) fn new(file: u32, pages: u64, began: Instant, done: OnRecorded) -> Self {
        Self { file, began, touches: Vec::new(), seen: Bitmap::new(pages), last: None, done }
    }

    /// Notes a touch of some pages; how many are new.
    pub(crate) fn touch(&mut self, first_page: u64, count: u64) -> u64 {
        let at_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.touches.len();
        for page in first_page..first_page + count {
            if self.seen.set(page) {
                self.touches.push(Touch { file: self.file, page, at_us });
            }
        }
        self.last = Some(Instant::now());
        (self.touches.len() - before) as u64
    }

    /// Whether nothing new was touched for so long, after something was.
    pub(crate) fn has_settled(&self, after: Duration) -> bool {
        self.last.is_some_and(|last| last.elapsed() >= after)
    }

    /// Hands over what was recorded; an empty recording is nothing.
    pub(crate) fn finish(self) {
        if !self.touches.is_empty() {
            (self.done)(self.touches);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_recorded_once_in_order() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let done = Box::new(move |touches| sender.send(touches).expect("receiver"));
        let mut recording = Recording::new(2, 100, Instant::now(), done);
        assert!(!recording.has_settled(Duration::ZERO), "nothing was touched yet");
        assert_eq!(recording.touch(7, 1), 1);
        assert_eq!(recording.touch(3, 2), 2);
        assert_eq!(recording.touch(7, 1), 0);
        assert!(recording.has_settled(Duration::ZERO));
        assert!(!recording.has_settled(Duration::from_secs(60)));
        recording.finish();
        let pages: Vec<_> = receiver
            .recv()
            .expect("recorded")
            .iter()
            .map(|touch| (touch.file, touch.page))
            .collect();
        assert_eq!(pages, vec![(2, 7), (2, 3), (2, 4)]);
    }
}
