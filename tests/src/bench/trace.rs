//! Traces: the pages that a guest touched, in first-touch order.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Longest trace that is read: ten million lines.
const MAX_TRACE_BYTES: u64 = 256 << 20;

/// Pages of a memory file in first-touch order, each once.
#[derive(Clone, Debug)]
pub struct Trace(Vec<u64>);

impl Trace {
    /// Reads a text file: one page number a line, whatever follows it is ignored, as are lines that begin
    /// with `#` (`reap-pack ws export` writes such files). `pages`: length of the memory file.
    pub fn read(path: &Path, pages: u64) -> Result<Self> {
        let name = path.display();
        let mut text = String::new();
        let file = std::fs::File::open(path).with_context(|| format!("cannot read {name}"))?;
        let read = file.take(MAX_TRACE_BYTES + 1).read_to_string(&mut text);
        let bytes = read.with_context(|| format!("cannot read {name}"))?;
        ensure!(bytes as u64 <= MAX_TRACE_BYTES, "{name} is longer than {MAX_TRACE_BYTES} bytes");
        Self::parse(&text, pages).with_context(|| name.to_string())
    }

    /// The same from the file's text.
    pub fn parse(text: &str, pages: u64) -> Result<Self> {
        let mut seen = HashSet::new();
        let mut trace = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let Some(word) = line.split_whitespace().next().filter(|word| !word.starts_with('#'))
            else {
                continue;
            };
            let wrong = || format!("line {}: {word:?} is no page number", number + 1);
            let page: u64 = word.parse().with_context(wrong)?;
            ensure!(page < pages, "line {}: the memory file has {pages} pages", number + 1);
            if seen.insert(page) {
                trace.push(page);
            }
        }
        ensure!(!trace.is_empty(), "there are no pages");
        Ok(Self(trace))
    }

    /// In first-touch order.
    pub fn pages(&self) -> &[u64] {
        &self.0
    }

    /// Runs of neighbouring pages (first page, count), by address: what REAP's working-set file holds.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in sorted {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_keeps_first_touches_and_knows_its_runs() -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), "# page us\n7 10\n3 11\n8\n7 12\n\n4\n")?;
        let trace = Trace::read(file.path(), 9)?;
        assert_eq!(trace.pages(), [7, 3, 8, 4]);
        assert_eq!(trace.runs(), [(3, 2), (7, 2)]);
        let refused = Trace::read(file.path(), 8).map_err(|error| format!("{error:#}"));
        assert!(refused.is_err_and(|text| text.contains("line 4")));
        Ok(())
    }
}
