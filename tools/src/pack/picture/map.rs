//! The map of guest memory: one cell for a few pages, row by row from address 0.

use std::collections::BTreeMap;
use std::fmt::Write;

use reap_store::{Snapshot, Source};

use super::chart::{self, duration, legend};
use crate::output::size;

/// Cells of a row, and rows at most; a cell stands for as many pages as that needs.
const COLUMNS: u64 = 512;
const MAX_ROWS: u64 = 144;
/// Steps of time that have a colour of their own.
const STEPS: usize = 8;
const LEFT: f64 = 84.0;
const WIDTH: f64 = 1120.0;
const CELL_WIDTH: f64 = 2.0;
const CELL_HEIGHT: f64 = 3.5;

/// What a cell shows: the most telling of its pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    Zero,
    Data,
    /// The step of the earliest touch; an earlier one tells more.
    Touched(std::cmp::Reverse<usize>),
    Missed,
}

impl Cell {
    fn colour(self) -> String {
        match self {
            Self::Zero => "zero".to_owned(),
            Self::Data => "data".to_owned(),
            Self::Touched(std::cmp::Reverse(step)) => format!("t{step}"),
            Self::Missed => "missed".to_owned(),
        }
    }
}

/// The heading, the legend and the map.
pub(super) fn draw(
    snapshot: &Snapshot,
    file: usize,
    touched: &BTreeMap<u64, u32>,
    missed: &[u64],
    with_missed: bool,
) -> String {
    let pages = snapshot.files()[file].page_count();
    let per_cell = pages.div_ceil(COLUMNS * MAX_ROWS).next_power_of_two();
    let bounds = step_bounds(touched);
    let cells = cells(snapshot, file, per_cell, touched, &bounds, missed);
    let mut out = format!(
        "<h2>Guest memory by the time of the first touch</h2>\n<p>From address 0 at the top left, {} a row; \
         a cell stands for {}.</p>\n",
        size(COLUMNS * per_cell * 4096),
        match per_cell {
            1 => "one page of 4 KiB".to_owned(),
            many => format!("{many} pages of 4 KiB, and shows the earliest touch among them"),
        }
    );
    out.push_str(&legend_of(&bounds, with_missed, missed.len()));
    out.push_str(&svg(&cells, per_cell));
    out
}

/// The latest touch of each step: as many pages in each.
fn step_bounds(touched: &BTreeMap<u64, u32>) -> Vec<u32> {
    let mut times: Vec<u32> = touched.values().copied().collect();
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let mut bounds: Vec<u32> =
        (1..=STEPS).filter_map(|step| times.get(last * step / STEPS).copied()).collect();
    bounds.dedup();
    bounds
}

fn cells(
    snapshot: &Snapshot,
    file: usize,
    per_cell: u64,
    touched: &BTreeMap<u64, u32>,
    bounds: &[u32],
    missed: &[u64],
) -> Vec<Cell> {
    let pages = snapshot.files()[file].page_count();
    let count = usize::try_from(pages.div_ceil(per_cell)).unwrap_or(0);
    let mut cells = vec![Cell::Zero; count];
    let mut raise = |page: u64, to: Cell| {
        let cell = usize::try_from(page / per_cell).ok().and_then(|at| cells.get_mut(at));
        if let Some(cell) = cell {
            *cell = to.max(*cell);
        }
    };
    for (first, extent) in snapshot.extents(file, 0..pages) {
        if extent.source != Source::Zero {
            (first..first + extent.pages).for_each(|page| raise(page, Cell::Data));
        }
    }
    for (page, at_us) in touched {
        let step = bounds.partition_point(|bound| bound < at_us);
        raise(*page, Cell::Touched(std::cmp::Reverse(step)));
    }
    missed.iter().for_each(|page| raise(*page, Cell::Missed));
    cells
}

fn legend_of(bounds: &[u32], with_missed: bool, missed: usize) -> String {
    let colours: Vec<String> = (0..bounds.len()).map(|step| format!("t{step}")).collect();
    let texts: Vec<String> =
        bounds.iter().map(|bound| format!("until {}", duration(f64::from(*bound)))).collect();
    let mut entries = vec![("zero", "", "zeros"), ("data", "", "data, not in the set")];
    let steps = colours.iter().zip(&texts);
    entries.extend(steps.map(|(colour, text)| (colour.as_str(), "", text.as_str())));
    let missed = format!("touched in the restore below, not in the set ({missed})");
    if with_missed {
        entries.push(("missed", "", &missed));
    }
    legend(&entries)
}

fn svg(cells: &[Cell], per_cell: u64) -> String {
    let columns = usize::try_from(COLUMNS).unwrap_or(usize::MAX);
    let rows = cells.len().div_ceil(columns);
    let (top, map_height) = (24.0, rows as f64 * CELL_HEIGHT);
    let height = top + map_height + 12.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"Map of guest memory\" \
         shape-rendering=\"crispEdges\">\n"
    );
    let x = |column: usize| LEFT + column as f64 * CELL_WIDTH;
    let row_bytes = COLUMNS * per_cell * 4096;
    for quarter in 0..=4 {
        let offset = row_bytes / 4 * quarter;
        let at = x(columns / 4 * usize::try_from(quarter).unwrap_or(0));
        chart::line(&mut svg, (at, top - 5.0), (at, top - 1.0), "soft", "");
        let anchor = if quarter == 4 { "end" } else { "middle" };
        chart::text(&mut svg, (at, top - 9.0), anchor, "", &format!("+{}", short(offset)));
    }
    for (row, cells) in cells.chunks(columns).enumerate() {
        draw_row(&mut svg, cells, top + row as f64 * CELL_HEIGHT);
    }
    let every = (rows / 8).max(1).next_power_of_two();
    for row in (0..rows).step_by(every) {
        let at = top + row as f64 * CELL_HEIGHT;
        chart::line(&mut svg, (LEFT - 6.0, at), (LEFT - 1.0, at), "soft", "");
        let offset = short(row as u64 * row_bytes);
        chart::text(&mut svg, (LEFT - 10.0, at + 4.0), "end", "", &offset);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Neighbours of one colour are one rectangle.
fn draw_row(svg: &mut String, cells: &[Cell], y: f64) {
    let mut column = 0;
    for run in cells.chunk_by(|one, next| one == next) {
        let (x, width) = (LEFT + column as f64 * CELL_WIDTH, run.len() as f64 * CELL_WIDTH);
        let colour = run[0].colour();
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{CELL_HEIGHT}\" fill=\"var(--{colour})\"/>"
        );
        column += run.len();
    }
}

/// An offset for an axis.
fn short(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        bytes if bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes as f64 / f64::from(1 << 20)),
        bytes => format!("{} KiB", bytes >> 10),
    }
}
