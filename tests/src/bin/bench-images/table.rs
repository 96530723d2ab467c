//! What is printed: one line a figure, each with its aim.

use std::time::Duration;

/// The lines so far.
#[derive(Default)]
pub struct Table {
    lines: Vec<[String; 6]>,
}

impl Table {
    /// Two times, whose ratio, of the other's to ours, should be at least `aim`.
    pub fn compare(
        &mut self,
        what: impl Into<String>,
        ours: &[Duration],
        theirs: &[Duration],
        aim: f64,
    ) {
        let verdict = |ratio| [format!("ratio >= {aim}"), met(ratio >= aim)];
        self.ratio(what.into(), ours, theirs, verdict);
    }

    /// Two times whose ratio says what the machine does to both; no aim.
    pub fn reference(&mut self, what: impl Into<String>, ours: &[Duration], theirs: &[Duration]) {
        self.ratio(what.into(), ours, theirs, |_| {
            [String::new(), String::new()]
        });
    }

    fn ratio(
        &mut self,
        what: String,
        ours: &[Duration],
        theirs: &[Duration],
        verdict: impl FnOnce(f64) -> [String; 2],
    ) {
        let (ours, theirs) = (median(ours), median(theirs));
        let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
        let [aim, met] = verdict(ratio);
        let (ours, theirs) = (seconds(ours), seconds(theirs));
        self.add([what, ours, theirs, format!("{ratio:.2}"), aim, met]);
    }

    /// A line of any kind.
    pub fn add(&mut self, line: [String; 6]) {
        eprintln!("{}", line.join("  "));
        self.lines.push(line);
    }

    /// Prints all.
    pub fn print(&self) {
        let head = ["what", "caisson", "containerd", "ratio", "aim", ""].map(str::to_owned);
        let all: Vec<_> = std::iter::once(&head).chain(&self.lines).collect();
        let width = |column: usize| all.iter().map(|line| line[column].chars().count()).max();
        let widths: Vec<_> = (0..6).map(|column| width(column).unwrap_or(0)).collect();
        for line in all {
            let cells = line.iter().zip(&widths).enumerate();
            let cells: Vec<_> = cells
                .map(|(column, (cell, &width))| match column {
                    1..=3 => format!("{cell:>width$}"),
                    _ => format!("{cell:<width$}"),
                })
                .collect();
            println!("{}", cells.join("  ").trim_end());
        }
    }
}

/// How a line ends.
pub fn met(is: bool) -> String {
    if is { "met" } else { "not met" }.to_owned()
}

/// The middle one.
pub fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// For people.
pub fn seconds(time: Duration) -> String {
    match time.as_millis() {
        0..1000 => format!("{} ms", time.as_millis()),
        _ => format!("{:.2} s", time.as_secs_f64()),
    }
}
