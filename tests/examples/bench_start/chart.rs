//! The table as a bar chart, in SVG: each line a bar, and one mark that all aims share.

use std::fmt::Write as _;

use crate::figures::{Aim, Line};

const WIDTH: f64 = 960.0;
const ROW: f64 = 34.0;
const TOP: f64 = 74.0;
/// Where bars begin, and how far one is that just meets its aim.
const LEFT: f64 = 470.0;
const AIM: f64 = 150.0;
/// Bars end here; a longer one has an open end.
const LONGEST: f64 = 330.0;

/// Draws a chart. A bar is as long as the ratio is to its aim, so that what ends left of the mark is met; where more is
/// better the ratio is turned over.
pub fn draw(title: &str, lines: &[Line]) -> String {
    let height = TOP + ROW * lines.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"17\" font-weight=\"bold\" fill=\"#222222\">{}</text>\n",
        escape(title)
    );
    let mark = LEFT + AIM;
    let bottom = height - 34.0;
    for (index, line) in lines.iter().enumerate() {
        row(&mut svg, TOP + ROW * index as f64, line);
    }
    // Writing to a string cannot fail.
    let _ = write!(
        svg,
        "<line x1=\"{mark}\" y1=\"{TOP}\" x2=\"{mark}\" y2=\"{bottom}\" stroke=\"#222222\" stroke-dasharray=\"4 3\"/>\n\
         <text x=\"{mark}\" y=\"{}\" text-anchor=\"middle\" fill=\"#222222\">the aim: shorter is better</text>\n\
         <text x=\"16\" y=\"{}\" fill=\"#666666\">green: met, orange: not met, grey: no aim, the mark being the other's figure</text>\n\
         </svg>\n",
        TOP - 10.0,
        height - 12.0
    );
    svg
}

fn row(svg: &mut String, top: f64, line: &Line) {
    let middle = top + ROW / 2.0 + 4.0;
    let label = format!("{}, beside {}", line.what, line.peer);
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\" fill=\"#222222\">{}</text>",
        LEFT - 10.0,
        escape(&label)
    );
    let ratio = line.ratio();
    let far = match (ratio, line.aim) {
        (None, _) => 0.0,
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
    let more = if far * AIM > LONGEST { "… " } else { "" };
    let told = match (ratio, line.aim) {
        (None, _) => "not measured".to_owned(),
        (Some(ratio), Aim::Reference) => format!("{more}{ratio:.2}"),
        (Some(ratio), aim) => format!("{more}{ratio:.2} (aim {aim})"),
    };
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{middle}\" fill=\"#222222\">{}</text>",
        LEFT + length.max(if far > 0.9 && far < 1.1 { AIM } else { 0.0 }) + 8.0,
        escape(&told)
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
            "half &lt;of&gt; it, beside another",
            &format!("width=\"{:.1}\" height=\"22\" fill=\"#3a8f5c\"", AIM / 2.0),
            &format!("width=\"{LONGEST:.1}\" height=\"22\" fill=\"#a9b1b8\""),
            "… 100.00",
            "2.00 (aim ≥ 1)",
        ] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
    }
}
