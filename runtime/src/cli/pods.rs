//! `caisson pods`.

use std::process::ExitCode;

use caisson_proto::cri;
use clap::Args;

use super::client::{self, CliError, Client};
use super::containers::ago;
use super::table::Table;

/// How much of a reason fits into a table, in characters.
const SHORT_REASON: usize = 100;

/// The arguments of `caisson pods`.
#[derive(Debug, Args)]
pub struct PodsArgs {
    /// Reasons in full.
    #[arg(long)]
    no_trunc: bool,
    /// Only IDs.
    #[arg(short, long)]
    quiet: bool,
}

/// Lists pods, those that are not ready with the reason.
pub async fn pods(client: &Client, args: PodsArgs) -> Result<ExitCode, CliError> {
    let request = cri::ListPodSandboxRequest { filter: None };
    let pods = client.runtime.clone().list_pod_sandbox(request).await?;
    let pods = pods.into_inner().items;
    if args.quiet {
        for pod in &pods {
            println!("{}", pod.id);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["POD ID", "NAMESPACE", "NAME", "CREATED", "STATE", "REASON"]);
    for pod in &pods {
        let metadata = pod.metadata.clone().unwrap_or_default();
        let state = match pod.state() {
            cri::PodSandboxState::SandboxReady => "ready",
            cri::PodSandboxState::SandboxNotready => "not ready",
        };
        let mut reason = reason(client, &pod.id).await;
        if !args.no_trunc && reason.chars().count() > SHORT_REASON {
            reason = reason.chars().take(SHORT_REASON).chain(['…']).collect();
        }
        table.row(vec![
            client::short(&pod.id).to_owned(),
            metadata.namespace,
            metadata.name,
            ago(pod.created_at),
            state.to_owned(),
            reason,
        ]);
    }
    table.print();
    Ok(ExitCode::SUCCESS)
}

/// Why a pod is as it is. Empty for one that was removed meanwhile.
async fn reason(client: &Client, id: &str) -> String {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: true,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await;
    status
        .ok()
        .and_then(|status| {
            let info = status.into_inner().info.remove("info")?;
            let info: serde_json::Value = serde_json::from_str(&info).ok()?;
            info["reason"].as_str().map(str::to_owned)
        })
        .unwrap_or_default()
}
