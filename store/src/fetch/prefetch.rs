//! Prefetching within the [`Budget`]: every caller's frames are a stream, which is asked for in slices as
//! the budget has room. Demand does not come through here.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::budget::{Budget, cost};
use super::ranges::Shape;
use super::{Done, Fetcher, FrameSpec};
use crate::Urgency;

/// What is prefetched on a node, against its bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PrefetchStatus {
    /// Most bytes in flight: stored bytes asked for, and decoded ones that are not installed yet.
    pub limit_bytes: u64,
    /// In flight now.
    pub in_flight_bytes: u64,
    /// The most that ever was in flight.
    pub highest_bytes: u64,
    /// Restores and others that wait for room.
    pub waiting: usize,
}

/// All streams that have frames to ask for.
pub(super) struct Prefetches {
    budget: Budget,
    streams: Vec<Stream>,
    next: u64,
}

/// What one caller wants.
struct Stream {
    /// Never reused.
    number: u64,
    /// Each with the tag that it is asked under.
    frames: Vec<(FrameSpec, usize)>,
    asked: usize,
    /// Bytes in flight.
    held: u64,
    shape: Shape,
    done: Done,
}

/// Frames of a stream that are asked for together.
struct Slice {
    stream: u64,
    frames: Vec<(FrameSpec, usize)>,
    /// Stored bytes of them all.
    stored: u64,
    shape: Shape,
    done: Done,
}

impl Prefetches {
    pub(super) fn new(limit: u64) -> Self {
        Self { budget: Budget::new(limit), streams: Vec::new(), next: 0 }
    }

    /// What may be asked for now. Who has least in flight is first, and among equals who came first.
    fn slices(&mut self) -> Vec<Slice> {
        let mut slices = Vec::new();
        self.streams.sort_by_key(|stream| stream.held);
        for stream in &mut self.streams {
            let rest = &stream.frames[stream.asked..];
            let costs = rest.iter().map(|(spec, _)| cost(&spec.entry));
            let count = self.budget.grant(stream.held, costs);
            if count == 0 {
                continue;
            }
            let frames = rest[..count].to_vec();
            let stored: u64 =
                frames.iter().map(|(spec, _)| u64::from(spec.entry.stored_bytes)).sum();
            let bytes: u64 = frames.iter().map(|(spec, _)| cost(&spec.entry)).sum();
            self.budget.take(bytes);
            stream.asked += count;
            stream.held += bytes;
            let shape = match stream.shape {
                // As long as if all that is in flight had been asked for at once.
                Shape::Spread => Shape::Part(stored.saturating_mul(stream.held) / bytes.max(1)),
                shape => shape,
            };
            let (stream, done) = (stream.number, stream.done.clone());
            slices.push(Slice { stream, frames, stored, shape, done });
        }
        self.streams.retain(|stream| stream.asked < stream.frames.len());
        slices
    }

    fn give_back(&mut self, stream: u64, bytes: u64) {
        self.budget.give_back(bytes);
        if let Some(stream) = self.streams.iter_mut().find(|other| other.number == stream) {
            stream.held = stream.held.saturating_sub(bytes);
        }
    }
}

impl Fetcher {
    /// Asks for frames in their order, within the budget; `done` is called on decode threads alone.
    pub(super) fn prefetch(&self, frames: Vec<(FrameSpec, usize)>, shape: Shape, done: &Done) {
        if frames.is_empty() {
            return;
        }
        let mut prefetches = self.0.prefetches.lock();
        prefetches.next += 1;
        let (number, done) = (prefetches.next, done.clone());
        prefetches.streams.push(Stream { number, frames, asked: 0, held: 0, shape, done });
        drop(prefetches);
        self.ask_for_more();
    }

    pub(crate) fn prefetch_status(&self) -> PrefetchStatus {
        let prefetches = self.0.prefetches.lock();
        PrefetchStatus {
            limit_bytes: prefetches.budget.limit(),
            in_flight_bytes: prefetches.budget.in_flight(),
            highest_bytes: prefetches.budget.highest(),
            waiting: prefetches.streams.len(),
        }
    }

    fn ask_for_more(&self) {
        // Bound first: asking is done without the lock.
        let slices = self.0.prefetches.lock().slices();
        for slice in slices {
            self.ask(slice);
        }
    }

    fn ask(&self, slice: Slice) {
        let Slice { stream, frames, stored, shape, done } = slice;
        let left = AtomicUsize::new(frames.len());
        let frames = Arc::new(frames);
        let (fetcher, of_slice) = (self.clone(), frames.clone());
        let counted: Done = Arc::new(move |number, frame| {
            let (spec, tag) = of_slice[number];
            // Frames that came in one request share its memory, which is free with the last of them: their
            // stored bytes are given back together.
            let last = left.fetch_sub(1, Ordering::AcqRel) == 1;
            let bytes = spec.entry.decoded_bytes() as u64 + if last { stored } else { 0 };
            let _given_back = GivenBack { fetcher: &fetcher, stream, bytes };
            done(tag, frame);
        });
        let wanted = frames.iter().enumerate().map(|(number, (spec, _))| (*spec, number));
        self.fetch_shaped(wanted, Urgency::Prefetch, shape, None, &counted);
    }
}

/// Gives bytes back once whoever asked for a frame has had it, also if that panicked.
struct GivenBack<'a> {
    fetcher: &'a Fetcher,
    stream: u64,
    bytes: u64,
}

impl Drop for GivenBack<'_> {
    fn drop(&mut self) {
        self.fetcher.0.prefetches.lock().give_back(self.stream, self.bytes);
        self.fetcher.ask_for_more();
    }
}
