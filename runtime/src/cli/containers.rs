//! `caisson ps`, `stop` and `rm`.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_proto::cri;
use clap::Args;
use cri::ContainerState;

use super::client::{self, CliError, Client};
use super::table::Table;

/// Where the logs of containers that `caisson run` makes are kept, until `caisson rm`.
pub const LOG_ROOT: &str = "/var/log/caisson";

/// The arguments of `caisson ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that do not run.
    #[arg(short, long)]
    all: bool,
    /// Only IDs.
    #[arg(short, long)]
    quiet: bool,
}

/// The arguments of `caisson stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds from the stop signal to the kill.
    #[arg(short, long, default_value_t = 10)]
    time: u32,
    /// Names or IDs.
    #[arg(required = true)]
    containers: Vec<String>,
}

/// The arguments of `caisson rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Also those that run.
    #[arg(short, long)]
    force: bool,
    /// Names or IDs.
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Lists containers.
pub async fn ps(client: &Client, args: PsArgs) -> Result<ExitCode, CliError> {
    let mut containers = client
        .runtime
        .clone()
        .list_containers(cri::ListContainersRequest { filter: None })
        .await?
        .into_inner()
        .containers;
    containers.retain(|c| args.all || c.state() == ContainerState::ContainerRunning);
    containers.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    if args.quiet {
        for container in &containers {
            println!("{}", container.id);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["CONTAINER ID", "IMAGE", "CREATED", "STATUS", "POD", "NAME"]);
    for container in &containers {
        table.row(vec![
            client::short(&container.id).to_owned(),
            image(container),
            ago(container.created_at),
            status(client, container).await,
            client::short(&container.pod_sandbox_id).to_owned(),
            container
                .metadata
                .as_ref()
                .map(|m| m.name.clone())
                .unwrap_or_default(),
        ]);
    }
    table.print();
    Ok(ExitCode::SUCCESS)
}

/// Stops containers; a pod that `caisson run` made stops with its container.
pub async fn stop(client: &Client, args: StopArgs) -> Result<ExitCode, CliError> {
    for meant in &args.containers {
        let container = client.find(meant).await?;
        let request = cri::StopContainerRequest {
            container_id: container.id.clone(),
            timeout: args.time.into(),
        };
        client.runtime.clone().stop_container(request).await?;
        if client::is_own(&container) {
            stop_pod(client, &container.pod_sandbox_id).await?;
        }
        println!("{meant}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes containers; a pod that `caisson run` made goes with its container.
pub async fn rm(client: &Client, args: RmArgs) -> Result<ExitCode, CliError> {
    for meant in &args.containers {
        let container = client.find(meant).await?;
        if container.state() == ContainerState::ContainerRunning && !args.force {
            return Err(CliError::Usage(format!(
                "container {meant} is running; stop it first, or use `caisson rm --force`"
            )));
        }
        if client::is_own(&container) {
            remove_pod(client, &container.pod_sandbox_id).await?;
        } else {
            let request = cri::RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            client.runtime.clone().remove_container(request).await?;
        }
        println!("{meant}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops a pod.
pub async fn stop_pod(client: &Client, pod: &str) -> Result<(), CliError> {
    let request = cri::StopPodSandboxRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    client.runtime.clone().stop_pod_sandbox(request).await?;
    Ok(())
}

/// Stops and removes a pod that `caisson run` made, with its logs.
pub async fn remove_pod(client: &Client, pod: &str) -> Result<(), CliError> {
    let mut runtime = client.runtime.clone();
    let logs = log_directory(client, pod).await;
    stop_pod(client, pod).await?;
    let request = cri::RemovePodSandboxRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    runtime.remove_pod_sandbox(request).await?;
    if let Some(directory) = logs {
        match std::fs::remove_dir_all(&directory) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                return Err(CliError::Io {
                    what: format!("the logs in {directory} cannot be removed"),
                    cause,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where the pod's containers log, if that is a directory of ours to remove.
async fn log_directory(client: &Client, pod: &str) -> Option<String> {
    let filter = cri::ContainerFilter {
        pod_sandbox_id: pod.to_owned(),
        ..cri::ContainerFilter::default()
    };
    let request = cri::ListContainersRequest {
        filter: Some(filter),
    };
    let mut runtime = client.runtime.clone();
    let containers = runtime.list_containers(request).await.ok()?.into_inner();
    let request = cri::ContainerStatusRequest {
        container_id: containers.containers.first()?.id.clone(),
        verbose: false,
    };
    let status = runtime.container_status(request).await.ok()?.into_inner();
    let log = status.status?.log_path;
    let directory = Path::new(&log).parent()?;
    (directory.parent() == Some(Path::new(LOG_ROOT)))
        .then(|| directory.to_string_lossy().into_owned())
}

fn image(container: &cri::Container) -> String {
    let named = container
        .image
        .as_ref()
        .map(|i| {
            if i.user_specified_image.is_empty() {
                i.image.clone()
            } else {
                i.user_specified_image.clone()
            }
        })
        .unwrap_or_default();
    if named.starts_with("sha256:") {
        client::short(&named).to_owned()
    } else {
        named
    }
}

async fn status(client: &Client, container: &cri::Container) -> String {
    match container.state() {
        ContainerState::ContainerCreated => "Created".into(),
        ContainerState::ContainerRunning => "Running".into(),
        ContainerState::ContainerUnknown => "Unknown".into(),
        ContainerState::ContainerExited => {
            let request = cri::ContainerStatusRequest {
                container_id: container.id.clone(),
                verbose: false,
            };
            let status = client.runtime.clone().container_status(request).await;
            match status.ok().and_then(|s| s.into_inner().status) {
                Some(status) => {
                    format!("Exited ({}) {}", status.exit_code, ago(status.finished_at))
                }
                None => "Exited".into(),
            }
        }
    }
}

/// A time in nanoseconds since 1970 as "3 minutes ago".
pub fn ago(nanoseconds: i64) -> String {
    let then = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = now.saturating_sub(then).as_secs();
    let (n, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {unit}{plural} ago")
}
