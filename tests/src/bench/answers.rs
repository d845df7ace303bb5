//! What a user waits for: from the resume of a real guest to its first answer, and how well a working set
//! that was recorded with one input fits another.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::guests::Made;
use crate::lab::{Backend, Lab, evict_tree};
use crate::worker::Worker;

/// The input of the recording, and one that the guest has never seen.
const INPUTS: [&str; 2] = ["one", "another"];
/// Others, of a guest that is restored again and again.
const MORE_INPUTS: [&str; 6] =
    ["another", "a third", "the fourth, which is longer", "5", "six of them", "the seventh"];

/// All rounds of one guest.
#[derive(Default)]
pub struct Answers {
    name: String,
    /// With the working set, new daemon, store evicted; milliseconds.
    cold_ms: Vec<f64>,
    /// From the memory file in page cache.
    warm_ms: Vec<f64>,
    /// Cold, with another input: pages that were not in the working set and had to be served, by its pages.
    missed: Vec<f64>,
    /// The same in restores one after the other, each with one more input, on a node that learns from them.
    missed_learning: Vec<f64>,
}

impl Answers {
    /// None yet.
    pub fn of(made: &Made) -> Self {
        Self { name: made.function.name.clone(), ..Self::default() }
    }

    /// Each way once.
    pub fn round(&mut self, lab: &Lab, made: &Made) -> Result<()> {
        let (cold_ms, _) = ours(lab, made, INPUTS[0])?;
        // The first brings the file into the page cache.
        warm(lab, made)?;
        let warm_ms = warm(lab, made)?;
        let (_, restore) = ours(lab, made, INPUTS[1])?;
        self.missed.push(missed(made, &restore)?);
        self.cold_ms.push(cold_ms);
        self.warm_ms.push(warm_ms);
        Ok(())
    }

    /// Restores with more inputs, on a node that learns. Changes the working set of `made`: for the end.
    pub fn learn(&mut self, lab: &Lab, made: &Made) -> Result<()> {
        let directory = made.directory.join("learner");
        let worker = Worker::start(&made.url, &directory, &["--settle", "1"])?;
        let prepared = worker.prepare(&made.snapshot.function, "auto")?;
        let socket = PathBuf::from(prepared["uffd"].as_str().context("a socket")?);
        for input in MORE_INPUTS {
            // Some restores are samples, into which nothing is installed.
            let restore = loop {
                let backend = Backend::Uffd { socket: socket.clone() };
                let mut guest = lab.restore(&made.snapshot, &backend)?;
                guest.request(input)?;
                drop(guest);
                let restore = worker.wait_for_restore(|restore| !restore["end"].is_null())?;
                if restore["mode"] == "prefetch" {
                    break restore;
                }
            };
            self.missed_learning.push(missed(made, &restore)?);
        }
        worker.stop()
    }

    fn ratio(&self) -> f64 {
        median(&self.cold_ms) / median(&self.warm_ms)
    }
}

/// A restore by our handler, cold: milliseconds to the answer, and what the daemon says of it.
fn ours(lab: &Lab, made: &Made, input: &str) -> Result<(f64, Value)> {
    let worker = Worker::start(&made.url, &made.directory.join("worker"), &[])?;
    let prepared = worker.prepare(&made.snapshot.function, "prefetch")?;
    evict_tree(&made.directory.join("store"))?;
    let socket = prepared["uffd"].as_str().context("a socket")?.into();
    let mut guest = lab.restore(&made.snapshot, &Backend::Uffd { socket })?;
    let answer = guest.request(input)?;
    ensure!(input != INPUTS[0] || answer.line == made.answer, "another answer: {}", answer.line);
    let restore = worker.newest_restore()?;
    drop(guest);
    worker.stop()?;
    Ok((answer.since_resume.as_secs_f64() * 1000.0, restore))
}

/// Pages that were not in the working set and had to be served, by the pages of the trace.
fn missed(made: &Made, restore: &Value) -> Result<f64> {
    let count = |key: &str| restore[key].as_f64().with_context(|| format!("{key}: {restore}"));
    let missed = count("missed_pages")? + count("missed_zero_pages")?;
    Ok(missed / made.function.trace.pages().len() as f64)
}

fn warm(lab: &Lab, made: &Made) -> Result<f64> {
    let mut guest = lab.restore(&made.snapshot, &Backend::File(made.snapshot.memory.clone()))?;
    let answer = guest.request(INPUTS[0])?;
    ensure!(answer.line == made.answer, "another answer: {}", answer.line);
    Ok(answer.since_resume.as_secs_f64() * 1000.0)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn geometric_mean(guests: &[Answers]) -> f64 {
    let logarithms: f64 = guests.iter().map(|answers| answers.ratio().ln()).sum();
    (logarithms / guests.len() as f64).exp()
}

/// For people.
pub fn table(guests: &[Answers]) -> String {
    let mut text = String::from(
        "\nresume to first answer, ms: median (smallest to largest); pages missed with another input, by those of the trace:\n\
         median of the first restores, and one restore after the other with six inputs on a node that learns\n\n",
    );
    for answers in guests {
        let spread = |values: &[f64]| {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            format!("{:.1} ({least:.1} to {most:.1})", median(values))
        };
        let later = answers.missed_learning.iter().map(|missed| format!("{:.1}", 100.0 * missed));
        let _ = writeln!(
            text,
            "{:<20} ours cold {:<26} file warm {:<26} {:.2}    missed {:.1} %; learning {} %",
            answers.name,
            spread(&answers.cold_ms),
            spread(&answers.warm_ms),
            answers.ratio(),
            100.0 * median(&answers.missed),
            later.collect::<Vec<_>>().join(", ")
        );
    }
    let _ = writeln!(text, "ours cold / file warm, geometric mean: {:.2}", geometric_mean(guests));
    text
}

/// For scripts.
pub fn json(guests: &[Answers]) -> Value {
    let one = |answers: &Answers| {
        json!({"name": answers.name, "cold_ms": answers.cold_ms, "warm_ms": answers.warm_ms,
               "missed_of_trace": answers.missed, "missed_while_learning": answers.missed_learning})
    };
    let guests_json: Vec<_> = guests.iter().map(one).collect();
    json!({"guests": guests_json, "cold_by_warm_geometric_mean": geometric_mean(guests)})
}
