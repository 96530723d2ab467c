//! Many pods: how fast they start side by side, and whether the last start takes longer than the first.

use std::time::Instant;

use caisson_tests::runtime::{Result, Runtime};
use futures::StreamExt;

use crate::figures::{Aim, Line, Samples, Unit};
use crate::pods::{Running, start_twice};
use crate::{Bench, give_up};

/// Pods that are started at the same time.
const WIDTH: usize = 8;
/// Pods of the part `density` that are measured at each end, one after the other.
const EDGE: usize = 5;

impl Bench {
    /// Many pods a few at a time, on Caisson and on containerd with runc in turn.
    pub async fn many(&mut self) -> Result<()> {
        let count = self.options.pods;
        let mut rates = [Samples::default(), Samples::default()];
        let rounds = self.options.rounds.div_ceil(5);
        for round in 0..rounds {
            for number in [round % 2, (round + 1) % 2] {
                let runtime = [&self.caisson, &self.runc][number];
                let begun = Instant::now();
                let (pods, notes) = self.wave(runtime, count).await;
                let minutes = begun.elapsed().as_secs_f64() / 60.0;
                let started = pods.len();
                empty(runtime, pods).await;
                notes.into_iter().for_each(|note| self.report.note(note));
                let runtime = [&self.caisson, &self.runc][number];
                eprintln!(
                    "{}: {started} pods in {:.1} s",
                    runtime.name,
                    minutes * 60.0
                );
                if started < count {
                    let name = runtime.name;
                    return Err(format!("{name}: {started} of {count} pods were started").into());
                }
                rates[number].push(count as f64 / minutes);
            }
        }
        let [ours, theirs] = rates;
        self.report.line(Line {
            what: format!("{count} pods, {WIDTH} at a time"),
            unit: Unit::PodsPerMinute,
            ours,
            peer: "containerd with runc",
            theirs,
            aim: Aim::AtLeast(1.0),
        });
        Ok(())
    }

    /// Whether the start of the last of many pods, the others still being there, takes as long as that of the first.
    pub async fn density(&mut self) -> Result<()> {
        let count = self.options.density;
        if count < 3 * EDGE {
            return Err(format!(
                "the density of {count} pods tells nothing; take {} or more",
                3 * EDGE
            )
            .into());
        }
        let mut pods = Vec::new();
        // As everywhere, the first of all does not count.
        let first = self.edge(&mut pods, 1 + EDGE).await;
        let between = match &first {
            Ok(_) => self.wave(&self.caisson, count - pods.len() - EDGE).await,
            Err(_) => Default::default(),
        };
        pods.extend(between.0);
        between
            .1
            .into_iter()
            .for_each(|note| self.report.note(note));
        let last = match &first {
            Ok(_) => self.edge(&mut pods, EDGE).await,
            Err(_) => Ok(Vec::new()),
        };
        let reached = pods.len();
        empty(&self.caisson, pods).await;
        let (first, last) = (first?, last?);
        if reached < count {
            return Err(format!("{reached} of {count} pods were started").into());
        }
        let samples = |times: &[f64]| {
            let mut all = Samples::default();
            times.iter().for_each(|&time| all.push(time));
            all
        };
        self.report.line(Line {
            what: format!("start of pods {} to {count}", count - EDGE + 1),
            unit: Unit::Seconds,
            ours: samples(&last),
            peer: "Caisson's pods 2 to 6",
            theirs: samples(&first[1..]),
            aim: Aim::AtMost(1.2),
        });
        Ok(())
    }

    /// Starts so many pods one after the other; the seconds of each to its first output.
    async fn edge(&mut self, pods: &mut Vec<Running>, count: usize) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for _ in 0..count {
            let (running, note) = start_twice(&self.caisson, self.task()).await?;
            note.into_iter().for_each(|note| self.report.note(note));
            eprintln!("caisson: pod {}: {:.2} s", pods.len() + 1, running.output);
            times.push(running.output);
            pods.push(running);
        }
        Ok(times)
    }

    /// Starts so many pods, some at a time: those that run, and what is to be told of the others.
    pub async fn wave(&self, runtime: &Runtime, count: usize) -> (Vec<Running>, Vec<String>) {
        let (mut pods, mut notes) = (Vec::new(), Vec::new());
        let starts = (0..count).map(|_| start_twice(runtime, self.task()));
        let mut starts = futures::stream::iter(starts).buffer_unordered(WIDTH);
        while let Some(started) = starts.next().await {
            match started {
                Ok((running, note)) => {
                    let seconds = running.output;
                    pods.push(running);
                    notes.extend(note);
                    if pods.len().is_multiple_of(10) {
                        let (name, count) = (runtime.name, pods.len());
                        eprintln!(
                            "{name}: {count} more pods run, the last one after {seconds:.2} s"
                        );
                    }
                }
                Err(error) => notes.push(format!("A pod of {}: {error}", runtime.name)),
            }
        }
        (pods, notes)
    }
}

/// Removes pods.
pub async fn empty(runtime: &Runtime, pods: Vec<Running>) {
    let removals = pods
        .into_iter()
        .map(|running| give_up(runtime, running.pod));
    let removed = futures::stream::iter(removals).buffer_unordered(WIDTH);
    removed.collect::<()>().await;
}
