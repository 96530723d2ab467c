//! The client of `scripts/bench start`: what a pod costs on Caisson and on its peers, measured in turn. Prints a table in
//! Markdown and draws it.

mod boot;
mod chart;
mod figures;
mod memory;
mod network;
mod pods;
mod scale;

use std::path::PathBuf;

use caisson_tests::runtime::{Pod, Result, Runtime, Task};
use clap::{Parser, ValueEnum};
use figures::{Aim, Report};

/// What a container says first, and then does.
const SCRIPT: &str = "echo here; exec sleep 1000000";

/// What is measured, and on what.
#[derive(Debug, Parser)]
struct Options {
    /// Caisson's socket.
    #[arg(long)]
    caisson: PathBuf,
    /// containerd's socket.
    #[arg(long)]
    containerd: PathBuf,
    /// The image, which both have.
    #[arg(long)]
    image: String,
    /// The directory with Caisson's programs, kernel and initramfs.
    #[arg(long)]
    build: PathBuf,
    /// A directory for the pods' logs.
    #[arg(long)]
    logs: PathBuf,
    /// A directory with iperf3 and its libraries.
    #[arg(long)]
    iperf: PathBuf,
    /// The host's address for Caisson's pods, and for containerd's.
    #[arg(long, num_args = 2)]
    hosts: Vec<String>,
    /// A firecracker program, to boot beside Caisson's VMM.
    #[arg(long)]
    firecracker: Option<PathBuf>,
    /// What to measure.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// How Caisson's pods start, which says what that is held against.
    #[arg(long)]
    start: Start,
    /// How often single things are measured.
    #[arg(long)]
    rounds: usize,
    /// Pods of the part `many`.
    #[arg(long)]
    pods: usize,
    /// Pods of the part `density`.
    #[arg(long)]
    density: usize,
    /// Where the chart goes.
    #[arg(long)]
    chart: PathBuf,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    Pod,
    Boot,
    Memory,
    Many,
    Network,
    Density,
}

/// How a pod starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Start {
    /// Its kernel boots.
    Cold,
    /// It is a clone of a template.
    Clone,
    /// It is a clone that was started before.
    Ready,
}

impl Start {
    /// What the time to the first output may be of containerd's with runc.
    fn aim(self) -> Aim {
        match self {
            Self::Cold => Aim::AtMost(1.2),
            Self::Clone | Self::Ready => Aim::AtMost(0.7),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Cold => "cold boot",
            Self::Clone => "from a clone",
            Self::Ready => "from a clone that waits",
        }
    }
}

struct Bench {
    options: Options,
    caisson: Runtime,
    runc: Runtime,
    crun: Runtime,
    report: Report,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    std::fs::create_dir_all(&options.logs)?;
    let peer = |name| Runtime::new(name, &options.containerd, &options.logs);
    let mut crun = peer("containerd-crun");
    crun.handler = "crun".to_owned();
    let mut bench = Bench {
        caisson: Runtime::new("caisson", &options.caisson, &options.logs),
        runc: peer("containerd-runc"),
        crun,
        report: Report::default(),
        options,
    };
    let mut failed = false;
    for part in bench.options.only.clone() {
        let done = match part {
            Part::Pod => bench.pod().await,
            Part::Boot => bench.boot(),
            Part::Memory => bench.memory().await,
            Part::Many => bench.many().await,
            Part::Network => bench.network().await,
            Part::Density => bench.density().await,
        };
        // The others are worth having all the same.
        if let Err(error) = done {
            failed = true;
            let note = format!("Not measured to the end: {part:?}: {error}");
            bench.report.note(note);
        }
        bench.draw()?;
    }
    bench.report.finish();
    match failed {
        true => Err("not all could be measured; see above".into()),
        false => Ok(()),
    }
}

impl Bench {
    /// Draws what is known so far: a run that breaks off leaves that much.
    fn draw(&self) -> Result<()> {
        let title = format!("What a pod costs, {}", self.options.start.words());
        let chart = chart::draw(&title, &self.report.lines);
        Ok(std::fs::write(&self.options.chart, chart)?)
    }

    /// A container that says something and sleeps.
    fn task(&self) -> Task<'_> {
        Task {
            image: &self.options.image,
            script: Some(SCRIPT),
            ..Task::default()
        }
    }
}

/// Removes a pod of which something failed, as well as that goes.
async fn give_up(runtime: &Runtime, pod: Pod) {
    let id = pod.id.clone();
    if let Err(error) = runtime.remove(pod).await {
        eprintln!("{}: the pod {id} is left: {error}", runtime.name);
    }
}
