//! What a user waits for: from the resume of a real guest to its first answer, and how well a working set
//! that was recorded with one input fits another.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::guests::Made;
use crate::lab::{Backend, Lab, evict_tree};
use crate::worker::Worker;

/// The input of the recording, and one that the guest has never seen.
const INPUTS: [&str; 2] = ["one", "another"];

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
        let count = |key: &str| restore[key].as_f64().with_context(|| format!("{key}: {restore}"));
        self.missed.push(count("missed_pages")? / made.function.trace.pages().len() as f64);
        self.cold_ms.push(cold_ms);
        self.warm_ms.push(warm_ms);
        Ok(())
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
        "\nresume to first answer, ms: median (smallest to largest); pages missed with another input\n\n",
    );
    for answers in guests {
        let spread = |values: &[f64]| {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            format!("{:.1} ({least:.1} to {most:.1})", median(values))
        };
        let _ = writeln!(
            text,
            "{:<20} ours cold {:<26} file warm {:<26} {:.2}    missed {:.1} %",
            answers.name,
            spread(&answers.cold_ms),
            spread(&answers.warm_ms),
            answers.ratio(),
            100.0 * median(&answers.missed)
        );
    }
    let _ = writeln!(text, "ours cold / file warm, geometric mean: {:.2}", geometric_mean(guests));
    text
}

/// For scripts.
pub fn json(guests: &[Answers]) -> Value {
    let one = |answers: &Answers| {
        json!({"name": answers.name, "cold_ms": answers.cold_ms, "warm_ms": answers.warm_ms,
               "missed_of_trace": answers.missed})
    };
    let guests_json: Vec<_> = guests.iter().map(one).collect();
    json!({"guests": guests_json, "cold_by_warm_geometric_mean": geometric_mean(guests)})
}
