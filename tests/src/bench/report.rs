//! What the rounds come to: medians with spreads, ratios within the run, JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::remote::{RemoteStart, bound_ms};
use super::touch::Touched;
use super::ways::Alternative::*;
use super::ways::{ALTERNATIVES, Alternative};

/// All rounds of one function.
pub struct Measured {
    /// The function.
    pub name: String,
    /// Pages of its trace.
    pub pages: usize,
    /// Every start that was made.
    pub starts: Vec<(Alternative, Touched)>,
    /// Stored bytes of its working set.
    pub working_set_bytes: u64,
    /// The remote starts once more, with their requests.
    pub remote: Vec<RemoteStart>,
}

impl Measured {
    /// Takes a remote start up.
    pub fn push_remote(&mut self, start: RemoteStart) {
        self.starts.push((OursRemote, start.touched));
        self.remote.push(start);
    }

    /// What of the bound for a remote start its median is.
    fn of_bound(&self) -> f64 {
        self.all_ms(OursRemote).0 / bound_ms(self.working_set_bytes)
    }

    /// Most rounds of requests, one after the other, that a remote start made.
    fn rounds(&self) -> usize {
        self.remote.iter().map(RemoteStart::rounds).max().unwrap_or(0)
    }

    fn of(&self, alternative: Alternative, value: impl Fn(&Touched) -> f64) -> Vec<f64> {
        let chosen = self.starts.iter().filter(|(which, _)| *which == alternative);
        let mut values: Vec<f64> = chosen.map(|(_, touched)| value(touched)).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// Median, smallest and largest time to touch all pages, milliseconds.
    pub fn all_ms(&self, alternative: Alternative) -> (f64, f64, f64) {
        let values = self.of(alternative, |touched| touched.all_us / 1000.0);
        (
            median(&values),
            values.first().copied().unwrap_or(0.0),
            values.last().copied().unwrap_or(0.0),
        )
    }

    fn figure(&self, of: Of, alternative: Alternative) -> f64 {
        match of {
            Of::All => self.all_ms(alternative).0,
            Of::WaitP50 => median(&self.of(alternative, |touched| touched.wait_p50_us)),
            Of::WaitP99 => median(&self.of(alternative, |touched| touched.wait_p99_us)),
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What a ratio is of.
#[derive(Clone, Copy)]
enum Of {
    /// The time for all pages.
    All,
    /// The median wait of a touch that waited.
    WaitP50,
    /// The 99th percentile of these waits.
    WaitP99,
}

/// A ratio that is judged: geometric mean over the functions of one median by another.
struct Ratio {
    what: &'static str,
    of: Of,
    ours: Alternative,
    other: Alternative,
}

const fn ratio(what: &'static str, of: Of, ours: Alternative, other: Alternative) -> Ratio {
    Ratio { what, of, ours, other }
}

const RATIOS: [Ratio; 10] = [
    ratio("ours cold / REAP cold", Of::All, OursCold, ReapCold),
    ratio("ours cold / file mapping cold", Of::All, OursCold, FileCold),
    ratio("ours cold / ours on demand cold", Of::All, OursCold, OursDemandCold),
    ratio("ours warm node / REAP in page cache", Of::All, OursWarm, ReapWarm),
    ratio("our mount warm / file mapping warm", Of::All, MountWarm, FileWarm),
    ratio("our mount cold / file mapping cold", Of::All, MountCold, FileCold),
    ratio(
        "p50 of a fault: ours on demand warm / minimal handler warm",
        Of::WaitP50,
        OursDemandWarm,
        DemandWarm,
    ),
    ratio(
        "p99 of a fault: while 64 MiB are prefetched / idle",
        Of::WaitP99,
        OursDemandBeside,
        OursDemandWarm,
    ),
    ratio(
        "the same, and the other VM touches them / idle",
        Of::WaitP99,
        OursDemandBusy,
        OursDemandWarm,
    ),
    ratio("recording / on demand, both warm", Of::All, OursRecordWarm, OursDemandWarm),
];

impl Ratio {
    fn of(&self, measured: &Measured) -> f64 {
        measured.figure(self.of, self.ours) / measured.figure(self.of, self.other)
    }

    fn mean(&self, functions: &[Measured]) -> f64 {
        let logarithms: f64 = functions.iter().map(|measured| self.of(measured).ln()).sum();
        (logarithms / functions.len() as f64).exp()
    }
}

/// For people.
pub fn table(functions: &[Measured]) -> String {
    let mut text = String::from(
        "ms until every page of the trace was touched: median (smallest to largest)\n\n",
    );
    let _ = write!(text, "{:<24}", "");
    for measured in functions {
        let _ = write!(text, "{:>26}", format!("{} ({})", measured.name, measured.pages));
    }
    for alternative in ALTERNATIVES {
        if functions.iter().all(|measured| measured.of(alternative, |_| 0.0).is_empty()) {
            continue;
        }
        let _ = write!(text, "\n{:<24}", alternative.title());
        for measured in functions {
            let (median, least, most) = measured.all_ms(alternative);
            let _ = write!(text, "{:>26}", format!("{median:.1} ({least:.1} to {most:.1})"));
        }
    }
    text.push_str(&remote_table(functions));
    text.push_str("\nratios, geometric mean over the functions (each of them)\n\n");
    for ratio in RATIOS.iter().filter(|ratio| !ratio.mean(functions).is_nan()) {
        let each: Vec<_> =
            functions.iter().map(|measured| format!("{:.2}", ratio.of(measured))).collect();
        let mean = ratio.mean(functions);
        let _ = writeln!(text, "{:<60}{mean:>6.2}  ({})", ratio.what, each.join(", "));
    }
    text
}

/// Remote starts against their bound.
fn remote_table(functions: &[Measured]) -> String {
    let mut text = String::from(
        "\n\nremote starts: stored KiB of the working set, most rounds of requests and requests, median ms, bound, ratio\n\n",
    );
    for measured in functions {
        let requests = measured.remote.iter().map(|start| start.requests.len()).max().unwrap_or(0);
        let (median, ..) = measured.all_ms(OursRemote);
        let bytes = measured.working_set_bytes;
        let _ = writeln!(
            text,
            "{:<24}{:>8}{:>6}{requests:>6}{median:>10.1}{:>10.1}{:>8.2}",
            measured.name,
            bytes >> 10,
            measured.rounds(),
            bound_ms(bytes),
            measured.of_bound()
        );
    }
    text
}

/// For scripts.
pub fn json(functions: &[Measured]) -> Value {
    let start = |(alternative, touched): &(Alternative, Touched)| json!({"way": alternative, "touched": touched});
    let function = |measured: &Measured| {
        let starts: Vec<_> = measured.starts.iter().map(start).collect();
        let remote = json!({
            "working_set_bytes": measured.working_set_bytes,
            "bound_ms": bound_ms(measured.working_set_bytes),
            "median_by_bound": measured.of_bound(),
            "rounds": measured.rounds(),
            "requests": measured.remote.iter().map(|start| &start.requests).collect::<Vec<_>>(),
        });
        json!({"name": measured.name, "pages": measured.pages, "starts": starts, "remote": remote})
    };
    let ratio =
        |ratio: &Ratio| json!({"what": ratio.what, "geometric_mean": ratio.mean(functions)});
    json!({
        "functions": functions.iter().map(function).collect::<Vec<_>>(),
        "ratios": RATIOS.iter().map(ratio).collect::<Vec<_>>(),
    })
}
