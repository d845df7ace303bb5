//! A working set as one HTML file: a map of guest memory, and the timeline of a restore. No scripts and
//! nothing from outside, so that the file can be mailed and kept.

mod chart;
mod map;
mod timeline;

use std::collections::BTreeMap;
use std::path::Path;

use reap_store::{Error, FileKind, WorkingSet, WorkingSetRun};
use serde::Deserialize;

use crate::output::{size, time};

use timeline::draw as draw_timeline;

/// Longest timeline that is read: some 100,000 events.
const MAX_TIMELINE_BYTES: u64 = 16 << 20;

/// What `reapd --json status --timeline` says of a restore.
#[derive(Debug, Deserialize)]
pub(super) struct Timeline {
    restore: Restore,
    events: Vec<Event>,
    dropped: u64,
}

#[derive(Debug, Deserialize)]
struct Restore {
    id: u64,
    snapshot: String,
    mode: String,
    first_prefetch_us: Option<u64>,
    last_prefetch_us: Option<u64>,
}

/// See `reap_prefetcher::Event`.
#[derive(Debug, Deserialize)]
struct Event {
    at_us: u32,
    took_us: u32,
    page: u32,
    pages: u16,
    kind: String,
    planned: bool,
}

impl Event {
    fn is_fault(&self) -> bool {
        self.kind.starts_with("fault")
    }
}

impl Timeline {
    /// Reads what the daemon gave.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let local = |error: std::io::Error| Error::local(path.display(), error);
        let bytes = std::fs::metadata(path).map_err(local)?.len();
        if bytes > MAX_TIMELINE_BYTES {
            return Err(Error::invalid(path.display(), "is too long for a timeline"));
        }
        let text = std::fs::read_to_string(path).map_err(local)?;
        serde_json::from_str(&text).map_err(|error| {
            let remedy = "write it with 'reapd --json status --timeline RESTORE'";
            Error::invalid(path.display(), format!("is no timeline ({error}): {remedy}"))
        })
    }

    /// Whether it is of a restore of this snapshot.
    pub(super) fn is_of(&self, snapshot: reap_store::SnapshotId) -> bool {
        self.restore.snapshot == snapshot.to_string()
    }
}

/// The page.
pub(super) fn html(name: &str, set: &WorkingSet, timeline: Option<&Timeline>) -> String {
    let file = set.snapshot().files().iter().position(|file| file.kind == FileKind::Memory);
    let file = file.unwrap_or(0);
    let touched = touched_pages(set, file);
    let missed: Vec<u64> = timeline.map_or_else(Vec::new, |timeline| {
        let faults = timeline
            .events
            .iter()
            .filter(|event| event.is_fault() && event.kind != "fault_removed");
        let pages = faults
            .flat_map(|event| (0..u64::from(event.pages)).map(|page| u64::from(event.page) + page));
        pages.filter(|page| !touched.contains_key(page)).collect()
    });
    let mut body = header(name, set, &touched, file);
    body.push_str(&map::draw(set.snapshot(), file, &touched, &missed, timeline.is_some()));
    match timeline {
        Some(timeline) => body.push_str(&draw_timeline(timeline)),
        None => body.push_str(
            "<p class=\"note\">For missed pages and the timeline of a restore, add <code>--timeline FILE</code>, \
             where FILE is what <code>reapd --json status --timeline RESTORE</code> printed.</p>\n",
        ),
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name}: working set {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        set.sequence()
    )
}

/// Microseconds to the first touch of each page of guest memory that the set has and a restore touched.
fn touched_pages(set: &WorkingSet, file: usize) -> BTreeMap<u64, u32> {
    let runs = set.all_runs().filter(|run| run.file as usize == file && run.was_touched());
    let pages = runs.flat_map(|run: &WorkingSetRun| {
        let pages = run.first_page..run.first_page + u64::from(run.pages);
        pages.map(|page| (page, run.first_touch_us))
    });
    pages.collect()
}

fn header(name: &str, set: &WorkingSet, touched: &BTreeMap<u64, u32>, file: usize) -> String {
    let snapshot = set.snapshot();
    let memory = &snapshot.files()[file];
    let profile = match set.profile().as_str() {
        "" => "the usual one".to_owned(),
        profile => profile.to_owned(),
    };
    let share = touched.len() as f64 / memory.page_count().max(1) as f64 * 100.0;
    let facts = [
        ("Snapshot", snapshot.id().to_string()),
        ("Profile", profile),
        ("Recorded", time(set.created_unix_ms())),
        ("Learned from", format!("{} watched restores", set.restores())),
        ("Pages", format!("{} with bytes, {} of zeros", set.data_pages(), set.zero_pages())),
        ("Of guest memory", format!("{share:.1} % of {}", size(memory.size))),
        ("Stored in", size(set.stored_bytes())),
    ];
    let rows: String = facts
        .iter()
        .map(|(key, value)| format!("<div><dt>{key}</dt><dd>{value}</dd></div>\n"))
        .collect();
    format!("<h1>{name} <span>working set {}</span></h1>\n<dl>\n{rows}</dl>\n", set.sequence())
}

/// One palette for light, one for dark. The steps of time go from early (warm) to late (cool).
const STYLE: &str = "\
:root { --page: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d4d9df; --zero: #eef1f4; --data: #c3cbd4;
  --t0: #b30059; --t1: #d6336c; --t2: #e8590c; --t3: #f08c00; --t4: #74b816; --t5: #2b8a3e; --t6: #1098ad; --t7: #1c5fb8;
  --missed: #000000; --install: #1c5fb8; --cached: #2b8a3e; --fetched: #d9480f; --zeros: #7048e8; --removed: #868e96; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e8ebee; --soft: #a2abb5; --line: #3a424b; --zero: #20252b; --data: #47515c;
    --t0: #ff5c9e; --t1: #ff8787; --t2: #ff922b; --t3: #ffd43b; --t4: #c0eb75; --t5: #51cf66; --t6: #3bc9db; --t7: #74a9ff;
    --missed: #ffffff; --install: #74a9ff; --cached: #51cf66; --fetched: #ff922b; --zeros: #b197fc; --removed: #adb5bd; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, 'DejaVu Sans', sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h1 span { color: var(--soft); font-weight: 400; }
h2 { font-size: 17px; margin: 34px 0 4px; }
p { margin: 0 0 10px; color: var(--soft); max-width: 80ch; }
dl { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 0; }
dt { color: var(--soft); font-size: 12.5px; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, 'DejaVu Sans', sans-serif; }
svg text.title { fill: var(--ink); }
ul.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 0 0 8px; padding: 0; font-size: 13px; }
ul.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; border-radius: 2px; }
ul.legend i.ring { border-radius: 50%; width: 8px; height: 8px; border: 2px solid var(--ink); }
.note { margin-top: 20px; }
";
