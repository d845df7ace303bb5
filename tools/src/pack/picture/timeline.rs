//! The timeline of a restore: what was installed ahead, and what each fault waited.

use std::fmt::Write;

use super::chart::{LogScale, duration, legend, line, step, text};
use super::{Event, Timeline};

const LEFT: f64 = 84.0;
const RIGHT: f64 = 1100.0;
const WIDTH: f64 = 1120.0;
/// The upper panel counts pages, the lower shows how long faults waited.
const COUNTS: (f64, f64) = (30.0, 200.0);
const WAITS: (f64, f64) = (240.0, 440.0);
const HEIGHT: f64 = 490.0;

/// Kinds of faults, their colour, and what to call them.
const CLASSES: [(&str, &str, &str); 4] = [
    ("fault_cached", "cached", "fault served from memory"),
    ("fault_fetched", "fetched", "fault that had to fetch"),
    ("fault_zero", "zeros", "fault on zeros"),
    ("fault_removed", "removed", "fault on a page given back"),
];

/// The heading, the legend and both panels.
pub(super) fn draw(timeline: &Timeline) -> String {
    let restore = &timeline.restore;
    let faults = timeline.events.iter().filter(|event| event.is_fault()).count();
    let late = timeline.events.iter().filter(|event| is_late(event, &restore.mode)).count();
    let mut out = format!(
        "<h2>Restore {} in mode {}</h2>\n<p>Time since the VM connected, logarithmic. {faults} faults{}.{}</p>\n",
        restore.id,
        restore.mode,
        match restore.mode.as_str() {
            "prefetch" => format!(", {late} of them on pages of the set that came late"),
            _ => String::new(),
        },
        match timeline.dropped {
            0 => String::new(),
            dropped => format!(" {dropped} later events were not kept."),
        }
    );
    let mut entries = vec![
        ("install", "", "pages installed ahead, counted up"),
        ("ink", "", "pages faulted in, counted up"),
    ];
    entries.extend(CLASSES.map(|(_, colour, name)| (colour, "", name)));
    if restore.mode == "prefetch" {
        entries.push(("", "ring", "late: in the set, not there yet"));
    }
    out.push_str(&legend(&entries));
    out.push_str(&svg(timeline));
    out
}

fn is_late(event: &Event, mode: &str) -> bool {
    mode == "prefetch" && event.is_fault() && event.planned
}

fn svg(timeline: &Timeline) -> String {
    let events = &timeline.events;
    let first = events.iter().map(|event| event.at_us).min().unwrap_or(100);
    let end = |event: &Event| f64::from(event.at_us) + f64::from(event.took_us);
    let last = events.iter().map(end).fold(1000.0, f64::max);
    let x = LogScale::new(f64::from(first).max(10.0), last, LEFT, RIGHT);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"Timeline of a restore\">\n"
    );
    time_axis(&mut svg, &x);
    counts(&mut svg, &x, events);
    waits(&mut svg, &x, timeline);
    prefetch_marks(&mut svg, &x, timeline);
    svg.push_str("</svg>\n");
    svg
}

fn time_axis(svg: &mut String, x: &LogScale) {
    for (us, label) in x.ticks() {
        let at = x.at(us);
        for (top, bottom) in [COUNTS, WAITS] {
            line(svg, (at, top), (at, bottom), "line", "");
        }
        let anchor = if at >= RIGHT { "end" } else { "middle" };
        text(svg, (at, WAITS.1 + 18.0), anchor, "", &label);
    }
    let middle = (LEFT + RIGHT) / 2.0;
    text(svg, (middle, WAITS.1 + 38.0), "middle", "class=\"title\"", "time since the VM connected");
}

/// How many pages were installed ahead, and how many faults there were, up to each moment.
fn counts(svg: &mut String, x: &LogScale, events: &[Event]) {
    let installs = events.iter().filter(|event| !event.is_fault());
    let installed = curve(installs.map(|event| (event.at_us, u64::from(event.pages))));
    let faults = events.iter().filter(|event| event.is_fault());
    let faulted = curve(faults.map(|event| (event.at_us, u64::from(event.pages))));
    let highest = |curve: &[(u32, u64)]| curve.last().map_or(0, |(_, count)| *count);
    let most = highest(&installed).max(highest(&faulted)).max(1);
    let (top, bottom) = COUNTS;
    let y = |count: u64| bottom - (bottom - top) * count as f64 / most as f64;
    let each = step(most);
    for count in (0..=most).step_by(usize::try_from(each).unwrap_or(usize::MAX)) {
        line(svg, (LEFT, y(count)), (RIGHT, y(count)), "line", "");
        text(svg, (LEFT - 8.0, y(count) + 4.0), "end", "", &count.to_string());
    }
    text(
        svg,
        (LEFT, top - 12.0),
        "start",
        "class=\"title\"",
        "pages so far: installed ahead, faulted in",
    );
    for (curve, colour) in [(installed, "install"), (faulted, "ink")] {
        let mut path = format!("M{LEFT:.1} {bottom:.1}");
        for (at_us, count) in curve {
            let _ = write!(path, "H{:.1}V{:.1}", x.at(f64::from(at_us)), y(count));
        }
        let _ = writeln!(
            svg,
            "<path d=\"{path}H{RIGHT:.1}\" fill=\"none\" stroke=\"var(--{colour})\" stroke-width=\"2\"/>"
        );
    }
}

/// Sums in order of time.
fn curve(events: impl Iterator<Item = (u32, u64)>) -> Vec<(u32, u64)> {
    let mut events: Vec<_> = events.collect();
    events.sort_unstable();
    let mut sum = 0;
    for (_, count) in &mut events {
        sum += *count;
        *count = sum;
    }
    events
}

/// Each fault as a dot: when it came, and how long it waited.
fn waits(svg: &mut String, x: &LogScale, timeline: &Timeline) {
    let faults: Vec<&Event> = timeline.events.iter().filter(|event| event.is_fault()).collect();
    let took = |event: &&Event| f64::from(event.took_us.max(1));
    let shortest = faults.iter().map(took).fold(f64::MAX, f64::min).min(10.0);
    let longest = faults.iter().map(took).fold(100.0, f64::max);
    let (top, bottom) = WAITS;
    let y = LogScale::new(shortest, longest, bottom, top);
    for (us, label) in y.ticks() {
        line(svg, (LEFT, y.at(us)), (RIGHT, y.at(us)), "line", "");
        text(svg, (LEFT - 8.0, y.at(us) + 4.0), "end", "", &label);
    }
    text(svg, (LEFT, top - 12.0), "start", "class=\"title\"", "how long each fault waited");
    for event in faults {
        let class = CLASSES.iter().find(|(kind, ..)| *kind == event.kind);
        let colour = class.map_or("removed", |(_, colour, _)| colour);
        let late = match is_late(event, &timeline.restore.mode) {
            true => " stroke=\"var(--ink)\" stroke-width=\"1.5\"",
            false => "",
        };
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"var(--{colour})\" fill-opacity=\"0.75\"{late}/>",
            x.at(f64::from(event.at_us)),
            y.at(f64::from(event.took_us.max(1)))
        );
    }
}

/// When the first and the last page of the set was installed.
fn prefetch_marks(svg: &mut String, x: &LogScale, timeline: &Timeline) {
    let restore = &timeline.restore;
    let (Some(first), Some(last)) = (restore.first_prefetch_us, restore.last_prefetch_us) else {
        return;
    };
    for (us, name, anchor, shift) in
        [(first, "first install", "end", -5.0), (last, "last install", "start", 5.0)]
    {
        let at = x.at(us as f64);
        let dashes = "stroke-dasharray=\"5 4\"";
        line(svg, (at, COUNTS.0), (at, WAITS.1), "install", dashes);
        let label = format!("{name}, {}", duration(us as f64));
        text(svg, (at + shift, COUNTS.0 + 12.0), anchor, "class=\"title\"", &label);
    }
}
