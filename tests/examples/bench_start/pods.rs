//! One pod after the other: its start, a command in it, its end.

use std::process::Command;
use std::time::Instant;

use caisson_tests::runtime::{Container, Pod, Result, Runtime, Task};

use crate::figures::{Aim, Line, Samples, Unit};
use crate::{Bench, give_up};

/// Commands in each container.
const EXECS: usize = 5;

/// What is measured of each pod, in the order of the table.
const STEPS: [&str; 5] = [
    "RunPodSandbox to first output",
    "of it RunPodSandbox",
    "of it CreateContainer to first output",
    "exec round trip",
    "Stop and Remove of container and pod",
];
/// The places of those that have an aim.
const START: usize = 0;
const EXEC: usize = 3;
const END: usize = 4;

/// The seconds of each step.
type Times = [Vec<f64>; STEPS.len()];

/// A pod with a container that has said something.
pub struct Running {
    pub pod: Pod,
    pub container: Container,
    /// Seconds until the sandbox was there, and until the container said something.
    pub sandbox: f64,
    pub output: f64,
}

/// Starts a pod and a container, up to the container's first output.
pub async fn start(runtime: &Runtime, task: Task<'_>) -> Result<Running> {
    let begun = Instant::now();
    let pod = runtime.pod(0).await?;
    let sandbox = begun.elapsed().as_secs_f64();
    let started = async {
        let container = runtime.run(&pod, task).await?;
        runtime.first_output(&container).await?;
        Ok(container)
    };
    match started.await {
        Ok(container) => Ok(Running {
            pod,
            container,
            sandbox,
            output: begun.elapsed().as_secs_f64(),
        }),
        Err(error) => {
            give_up(runtime, pod).await;
            Err(error)
        }
    }
}

/// The same; a pod that fails is started once more, and the second part tells why.
pub async fn start_twice(runtime: &Runtime, task: Task<'_>) -> Result<(Running, Option<String>)> {
    twice(runtime, async || start(runtime, task).await).await
}

/// Tries something with a pod once more if it fails; the second part tells why.
async fn twice<T>(
    runtime: &Runtime,
    attempt: impl AsyncFn() -> Result<T>,
) -> Result<(T, Option<String>)> {
    match attempt().await {
        Ok(done) => Ok((done, None)),
        Err(error) => {
            let name = runtime.name;
            let note = format!("A pod of {name} was started once more after: {error}");
            Ok((attempt().await?, Some(note)))
        }
    }
}

impl Bench {
    /// Start, exec and end of pods, one at a time, in turn.
    pub async fn pod(&mut self) -> Result<()> {
        let mut samples = vec![[(); 3].map(|()| Samples::default()); STEPS.len()];
        let mut notes = Vec::new();
        let mut timeline = String::new();
        let peers = [&self.caisson, &self.runc, &self.crun];
        for round in 0..=self.options.rounds {
            for turn in 0..peers.len() {
                let number = (round + turn) % peers.len();
                let runtime = peers[number];
                let attempt = async || self.life(runtime).await;
                let ((times, told), note) = twice(runtime, attempt).await?;
                notes.extend(note);
                timeline = told.unwrap_or(timeline);
                eprintln!(
                    "{}: {:.2} s to the first output",
                    runtime.name, times[START][0]
                );
                // The first pods of all find nothing in any cache.
                if round > 0 {
                    for (step, times) in times.into_iter().enumerate() {
                        times
                            .iter()
                            .for_each(|&time| samples[step][number].push(time));
                    }
                }
            }
        }
        for (step, [ours, runc, crun]) in samples.into_iter().enumerate() {
            let aim = match step {
                START => self.options.start.aim(),
                EXEC | END => Aim::AtMost(0.5),
                _ => Aim::Reference,
            };
            let what = match step {
                START => format!("{}, {}", STEPS[step], self.options.start.words()),
                _ => STEPS[step].to_owned(),
            };
            let peers = [
                ("containerd with runc", runc, aim),
                ("containerd with crun", crun, Aim::Reference),
            ];
            // A part of a time needs one peer to compare it with.
            let count = if matches!(aim, Aim::Reference) { 1 } else { 2 };
            for (peer, theirs, aim) in peers.into_iter().take(count) {
                self.report.line(Line {
                    what: what.clone(),
                    unit: Unit::Seconds,
                    ours: ours.clone(),
                    peer,
                    theirs,
                    aim,
                });
            }
        }
        notes.into_iter().for_each(|note| self.report.note(note));
        self.report.note(format!(
            "Where the time of Caisson's last pod went:\n\n```\n{timeline}\n```"
        ));
        Ok(())
    }

    /// A pod from its start to its end: the times of each step and, of Caisson's, the steps of its start.
    async fn life(&self, runtime: &Runtime) -> Result<(Times, Option<String>)> {
        let running = start(runtime, self.task()).await?;
        let lived = async {
            let ours = std::ptr::eq(runtime, &self.caisson);
            let told = ours.then(|| self.timeline(&running.container));
            Ok((execs(runtime, &running.container).await?, told.transpose()?))
        };
        let (execs, told) = match lived.await {
            Ok(lived) => lived,
            Err(error) => {
                give_up(runtime, running.pod).await;
                return Err(error);
            }
        };
        let begun = Instant::now();
        runtime.stop_container(&running.container).await?;
        runtime.remove_container(running.container).await?;
        runtime.remove(running.pod).await?;
        let end = begun.elapsed().as_secs_f64();
        let (sandbox, output) = (running.sandbox, running.output);
        let container = vec![output - sandbox];
        let times = [vec![output], vec![sandbox], container, execs, vec![end]];
        Ok((times, told))
    }

    /// The steps of a start, as `caisson timeline` shows them.
    fn timeline(&self, container: &Container) -> Result<String> {
        let told = Command::new(self.options.build.join("caisson"))
            .arg("--socket")
            .arg(&self.options.caisson)
            .args(["timeline", &container.id])
            .output()?;
        if !told.status.success() {
            let said = String::from_utf8_lossy(&told.stderr);
            return Err(format!("caisson timeline: {}", said.trim()).into());
        }
        Ok(String::from_utf8(told.stdout)?.trim_end().to_owned())
    }
}

/// Runs a command several times; the seconds that each took.
async fn execs(runtime: &Runtime, container: &Container) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..EXECS {
        let begun = Instant::now();
        let said = runtime.exec_command(container, &["echo", "well"]).await?;
        times.push(begun.elapsed().as_secs_f64());
        if said != "well" {
            return Err(format!("{}: echo well said {said:?}", runtime.name).into());
        }
    }
    Ok(times)
}
