//! `caisson inspect`, and `caisson doctor --pod`.

use std::collections::HashMap;
use std::process::ExitCode;

use caisson_proto::cri;
use clap::Args;

use super::client::{CliError, Client};
use super::images::spec;
use crate::doctor;
use crate::sandbox::pod::confinement::Confinement;

/// The arguments of `caisson inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Names or IDs, of pods before containers before images.
    #[arg(required = true)]
    names: Vec<String>,
}

/// Shows pods, containers and images as a JSON list.
pub async fn inspect(client: &Client, args: InspectArgs) -> Result<ExitCode, CliError> {
    let mut all = Vec::new();
    for meant in &args.names {
        let info = match client.find_pod(meant).await? {
            Some(pod) => pod_info(client, pod).await?,
            None => match client.find(meant).await {
                Ok(container) => container_info(client, container.id).await?,
                Err(CliError::Usage(_)) => image_info(client, meant).await?,
                Err(error) => return Err(error),
            },
        };
        all.push(info);
    }
    let text = serde_json::to_string_pretty(&all).map_err(CliError::other)?;
    println!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// Says how the process of a pod is confined, or of the pod of a container.
pub async fn doctor(client: &Client, meant: &str) -> Result<ExitCode, CliError> {
    let pod = client.pod_of(meant).await?;
    let mut info = pod_info(client, pod).await?;
    let found: Option<Confinement> =
        serde_json::from_value(info["confinement"].take()).map_err(CliError::other)?;
    match found {
        Some(found) => Ok(doctor::pod::doctor(&found)),
        None => Err(CliError::Usage(format!(
            "the pod {meant:?} has no process; only a pod that runs can be looked at"
        ))),
    }
}

async fn pod_info(client: &Client, pod: String) -> Result<serde_json::Value, CliError> {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod,
        verbose: true,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await?;
    parse(status.into_inner().info)
}

async fn container_info(client: &Client, id: String) -> Result<serde_json::Value, CliError> {
    let request = cri::ContainerStatusRequest {
        container_id: id,
        verbose: true,
    };
    let status = client.runtime.clone().container_status(request).await?;
    parse(status.into_inner().info)
}

async fn image_info(client: &Client, image: &str) -> Result<serde_json::Value, CliError> {
    let request = cri::ImageStatusRequest {
        image: Some(spec(image)),
        verbose: true,
    };
    let status = client.images.clone().image_status(request).await?;
    let info = status.into_inner().info;
    if info.is_empty() {
        return Err(CliError::Usage(format!(
            "there is no pod, container or image {image:?}; `caisson ps -a` and `caisson images` list them"
        )));
    }
    parse(info)
}

/// What the daemon says beyond the interface's own fields.
fn parse(mut info: HashMap<String, String>) -> Result<serde_json::Value, CliError> {
    let info = info
        .remove("info")
        .ok_or_else(|| CliError::Daemon("the daemon does not say more".into()))?;
    serde_json::from_str(&info).map_err(CliError::other)
}
