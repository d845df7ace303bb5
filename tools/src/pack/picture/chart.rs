//! Axes and scales of the pictures.

use std::fmt::Write;

/// A logarithmic scale of microseconds onto pixels.
pub(super) struct LogScale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl LogScale {
    /// `low_us` to `high_us`, widened to whole decades at the upper end.
    pub(super) fn new(low_us: f64, high_us: f64, from: f64, to: f64) -> Self {
        let low = low_us.max(1.0).log10().floor();
        let high = high_us.max(1.0).log10().ceil().max(low + 1.0);
        Self { low, high, from, to }
    }

    pub(super) fn at(&self, us: f64) -> f64 {
        let decades = us.max(1.0).log10().clamp(self.low, self.high) - self.low;
        self.from + decades / (self.high - self.low) * (self.to - self.from)
    }

    /// Each decade and its label.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = Vec::new();
        let mut decade = self.low;
        while decade <= self.high {
            let us = 10f64.powf(decade);
            ticks.push((us, label(us)));
            decade += 1.0;
        }
        ticks
    }
}

/// A round time for people.
fn label(us: f64) -> String {
    match us {
        us if us >= 999_999.5 => format!("{} s", us / 1e6),
        us if us >= 999.5 => format!("{} ms", us / 1e3),
        us => format!("{us} µs"),
    }
}

/// A time for people, three digits.
pub(super) fn duration(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{:.2} s", us / 1e6),
        us if us >= 1e4 => format!("{:.1} ms", us / 1e3),
        us if us >= 1e3 => format!("{:.2} ms", us / 1e3),
        us => format!("{us:.0} µs"),
    }
}

pub(super) fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, more: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"var(--{colour})\" {more}/>",
        from.0, from.1, to.0, to.1
    );
}

pub(super) fn text(svg: &mut String, at: (f64, f64), anchor: &str, more: &str, text: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" {more}>{text}</text>",
        at.0, at.1
    );
}

/// A round number of at least a fifth of `highest`, for marks on a linear axis.
pub(super) fn step(highest: u64) -> u64 {
    let rough = (highest / 5).max(1);
    let decade = 10u64.pow(rough.ilog10());
    [1, 2, 5, 10]
        .into_iter()
        .map(|times| times * decade)
        .find(|step| *step >= rough)
        .unwrap_or(rough)
}

/// One mark of a legend; `shape` is a CSS class or nothing.
pub(super) fn legend(entries: &[(&str, &str, &str)]) -> String {
    let entry = |(colour, shape, text): &(&str, &str, &str)| {
        let style = match colour.is_empty() {
            true => String::new(),
            false => format!(" style=\"background: var(--{colour})\""),
        };
        format!("<li><i class=\"{shape}\"{style}></i>{text}</li>\n")
    };
    format!("<ul class=\"legend\">\n{}</ul>\n", entries.iter().map(entry).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_and_steps_are_round() {
        let scale = LogScale::new(100.0, 25_000.0, 0.0, 300.0);
        let at: Vec<f64> = [100.0, 1e3, 1e4, 1e5, 1e9].map(|us| scale.at(us)).to_vec();
        assert_eq!(at, [0.0, 100.0, 200.0, 300.0, 300.0]);
        let labels: Vec<String> = scale.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["100 µs", "1 ms", "10 ms", "100 ms"]);
        assert_eq!([0, 7, 40, 1234].map(step), [1, 1, 10, 500]);
    }
}
