//! The `caisson` command: the habits of podman and nerdctl, on the same code path as a kubelet.
//!
//! Every command but `serve`, `doctor` and `config` is a client of the daemon's socket, by CRI where CRI has the call and by
//! `caisson.cli.v1` where it has not.

mod client;
mod containers;
mod credentials;
mod exec;
mod images;
mod inspect;
mod logs;
mod options;
mod pods;
mod run;
mod session;
mod snapshot;
mod stats;
mod store;
mod table;
mod terminal;
mod timeline;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use client::CliError;

/// The exit status of `caisson` itself failing, where a command passes a container's status through.
const OWN_FAILURE: u8 = 125;

/// Isolation by default: every pod in a KVM microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "caisson", version, about, max_term_width = 100)]
struct Cli {
    /// The configuration file; a missing default file means the defaults.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The daemon's socket; the configuration's if it is not given.
    #[arg(long, global = true, value_name = "PATH", env = "CAISSON_SOCKET")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: CRI on a unix socket.
    Serve,
    /// Run a command in a new pod.
    Run(Box<run::RunArgs>),
    /// Run another command in a running container.
    Exec(exec::ExecArgs),
    /// List containers.
    Ps(containers::PsArgs),
    /// List pods, and why those that are not ready are not.
    Pods(pods::PodsArgs),
    /// Show what pods use: inside, and of the host's memory, private and shared.
    Stats(stats::StatsArgs),
    /// Show a container's output.
    Logs(logs::LogsArgs),
    /// Stop containers.
    Stop(containers::StopArgs),
    /// Remove containers, and the pods that `run` made for them.
    Rm(containers::RmArgs),
    /// Pull images from a registry.
    Pull(images::PullArgs),
    /// Take in an image from an OCI layout directory, or an OCI or docker archive.
    Load(images::LoadArgs),
    /// List images.
    Images(images::ImagesArgs),
    /// Remove images.
    Rmi(images::RmiArgs),
    /// Write images to an archive that `caisson load`, docker, podman and ctr take in.
    ///
    /// The archive has the layers uncompressed: the image ID stays what it is, the manifest's digest does not.
    Save(store::SaveArgs),
    /// Remove images that have no name or, with --all, that no container uses.
    Prune(store::PruneArgs),
    /// Show all that is known of pods, containers or images, as JSON.
    Inspect(inspect::InspectArgs),
    /// Write a running pod, its memory and its files, to a directory, and end it.
    Snapshot(snapshot::SnapshotArgs),
    /// Let a pod go on that was written to a directory.
    Restore(snapshot::RestoreArgs),
    /// Show how long each step of a pod's start took.
    Timeline(timeline::TimelineArgs),
    /// Say whether this machine can run microVM pods, and what is missing; or how a pod is confined.
    Doctor(DoctorArgs),
    /// Show the configuration.
    Config(ConfigArgs),
}

#[derive(Debug, Args)]
struct DoctorArgs {
    /// Print only the line on KVM; the exit status is 0 if KVM works.
    #[arg(long)]
    kvm_works: bool,
    /// Look at this running pod's process instead, as the kernel shows it: a pod's or container's name or ID.
    #[arg(long, value_name = "POD", conflicts_with = "kvm_works")]
    pod: Option<String>,
}

#[derive(Debug, Args)]
struct ConfigArgs {
    #[command(subcommand)]
    what: ConfigWhat,
}

#[derive(Debug, Subcommand)]
enum ConfigWhat {
    /// Print every key with its meaning and default, as a file to start from.
    Default,
}

/// Parses the arguments and runs the command; a failure is one sentence on standard error.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let own_failure = match cli.command {
        Command::Run(_) | Command::Exec(_) => OWN_FAILURE,
        _ => 1,
    };
    if matches!(cli.command, Command::Serve) {
        crate::daemon::keep_freed_memory();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("caisson: cannot start its event loop: {error}");
            return ExitCode::from(own_failure);
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // A read of standard input cannot be cancelled; do not wait for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(CliError::Quiet(code)) => ExitCode::from(code),
        Err(error) => {
            eprintln!("caisson: {error}");
            ExitCode::from(own_failure)
        }
    }
}

async fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    let config = || crate::config::Config::load(cli.config.as_deref());
    let connect = || {
        let socket = match &cli.socket {
            Some(socket) => socket.clone(),
            None => config()?.socket,
        };
        Ok::<_, CliError>(client::Client::new(&socket))
    };
    match cli.command {
        Command::Serve => crate::daemon::serve(config()?)
            .await
            .map(|()| ExitCode::SUCCESS)
            .map_err(CliError::other),
        Command::Run(args) => run::run(&connect()?, *args).await,
        Command::Exec(args) => exec::exec(&connect()?, args).await,
        Command::Ps(args) => containers::ps(&connect()?, args).await,
        Command::Pods(args) => pods::pods(&connect()?, args).await,
        Command::Stats(args) => stats::stats(&connect()?, args).await,
        Command::Logs(args) => logs::logs(&connect()?, args).await,
        Command::Stop(args) => containers::stop(&connect()?, args).await,
        Command::Rm(args) => containers::rm(&connect()?, args).await,
        Command::Pull(args) => images::pull(&connect()?, args).await,
        Command::Load(args) => images::load(&connect()?, args).await,
        Command::Images(args) => images::images(&connect()?, args).await,
        Command::Rmi(args) => images::rmi(&connect()?, args).await,
        Command::Save(args) => store::save(&connect()?, args).await,
        Command::Prune(args) => store::prune(&connect()?, args).await,
        Command::Inspect(args) => inspect::inspect(&connect()?, args).await,
        Command::Snapshot(args) => snapshot::snapshot(&connect()?, args).await,
        Command::Restore(args) => snapshot::restore(&connect()?, args).await,
        Command::Timeline(args) => timeline::timeline(&connect()?, args).await,
        Command::Doctor(DoctorArgs { pod: Some(pod), .. }) => {
            inspect::doctor(&connect()?, &pod).await
        }
        Command::Doctor(args) => Ok(crate::doctor::doctor(&config()?, args.kvm_works).await),
        Command::Config(ConfigArgs {
            what: ConfigWhat::Default,
        }) => {
            print!("{}", crate::config::default_file());
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_containers_own_options_are_left_to_it() {
        let cli = Cli::parse_from(["caisson", "run", "--rm", "busybox", "ls", "-l", "--rm"]);
        let Command::Run(args) = cli.command else {
            panic!("another command");
        };
        assert_eq!(args.command, ["ls", "-l", "--rm"]);
    }
}
