//! What commands print: one line for an error, sizes for people, JSON for scripts.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use reap_store::{Error, ErrorKind};

/// Between two progress lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The exit code for an error: what a script can do about it.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>().map(Error::kind) {
        Some(ErrorKind::Invalid) => 2,
        Some(ErrorKind::NotFound) => 3,
        Some(ErrorKind::Damaged) => 4,
        Some(ErrorKind::Unreachable) => 5,
        Some(ErrorKind::Refused | ErrorKind::Exists) => 6,
        Some(ErrorKind::Local) | None => 1,
    }
}

/// What the exit codes mean, for `--help`.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 local failure, 2 wrong input, 3 not found, \
    4 damaged data, 5 store does not answer, 6 refused or there already.";

/// Ends a command: nothing more to say if it went well, else one line and the code.
pub fn finish(program: &str, outcome: anyhow::Result<()>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    // The reader of a pipe that went away wants no message.
    let broken_pipe = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if !broken_pipe {
        eprintln!("{program}: {}", one_line(&error));
    }
    ExitCode::from(exit_code(&error))
}

fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{cause}");
        }
    }
    text.replace('\n', " ")
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// A size as people write it: `20GiB`, `512M`, `1000000`. Units are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let at = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(at);
    let shift = match unit.trim().trim_end_matches(['B', 'b']).trim_end_matches('i') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err("write a number and a unit, such as 512MiB or 20GiB".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "write a number and a unit, such as 20GiB")?;
    number.checked_mul(1 << shift).ok_or_else(|| "is too large".into())
}

/// A time in milliseconds since 1970, in UTC as RFC 3339 writes it.
pub fn time(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Days of 400 years, after which the calendar repeats.
const CYCLE_DAYS: u64 = 146_097;

/// Year, month and day of a day since 1970, by counting through one 400-year cycle at most.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let (cycles, mut days) = (days / CYCLE_DAYS, days % CYCLE_DAYS);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year + cycles * 400, month, days + 1)
}

/// Progress in bytes: a bar on a terminal, a line now and then otherwise, nothing with `--json`.
pub struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// `what` is being done, such as `packing`.
    pub fn new(what: &'static str, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let template = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style).with_message(what)
        });
        Self { what, bar, last_line: (!quiet).then(Instant::now) }
    }

    /// `done` of `total` bytes.
    pub fn at(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if let Some(last) = &mut self.last_line
            && last.elapsed() > LINE_EVERY
        {
            *last = Instant::now();
            eprintln!("{}: {} of {}", self.what, size(done), size(total));
        }
    }

    /// Clears the bar away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units_are_understood() {
        assert_eq!(parse_size("20GiB"), Ok(20 << 30));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("7"), Ok(7));
        for bad in ["", "GiB", "1X", "-1", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_calendar_dates() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_709_164_800_000), "2024-02-29T00:00:00Z");
        assert_eq!(time(1_795_500_000_000), "2026-11-24T06:00:00Z");
        assert_eq!(time(253_402_300_799_999), "9999-12-31T23:59:59Z");
        // 'ls' of a store with a wild time answers at once.
        assert_eq!(time(u64::MAX), "584556019-04-03T14:25:51Z");
    }
}
