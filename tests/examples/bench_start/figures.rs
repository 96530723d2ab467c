//! Figures, what they are held against, and the table that tells of both.

use std::fmt::{Display, Formatter};
use std::io::Write as _;

/// What a figure counts.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    Seconds,
    Mebibytes,
    PodsPerMinute,
    GigabitsPerSecond,
}

impl Unit {
    /// Whether one wants much of it.
    pub fn more_is_better(self) -> bool {
        match self {
            Self::Seconds | Self::Mebibytes => false,
            Self::PodsPerMinute | Self::GigabitsPerSecond => true,
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 1.0 => format!("{:.0} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::PodsPerMinute => format!("{value:.1} pods/min"),
            Self::GigabitsPerSecond => format!("{value:.2} Gbit/s"),
        }
    }
}

/// All that was measured of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// One more.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value within which this part of all is: nearest rank. `None` if there is none.
    pub fn within(&self, part: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied()
    }

    /// The middle one, or what is between the middle two.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let half = sorted.len() / 2;
        let upper = *sorted.get(half)?;
        match sorted.len() % 2 {
            0 => Some(f64::midpoint(sorted[half - 1], upper)),
            _ => Some(upper),
        }
    }

    /// The median and, where there are several, the 10th and the 90th percentile.
    fn show(&self, unit: Unit) -> String {
        match (self.median(), self.within(0.1), self.within(0.9)) {
            (Some(only), ..) if self.0.len() == 1 => unit.show(only),
            (Some(median), Some(low), Some(high)) => {
                let (low, high) = (unit.show(low), unit.show(high));
                format!("{} ({low} .. {high})", unit.show(median))
            }
            _ => "–".to_owned(),
        }
    }
}

impl From<f64> for Samples {
    fn from(value: f64) -> Self {
        Self(vec![value])
    }
}

/// What a ratio should be.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
    /// Nothing: the line is there to compare with.
    Reference,
}

impl Display for Aim {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(most) => write!(formatter, "≤ {most}"),
            Self::AtLeast(least) => write!(formatter, "≥ {least}"),
            Self::Reference => write!(formatter, "–"),
        }
    }
}

/// A line of the table: Caisson's figure beside another one.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was measured.
    pub what: String,
    /// In what.
    pub unit: Unit,
    /// Caisson's figures.
    pub ours: Samples,
    /// Whose figures it is held against, or what limit.
    pub peer: &'static str,
    /// Those figures.
    pub theirs: Samples,
    /// What the ratio of the medians should be.
    pub aim: Aim,
}

impl Line {
    /// Caisson's median divided by the other; `None` if one of them is missing.
    pub fn ratio(&self) -> Option<f64> {
        let ratio = self.ours.median()? / self.theirs.median()?;
        ratio.is_finite().then_some(ratio)
    }

    /// Both medians, in words.
    pub fn medians(&self) -> (String, String) {
        let show = |samples: &Samples| {
            let median = samples.median();
            median.map_or("–".to_owned(), |median| self.unit.show(median))
        };
        (show(&self.ours), show(&self.theirs))
    }

    /// How the line ends.
    pub fn verdict(&self) -> &'static str {
        let met = match (self.ratio(), self.aim) {
            (None, _) => return "not measured",
            (_, Aim::Reference) => return "reference",
            (Some(ratio), Aim::AtMost(most)) => ratio <= most,
            (Some(ratio), Aim::AtLeast(least)) => ratio >= least,
        };
        if met { "met" } else { "not met" }
    }
}

impl Display for Line {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        let ratio = self
            .ratio()
            .map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
        let (ours, theirs) = (self.ours.show(self.unit), self.theirs.show(self.unit));
        let Self {
            what, peer, aim, ..
        } = self;
        let verdict = self.verdict();
        write!(
            formatter,
            "| {what} | {ours} | {peer} | {theirs} | {ratio} | {aim} | {verdict} |"
        )
    }
}

/// What is printed: the table, each line as soon as it is known, and notes below it.
#[derive(Default)]
pub struct Report {
    /// The lines so far.
    pub lines: Vec<Line>,
    notes: Vec<String>,
}

impl Report {
    /// Prints a line.
    pub fn line(&mut self, line: Line) {
        if self.lines.is_empty() {
            println!("| what | Caisson | beside | its figure | ratio | aim | |");
            println!("|---|---|---|---|---|---|---|");
        }
        println!("{line}");
        // Whoever reads a pipe reads it now, and a run that breaks off has told what it knew.
        let _ = std::io::stdout().flush();
        self.lines.push(line);
    }

    /// Keeps a note for the end, and says it now.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Prints the notes.
    pub fn finish(&self) {
        for note in &self.notes {
            println!("\n{note}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(ours: &[f64], theirs: &[f64], aim: Aim) -> Line {
        Line {
            what: "a thing".into(),
            unit: Unit::Seconds,
            ours: Samples(ours.to_vec()),
            peer: "another",
            theirs: Samples(theirs.to_vec()),
            aim,
        }
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let samples = Samples((1..=10).rev().map(f64::from).collect());
        let found = [0.0, 0.1, 0.5, 0.9, 1.0].map(|part| samples.within(part));
        assert_eq!(found, [1.0, 1.0, 5.0, 9.0, 10.0].map(Some));
        assert_eq!(samples.median(), Some(5.5));
        assert_eq!(Samples(vec![3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(Samples::default().median(), None);
    }

    #[test]
    fn a_line_ends_with_its_verdict() {
        let at_most = |ours: f64| line(&[ours], &[2.0], Aim::AtMost(0.5)).verdict();
        assert_eq!([at_most(1.0), at_most(1.01)], ["met", "not met"]);
        let at_least = |ours: f64| line(&[ours], &[2.0], Aim::AtLeast(0.5)).verdict();
        assert_eq!([at_least(1.0), at_least(0.99)], ["met", "not met"]);
        let shown = line(&[0.2, 0.1, 1.5], &[2.0], Aim::Reference).to_string();
        assert_eq!(
            shown,
            "| a thing | 200 ms (100 ms .. 1.50 s) | another | 2.00 s | 0.10 | – | reference |"
        );
    }

    #[test]
    fn what_was_not_measured_is_never_met() {
        for (ours, theirs) in [(&[][..], &[1.0][..]), (&[1.0], &[]), (&[1.0], &[0.0])] {
            let line = line(ours, theirs, Aim::AtMost(9.0));
            assert_eq!(line.verdict(), "not measured", "{line}");
        }
    }
}
