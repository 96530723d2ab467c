//! The table as a bar chart, in SVG: each line a bar, and one mark that all aims share.

use std::fmt::Write as _;

use crate::figures::{Aim, Line};

const WIDTH: f64 = 1100.0;
const ROW: f64 = 32.0;
const TOP: f64 = 76.0;
/// Where bars begin, and how long one is that just meets its aim.
const LEFT: f64 = 460.0;
const AIM: f64 = 120.0;
/// Bars end here; a longer one has an open end.
const LONGEST: f64 = 290.0;
/// Where ratios are, and the figures that they come from.
const RATIO: f64 = LEFT + LONGEST + 24.0;
const FIGURES: f64 = RATIO + 130.0;

/// Draws a chart. A bar is as long as the ratio is to its aim, so that what ends left of the mark is met; where more is
/// better the ratio is turned over.
pub fn draw(title: &str, lines: &[Line]) -> String {
    let height = TOP + ROW * lines.len() as f64 + 44.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let mut text = |x: f64, y: f64, style: &str, text: &str| {
        let text = escape(text);
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {style}>{text}</text>");
    };
    text(16.0, 28.0, "font-size=\"17\" font-weight=\"bold\"", title);
    let (mark, head) = (LEFT + AIM, TOP - 12.0);
    text(
        mark,
        head,
        "text-anchor=\"middle\"",
        "aim; shorter is better",
    );
    text(RATIO, head, "", "ratio (aim)");
    text(FIGURES, head, "", "Caisson : the other");
    let legend = "green: met, orange: not met, grey: no aim, where the mark is the other's figure";
    text(16.0, height - 14.0, "fill=\"#666666\"", legend);
    for (index, line) in lines.iter().enumerate() {
        row(&mut svg, TOP + ROW * index as f64, line);
    }
    let bottom = TOP + ROW * lines.len() as f64;
    let _ = write!(
        svg,
        "<line x1=\"{mark}\" y1=\"{TOP}\" x2=\"{mark}\" y2=\"{bottom}\" stroke=\"#222222\" stroke-dasharray=\"4 3\"/>\n\
         </svg>\n"
    );
    svg
}

fn row(svg: &mut String, top: f64, line: &Line) {
    let middle = top + ROW / 2.0 + 4.0;
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{} <tspan fill=\"#666666\">: {}</tspan></text>",
        LEFT - 12.0,
        escape(&line.what),
        escape(line.peer)
    );
    let ratio = line.ratio();
    let far = match (ratio, line.aim) {
        (None, _) => 0.0,
        (Some(ratio), Aim::Reference) if line.unit.more_is_better() => 1.0 / ratio,
        (Some(ratio), Aim::Reference) => ratio,
        (Some(ratio), Aim::AtMost(most)) => ratio / most,
        (Some(ratio), Aim::AtLeast(least)) => least / ratio,
    };
    let length = (far * AIM).clamp(0.0, LONGEST);
    let color = match line.verdict() {
        "met" => "#3a8f5c",
        "not met" => "#d9822b",
        _ => "#a9b1b8",
    };
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" fill=\"{color}\"/>",
        top + 6.0,
        ROW - 12.0
    );
    if far * AIM > LONGEST {
        let x = LEFT + LONGEST + 4.0;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{middle}\">…</text>");
    }
    let told = match (ratio, line.aim) {
        (None, _) => "not measured".to_owned(),
        (Some(ratio), Aim::Reference) => format!("{ratio:.2}"),
        (Some(ratio), aim) => format!("{ratio:.2} ({aim})"),
    };
    let (ours, theirs) = line.medians();
    let _ = writeln!(
        svg,
        "<text x=\"{RATIO}\" y=\"{middle}\">{}</text>\n<text x=\"{FIGURES}\" y=\"{middle}\" fill=\"#666666\">{}</text>",
        escape(&told),
        escape(&format!("{ours} : {theirs}"))
    );
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Unit;

    #[test]
    fn bars_are_as_long_as_their_ratio_is_to_the_aim() {
        let line = |what: &str, ours: f64, aim| Line {
            what: what.into(),
            unit: Unit::Seconds,
            ours: ours.into(),
            peer: "another",
            theirs: 2.0.into(),
            aim,
        };
        let lines = [
            line("half <of> it", 1.0, Aim::AtMost(1.0)),
            line("twice", 4.0, Aim::AtLeast(1.0)),
            line("far", 200.0, Aim::Reference),
        ];
        let svg = draw("a & b", &lines);
        for part in [
            "a &amp; b",
            "half &lt;of&gt; it",
            &format!("width=\"{:.1}\" height=\"20\" fill=\"#3a8f5c\"", AIM / 2.0),
            &format!("width=\"{LONGEST:.1}\" height=\"20\" fill=\"#a9b1b8\""),
            "100.00</text>",
            "2.00 (≥ 1)</text>",
            "4.00 s : 2.00 s",
        ] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
    }
}
