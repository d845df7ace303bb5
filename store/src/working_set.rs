//! Working sets: recorded, packed in first-touch order, bound to one snapshot.

pub mod learning;
mod neighbours;
pub mod schedule;

use std::sync::Arc;

use bytes::Bytes;

use crate::fetch::{Done, FrameSpec, ObjectId};
use crate::format::frame;
use crate::format::record::now_unix_ms;
use crate::format::working_set::{Header, WorkingSetFrame, encode};
use crate::{Error, Frame, FrameIndex, PAGE_SIZE, Profile, Snapshot, Source, Urgency};

/// Pages of one frame: 256 KiB decoded. Long enough that it compresses well, short enough that the
/// decode threads share a set of a few MiB.
const FRAME_PAGES: usize = 64;
/// Pages of the first frame, so that the first pages are there soon.
const FIRST_FRAME_PAGES: usize = 16;
/// The set is cut by first touch into parts, each so many times as long as the one before; inside a part
/// pages are in the order of the file. That keeps what is touched early in front, and nearly as few
/// runs as the order of the file alone would give: an install costs as much as copying two pages.
const PART_GROWTH: usize = 4;
/// Neighbours that were touched further apart are runs of their own, so that a set can be shown, exported and
/// learned from in its order. Installing does not care.
const SAME_TOUCH_US: u32 = 1000;
/// Most pages of a set: 1 GiB. What was touched later is served on demand.
const MAX_PAGES: usize = 1 << 18;

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

/// Weight of a page that every restore touches; what is touched less often weighs less, and a page that no restore was
/// seen to touch, taken because most around it were, weighs nothing.
pub const WEIGHT_ONE: u16 = 256;

/// A page that a working set is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedPage {
    /// Number of the file in [`Snapshot::files`].
    pub file: u32,
    /// Page of that file.
    pub page: u64,
    /// Microseconds from the start of a restore to the first touch.
    pub first_touch_us: u32,
    /// How often restores touch it, as a fixed-point number: [`WEIGHT_ONE`] is always.
    pub weight: u16,
}

/// What a working set is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSetContent {
    /// What use of the snapshot it is for.
    pub profile: Profile,
    /// How many restores it was learned from.
    pub restores: u32,
    /// In any order: they are packed by first touch, and the first of equal ones counts.
    pub pages: Vec<RecordedPage>,
}

impl WorkingSetContent {
    /// What one recording saw, for the usual profile.
    pub fn of_recording(touches: &[Touch]) -> Self {
        let page = |touch: &Touch| RecordedPage {
            file: touch.file,
            page: touch.page,
            first_touch_us: u32::try_from(touch.at_us).unwrap_or(u32::MAX),
            weight: WEIGHT_ONE,
        };
        Self { profile: Profile::default(), restores: 1, pages: touches.iter().map(page).collect() }
    }
}

/// A run of consecutive recorded pages of one file, of one weight, touched at about the same time.
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
    /// Of each of its pages: see [`RecordedPage::weight`].
    pub weight: u16,
}

impl WorkingSetRun {
    /// Whether a restore was seen to touch its pages; others are there because most around them were.
    #[must_use]
    pub fn was_touched(&self) -> bool {
        self.weight > 0
    }
}

/// An opened working set.
pub struct WorkingSet {
    snapshot: Arc<Snapshot>,
    sequence: u64,
    stored_bytes: u64,
    header: Header,
    /// For each frame, where its runs begin in the header.
    first_run: Vec<usize>,
    /// Where each run lies, by file and page.
    places: Vec<Place>,
}

/// A run, and where its first page is.
#[derive(Clone, Copy)]
struct Place {
    file: u32,
    first_page: u64,
    pages: u32,
    frame: usize,
    position: u32,
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
        let mut places = Vec::with_capacity(header.runs.len());
        for (number, frame) in header.frames.iter().enumerate() {
            let runs = &header.runs[next..][..frame.run_count as usize];
            let mut position = 0;
            for &WorkingSetRun { file, first_page, pages, .. } in runs {
                places.push(Place { file, first_page, pages, frame: number, position });
                position += pages;
            }
            first_run.push(next);
            next += runs.len();
        }
        places.sort_unstable_by_key(|place| (place.file, place.first_page));
        Self { snapshot, sequence, stored_bytes, header, first_run, places }
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

    /// What use of the snapshot it is for.
    pub fn profile(&self) -> &Profile {
        &self.header.profile
    }

    /// How many restores it was learned from.
    pub fn restores(&self) -> u32 {
        self.header.restores
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

    /// All runs with bytes, in the order of their frames.
    pub fn data_runs(&self) -> &[WorkingSetRun] {
        &self.header.runs
    }

    /// All runs, those without bytes last.
    pub fn all_runs(&self) -> impl Iterator<Item = &WorkingSetRun> {
        self.data_runs().iter().chain(self.zero_runs())
    }

    /// Recorded pages that are zero in the snapshot; they have no bytes.
    pub fn zero_runs(&self) -> &[WorkingSetRun] {
        &self.header.zero_runs
    }

    /// The frame that holds a page, and the page's position in it. Pure lookup.
    pub fn place(&self, file: usize, page: u64) -> Option<(usize, u32)> {
        let key = (u32::try_from(file).ok()?, page);
        let after = self.places.partition_point(|place| (place.file, place.first_page) <= key);
        let place = self.places[..after].last().filter(|place| place.file == key.0)?;
        let skipped = u32::try_from(page - place.first_page).ok()?;
        (skipped < place.pages).then_some((place.frame, place.position + skipped))
    }

    /// Pages with bytes, in all frames.
    pub fn data_pages(&self) -> u64 {
        self.data_runs().iter().map(|run| u64::from(run.pages)).sum()
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
        (0..self.frame_count()).map(|number| self.spec(number))
    }

    /// Streams all frames, first touch first, within the node's budget ([`crate::NodeConfig::prefetch_bytes`]):
    /// `done` is called once for each frame number on a decode thread. An error for a frame costs speed
    /// only: its pages are served on demand.
    pub fn fetch(
        self: &Arc<Self>,
        urgency: Urgency,
        done: impl Fn(usize, Result<Frame, Error>) + Send + Sync + 'static,
    ) {
        let wanted = self.specs().enumerate().map(|(number, spec)| (spec, number));
        self.snapshot.fetcher().fetch_working_set(wanted, urgency, &(Arc::new(done) as _));
    }

    /// A frame, if it is decoded in memory now. Never waits.
    pub fn cached(&self, frame: usize) -> Option<Frame> {
        self.snapshot.fetcher().cached(&self.spec(frame).key())
    }

    /// Brings one frame: joins and promotes its flight if it is on its way. `done` is called as in
    /// [`Self::fetch`].
    pub fn fetch_one(
        &self,
        frame: usize,
        urgency: Urgency,
        done: impl Fn(Result<Frame, Error>) + Send + Sync + 'static,
    ) {
        let wanted = std::iter::once((self.spec(frame), frame));
        let done: Done = Arc::new(move |_, frame| done(frame));
        self.snapshot.fetcher().fetch(wanted, urgency, &done);
    }

    fn spec(&self, frame: usize) -> FrameSpec {
        let object = ObjectId::WorkingSet(self.snapshot.id(), self.sequence);
        FrameSpec { object, entry: self.header.frames[frame].entry }
    }
}

/// What a recording becomes: which pages go into which frame.
struct Plan {
    /// Data pages of each frame, by file and page.
    frames: Vec<Vec<RecordedPage>>,
    zeros: Vec<RecordedPage>,
}

/// The chunks of a working-set object of `content`.
///
/// The frames are in first-touch order, roughly: see [`PART_GROWTH`].
pub(crate) async fn build(
    snapshot: &Arc<Snapshot>,
    content: &WorkingSetContent,
) -> Result<Vec<Bytes>, Error> {
    let plan = plan(snapshot, &content.pages);
    let mut offset = 0;
    let (mut frames, mut runs, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
    for pages in plan.frames {
        let frame_runs = runs_of(&pages);
        let bytes = page_bytes(snapshot, &pages).await?;
        let encoded =
            tokio::task::spawn_blocking(move || frame::encode_for_working_set(&bytes)).await;
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
        restores: content.restores,
        profile: content.profile.clone(),
        frames,
        runs,
        zero_runs: runs_of(&plan.zeros),
    };
    chunks.insert(0, encode(&header).into());
    Ok(chunks)
}

fn plan(snapshot: &Snapshot, pages: &[RecordedPage]) -> Plan {
    let mut in_order = pages.to_vec();
    // Stable: what was touched in the same microsecond stays in the order of the recording.
    in_order.sort_by_key(|page| page.first_touch_us);
    let mut seen = std::collections::HashSet::new();
    let (mut data, mut zeros) = (Vec::new(), Vec::new());
    for page in in_order {
        if data.len() == MAX_PAGES || !seen.insert((page.file, page.page)) {
            continue;
        }
        match snapshot.extent(page.file as usize, page.page).map(|extent| extent.source) {
            Some(Source::Frame { .. }) => data.push(page),
            Some(Source::Zero) => zeros.push(page),
            None => {}
        }
    }
    let by_page = |page: &RecordedPage| (page.file, page.page);
    zeros.sort_unstable_by_key(by_page);
    let mut frames = Vec::new();
    let mut rest = data.as_mut_slice();
    let mut part_pages = FIRST_FRAME_PAGES;
    while !rest.is_empty() {
        let (part, later) = rest.split_at_mut(part_pages.min(rest.len()));
        part.sort_unstable_by_key(by_page);
        frames.extend(part.chunks(FRAME_PAGES).map(<[_]>::to_vec));
        rest = later;
        part_pages *= PART_GROWTH;
    }
    Plan { frames, zeros }
}

fn runs_of(pages: &[RecordedPage]) -> Vec<WorkingSetRun> {
    let mut runs: Vec<WorkingSetRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run)
                if run.file == page.file
                    && run.weight == page.weight
                    && run.first_touch_us.abs_diff(page.first_touch_us) <= SAME_TOUCH_US
                    && run.first_page + u64::from(run.pages) == page.page =>
            {
                run.pages += 1;
                run.first_touch_us = run.first_touch_us.min(page.first_touch_us);
            }
            _ => runs.push(WorkingSetRun {
                file: page.file,
                first_page: page.page,
                pages: 1,
                first_touch_us: page.first_touch_us,
                weight: page.weight,
            }),
        }
    }
    runs
}

/// The bytes of some pages that have bytes, one after the other.
async fn page_bytes(snapshot: &Arc<Snapshot>, pages: &[RecordedPage]) -> Result<Vec<u8>, Error> {
    let places: Vec<(FrameIndex, u32)> = pages
        .iter()
        .filter_map(|page| match snapshot.extent(page.file as usize, page.page)?.source {
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
