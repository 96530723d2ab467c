//! `caisson snapshot` and `caisson restore`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use caisson_proto::cli::{RestoreRequest, SnapshotRequest};
use clap::Args;

use super::client::{CliError, Client};

/// The arguments of `caisson snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The name or ID of a running pod, or of a container of it.
    pod: String,
    /// The directory to write, which must not exist.
    dir: PathBuf,
    /// Let the pod go on afterwards.
    #[arg(short = 'R', long)]
    leave_running: bool,
}

/// The arguments of `caisson restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The directory that `caisson snapshot` has written.
    dir: PathBuf,
}

/// Writes a pod to a directory, and says which.
pub async fn snapshot(client: &Client, args: SnapshotArgs) -> Result<ExitCode, CliError> {
    let pod_sandbox_id = client.pod_of(&args.pod).await?;
    let request = SnapshotRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        path: absolute(&args.dir)?,
        leave_running: args.leave_running,
    };
    client.cli.clone().snapshot(request).await?;
    println!("{pod_sandbox_id}");
    Ok(ExitCode::SUCCESS)
}

/// Makes a pod again, and says which.
pub async fn restore(client: &Client, args: RestoreArgs) -> Result<ExitCode, CliError> {
    let request = RestoreRequest {
        path: absolute(&args.dir)?,
    };
    let restored = client.cli.clone().restore(request).await?.into_inner();
    println!("{}", restored.pod_sandbox_id);
    Ok(ExitCode::SUCCESS)
}

/// A path as the daemon finds it.
fn absolute(path: &Path) -> Result<String, CliError> {
    let unusable =
        |why: String| CliError::Usage(format!("{} is no directory: {why}", path.display()));
    let absolute = std::path::absolute(path).map_err(|error| unusable(error.to_string()))?;
    let text = absolute.to_str().map(str::to_owned);
    text.ok_or_else(|| unusable("its name is not text".into()))
}
