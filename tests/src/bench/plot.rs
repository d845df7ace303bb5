//! The same as a picture: bars on a logarithmic scale, with whiskers from smallest to largest. A red line
//! is where a remote start should end.

use std::fmt::Write;

use super::remote::bound_ms;
use super::report::Measured;
use super::ways::{ALTERNATIVES, Alternative};

const ROW: f64 = 18.0;
const LEFT: f64 = 170.0;
const WIDTH: f64 = 560.0;

/// A self-contained SVG.
pub fn svg(functions: &[Measured]) -> String {
    let all = |measured: &Measured| ALTERNATIVES.map(|which| measured.all_ms(which));
    // Those that were not taken have no time.
    let times = || functions.iter().flat_map(all).filter(|(median, ..)| median.is_finite());
    let least = times().map(|(_, least, _)| least).fold(f64::INFINITY, f64::min).max(0.01);
    let most = times().map(|(_, _, most)| most).fold(0.0, f64::max).max(least * 2.0);
    let x =
        |ms: f64| LEFT + (ms.max(least) / (least * 0.8)).ln() / (most / (least * 0.8)).ln() * WIDTH;
    let block = ROW * (ALTERNATIVES.len() as f64 + 2.5);
    let (width, height) = (LEFT + WIDTH + 80.0, block * functions.len() as f64 + 10.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (number, measured) in functions.iter().enumerate() {
        let mut y = block * number as f64 + ROW;
        let name = measured.name.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{y}\" font-weight=\"bold\">{name}: ms until {} pages were touched</text>",
            measured.pages
        );
        for which in ALTERNATIVES {
            y += ROW;
            let (median, least, most) = measured.all_ms(which);
            if !median.is_finite() {
                continue;
            }
            let colour = if which.title().starts_with("our") { "#2a7a4b" } else { "#9aa5b1" };
            let (end, middle) = (x(median), y - 4.0);
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{}</text>\
                 <rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>\
                 <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"black\"/>\
                 <text x=\"{:.1}\" y=\"{y}\">{median:.1}</text>",
                LEFT - 8.0,
                which.title(),
                y - 10.0,
                end - LEFT,
                x(least),
                x(most),
                x(most) + 6.0
            );
            if which == Alternative::OursRemote {
                let bound = x(bound_ms(measured.working_set_bytes));
                let _ = writeln!(
                    svg,
                    "<line x1=\"{bound:.1}\" x2=\"{bound:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#c0392b\" stroke-width=\"2\"/>",
                    y - 12.0,
                    y + 4.0
                );
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}
