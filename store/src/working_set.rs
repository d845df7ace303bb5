//! Working sets: recorded, packed in first-touch order, bound to one snapshot.

use std::sync::Arc;

use bytes::Bytes;

use crate::fetch::{FrameSpec, ObjectId};
use crate::format::frame;
use crate::format::record::now_unix_ms;
use crate::format::working_set::{Header, WorkingSetFrame, encode};
use crate::{Error, Frame, FrameIndex, PAGE_SIZE, Snapshot, Source, Urgency};

/// Pages of one frame: 256 KiB decoded. Long enough that one frame is one good request and
/// compresses well, short enough that the decode threads share a set of a few MiB.
const FRAME_PAGES: usize = 64;
/// Most pages of a set: 1 GiB. What was touched later is served on demand.
const MAX_PAGES: usize = 1 << 18;
/// Recorded once and decoded at every start: a higher level than packs use costs nothing that
/// matters, makes fewer bytes, and decodes faster.
const LEVEL: i32 = 9;

/// A first touch of a page, as a recording saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Number of the file in [`Snapshot::files`].
    pub file: u32,
    /// Page of that file.
    pub page: u64,
    /// Microseconds since the restore began.
    pub at_us: u64,
}

/// A run of consecutive recorded pages of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSetRun {
    /// Number of the file in [`Snapshot::files`].
    pub file: u32,
    /// First page of that file.
    pub first_page: u64,
    /// How many pages.
    pub pages: u32,
    /// When the first of them was touched in the recording, microseconds.
    pub first_touch_us: u32,
}

/// An opened working set.
pub struct WorkingSet {
    snapshot: Arc<Snapshot>,
    sequence: u64,
    stored_bytes: u64,
    header: Header,
    /// For each frame, where its runs begin in the header.
    first_run: Vec<usize>,
}

impl WorkingSet {
    /// `header` must belong to `snapshot`.
    pub(crate) fn new(
        snapshot: Arc<Snapshot>,
        sequence: u64,
        stored_bytes: u64,
        header: Header,
    ) -> Self {
        let mut next = 0;
        let mut first_run = Vec::with_capacity(header.frames.len());
        for frame in &header.frames {
            first_run.push(next);
            next += frame.run_count as usize;
        }
        Self { snapshot, sequence, stored_bytes, header, first_run }
    }

    /// Its sequence number in the store.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Bytes of its object in the store.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// When it was recorded, milliseconds since 1970.
    pub fn created_unix_ms(&self) -> u64 {
        self.header.created_unix_ms
    }

    /// How many frames it has.
    pub fn frame_count(&self) -> usize {
        self.header.frames.len()
    }

    /// The runs whose pages frame number `frame` holds, one after the other.
    pub fn runs(&self, frame: usize) -> &[WorkingSetRun] {
        let count = self.header.frames[frame].run_count as usize;
        &self.header.runs[self.first_run[frame]..][..count]
    }

    /// Recorded pages that are zero in the snapshot; they have no bytes.
    pub fn zero_runs(&self) -> &[WorkingSetRun] {
        &self.header.zero_runs
    }

    /// Pages with bytes, in all frames.
    pub fn data_pages(&self) -> u64 {
        self.header.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// Recorded zero pages.
    pub fn zero_pages(&self) -> u64 {
        self.header.zero_runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// The snapshot it belongs to.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// What the fetch path needs of each frame.
    pub(crate) fn specs(&self) -> impl Iterator<Item = FrameSpec> {
        let object = ObjectId::WorkingSet(self.snapshot.id(), self.sequence);
        self.header.frames.iter().map(move |frame| FrameSpec { object, entry: frame.entry })
    }

    /// Streams all frames, first touch first, in bounded memory: `done` is called once for each
    /// frame number on a decode thread (or at once, where it is in memory). An error for a frame
    /// costs speed only: its pages are served on demand.
    pub fn fetch(
        self: &Arc<Self>,
        urgency: Urgency,
        done: impl Fn(usize, Result<Frame, Error>) + Send + Sync + 'static,
    ) {
        let wanted = self.specs().enumerate().map(|(number, spec)| (spec, number));
        self.snapshot.fetcher().fetch(wanted, urgency, &(Arc::new(done) as _));
    }
}

/// What a recording becomes: which pages go into which frame.
struct Plan {
    /// Data pages of each frame, by file and page.
    frames: Vec<Vec<Touch>>,
    zeros: Vec<Touch>,
}

/// The chunks of a working-set object for `touches`, which are in order of time.
///
/// The frames are in first-touch order; inside a frame, pages are in the order of the file, so
/// that they install as few long runs.
pub(crate) async fn build(
    snapshot: &Arc<Snapshot>,
    touches: &[Touch],
) -> Result<Vec<Bytes>, Error> {
    let plan = plan(snapshot, touches);
    let mut offset = 0;
    let (mut frames, mut runs, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
    for pages in plan.frames {
        let frame_runs = runs_of(&pages);
        let bytes = page_bytes(snapshot, &pages).await?;
        let encoded = tokio::task::spawn_blocking(move || frame::encode(&bytes, LEVEL)).await;
        let local = |error: &dyn std::fmt::Display| Error::local("packing a working set", error);
        let (entry, stored) =
            encoded.map_err(|error| local(&error))?.map_err(|error| local(&error))?;
        let entry = frame::FrameEntry { offset, ..entry };
        offset = entry.end();
        let run_count = u32::try_from(frame_runs.len()).unwrap_or(u32::MAX);
        frames.push(WorkingSetFrame { entry, run_count });
        runs.extend(frame_runs);
        chunks.push(stored);
    }
    let header = Header {
        snapshot: snapshot.id(),
        manifest_hash: snapshot.manifest_hash(),
        created_unix_ms: now_unix_ms(),
        frames,
        runs,
        zero_runs: runs_of(&plan.zeros),
    };
    chunks.insert(0, encode(&header).into());
    Ok(chunks)
}

fn plan(snapshot: &Snapshot, touches: &[Touch]) -> Plan {
    let mut seen = std::collections::HashSet::new();
    let (mut data, mut zeros) = (Vec::new(), Vec::new());
    for touch in touches {
        if data.len() == MAX_PAGES || !seen.insert((touch.file, touch.page)) {
            continue;
        }
        match snapshot.extent(touch.file as usize, touch.page).map(|extent| extent.source) {
            Some(Source::Frame { .. }) => data.push(*touch),
            Some(Source::Zero) => zeros.push(*touch),
            None => {}
        }
    }
    let by_page = |touch: &Touch| (touch.file, touch.page);
    zeros.sort_unstable_by_key(by_page);
    let frames = data.chunks(FRAME_PAGES).map(|chunk| {
        let mut chunk = chunk.to_vec();
        chunk.sort_unstable_by_key(by_page);
        chunk
    });
    Plan { frames: frames.collect(), zeros }
}

fn runs_of(pages: &[Touch]) -> Vec<WorkingSetRun> {
    let mut runs: Vec<WorkingSetRun> = Vec::new();
    for touch in pages {
        let touched_us = u32::try_from(touch.at_us).unwrap_or(u32::MAX);
        match runs.last_mut() {
            Some(run)
                if run.file == touch.file
                    && run.first_page + u64::from(run.pages) == touch.page =>
            {
                run.pages += 1;
                run.first_touch_us = run.first_touch_us.min(touched_us);
            }
            _ => runs.push(WorkingSetRun {
                file: touch.file,
                first_page: touch.page,
                pages: 1,
                first_touch_us: touched_us,
            }),
        }
    }
    runs
}

/// The bytes of some pages that have bytes, one after the other.
async fn page_bytes(snapshot: &Arc<Snapshot>, pages: &[Touch]) -> Result<Vec<u8>, Error> {
    let places: Vec<(FrameIndex, u32)> = pages
        .iter()
        .filter_map(|touch| match snapshot.extent(touch.file as usize, touch.page)?.source {
            Source::Frame { frame, position } => Some((frame, position)),
            Source::Zero => None,
        })
        .collect();
    let wanted: Vec<_> = places.iter().map(|(frame, _)| *frame).collect();
    let frames = fetch_all(snapshot, &wanted).await?;
    let mut bytes = Vec::with_capacity(places.len() * PAGE_SIZE);
    for (frame, position) in places {
        bytes.extend_from_slice(frames[&frame].pages(position, 1));
    }
    Ok(bytes)
}

/// All of `wanted`, at the lower urgency.
pub(crate) async fn fetch_all(
    snapshot: &Arc<Snapshot>,
    wanted: &[FrameIndex],
) -> Result<std::collections::HashMap<FrameIndex, Frame>, Error> {
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    snapshot.fetch(wanted, Urgency::Prefetch, move |index, frame| {
        // A receiver that is gone has had its error.
        sender.send((index, frame)).unwrap_or_default();
    });
    let mut frames = std::collections::HashMap::new();
    while let Some((index, frame)) = receiver.recv().await {
        frames.insert(index, frame?);
    }
    Ok(frames)
}
