//! The client of `scripts/bench cri`: the same pods and containers on two runtimes, then the same calls to each, in
//! turn. Prints tables in Markdown.

mod calls;
mod load;
mod peer;
mod watchers;

use std::path::PathBuf;

use caisson_tests::runtime::Result;
use clap::Parser;
use peer::{Peer, Plan};

/// What is measured, and on what.
#[derive(Debug, Parser)]
struct Options {
    /// Caisson's socket.
    #[arg(long)]
    caisson: PathBuf,
    /// The socket of the runtime that it is compared with.
    #[arg(long)]
    other: Option<PathBuf>,
    /// The image, which both have.
    #[arg(long)]
    image: String,
    /// Containers on each runtime.
    #[arg(long, default_value_t = 500)]
    containers: usize,
    /// Pods on each runtime.
    #[arg(long, default_value_t = 10)]
    pods: usize,
    /// Those of Caisson's pods that are in microVMs; the others are on the host.
    #[arg(long, default_value_t = 2)]
    microvms: usize,
    /// How often each call is made on each runtime.
    #[arg(long, default_value_t = 200)]
    calls: usize,
    /// How often each call for statistics is made, which takes far longer.
    #[arg(long, default_value_t = 20)]
    stats_calls: usize,
    /// ExecSync calls at the same time.
    #[arg(long, default_value_t = 50)]
    execs: usize,
    /// Watchers of events.
    #[arg(long, default_value_t = 200)]
    watchers: usize,
    /// Leave everything as it is at the end.
    #[arg(long)]
    leave: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let plan = |microvms| Plan {
        image: options.image.clone(),
        pods: options.pods,
        containers: options.containers,
        microvms,
    };
    let caisson = Peer::new("Caisson", &options.caisson, plan(Some(options.microvms)))?;
    let other = options
        .other
        .as_deref()
        .map(|socket| Peer::new("containerd", socket, plan(None)))
        .transpose()?;
    let mut peers: Vec<Peer> = [Some(caisson), other].into_iter().flatten().collect();
    for peer in &mut peers {
        peer.fill().await?;
    }

    println!(
        "\n### {} containers in {} pods on each runtime ({} of Caisson's pods in microVMs), {} calls each, {} of statistics, in turn\n",
        options.containers, options.pods, options.microvms, options.calls, options.stats_calls
    );
    calls::compare(&peers, options.calls, options.stats_calls).await?;
    println!(
        "\n### {} ExecSync calls at the same time, each in another container\n",
        options.execs
    );
    for peer in &peers {
        load::execs(peer, options.execs).await;
    }
    println!("\n### {} watchers of events\n", options.watchers);
    let watched = watchers::watch(&peers[0], &options.caisson, options.watchers).await;
    if !options.leave {
        for peer in &peers {
            peer.empty().await;
        }
    }
    watched
}
