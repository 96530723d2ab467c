//! `caisson stats`.

use std::process::ExitCode;
use std::time::Duration;

use caisson_proto::cli::{PodMemoryRequest, PodMemoryResponse};
use caisson_proto::cri;
use clap::Args;
use indicatif::HumanBytes;

use super::client::{self, CliError, Client};
use super::table::Table;

/// What stands where nothing is known.
const UNKNOWN: &str = "-";

/// The arguments of `caisson stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Names or IDs of pods or of containers of them; none: all pods that are ready.
    pods: Vec<String>,
    /// As a JSON list, in bytes and nanoseconds.
    #[arg(long)]
    json: bool,
}

/// A pod, what it uses by its own account, and what it costs the host.
struct Row {
    pod: cri::PodSandbox,
    used: Result<cri::LinuxPodSandboxStats, CliError>,
    held: Result<PodMemoryResponse, CliError>,
}

/// Shows what pods use: inside, and of the host's memory, where a pod on the host has its pod process alone. What a pod does
/// not tell is left open, and why is told on standard error.
pub async fn stats(client: &Client, args: StatsArgs) -> Result<ExitCode, CliError> {
    let mut rows = Vec::new();
    for pod in chosen(client, &args.pods).await? {
        rows.push(Row {
            used: used(client, &pod.id).await,
            held: held(client, &pod.id).await,
            pod,
        });
    }
    for row in &rows {
        let id = client::short(&row.pod.id);
        let errors = [row.used.as_ref().err(), row.held.as_ref().err()];
        for error in errors.into_iter().flatten() {
            eprintln!("caisson: pod {id}: {error}");
        }
    }
    if args.json {
        let all: Vec<_> = rows.iter().map(Row::json).collect();
        let text = serde_json::to_string_pretty(&all).map_err(CliError::other)?;
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "POD ID",
        "NAME",
        "CPU TIME",
        "PROCESSES",
        "MEMORY IN POD",
        "PRIVATE ON HOST",
        "SHARED ON HOST",
        "PSS",
    ]);
    for row in &rows {
        table.row(row.cells());
    }
    table.print();
    Ok(ExitCode::SUCCESS)
}

async fn chosen(client: &Client, meant: &[String]) -> Result<Vec<cri::PodSandbox>, CliError> {
    let request = cri::ListPodSandboxRequest { filter: None };
    let pods = client.runtime.clone().list_pod_sandbox(request).await?;
    let mut pods = pods.into_inner().items;
    if meant.is_empty() {
        pods.retain(|pod| pod.state() == cri::PodSandboxState::SandboxReady);
        return Ok(pods);
    }
    let mut wanted = Vec::new();
    for meant in meant {
        wanted.push(client.pod_of(meant).await?);
    }
    pods.retain(|pod| wanted.contains(&pod.id));
    Ok(pods)
}

async fn used(client: &Client, pod: &str) -> Result<cri::LinuxPodSandboxStats, CliError> {
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    let answer = client.runtime.clone().pod_sandbox_stats(request).await?;
    let stats = answer.into_inner().stats.unwrap_or_default();
    Ok(stats.linux.unwrap_or_default())
}

async fn held(client: &Client, pod: &str) -> Result<PodMemoryResponse, CliError> {
    let request = PodMemoryRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    Ok(client.cli.clone().pod_memory(request).await?.into_inner())
}

impl Row {
    fn name(&self) -> String {
        let metadata = self.pod.metadata.as_ref();
        metadata.map(|m| m.name.clone()).unwrap_or_default()
    }

    /// Nanoseconds of CPU, processes, bytes of memory.
    fn used(&self) -> [Option<u64>; 3] {
        let used = self.used.as_ref().ok();
        let value = |value: Option<&cri::UInt64Value>| value.map(|value| value.value);
        [
            value(used.and_then(|u| u.cpu.as_ref()?.usage_core_nano_seconds.as_ref())),
            value(used.and_then(|u| u.process.as_ref()?.process_count.as_ref())),
            value(used.and_then(|u| u.memory.as_ref()?.usage_bytes.as_ref())),
        ]
    }

    /// Private, shared, proportional bytes.
    fn held(&self) -> [Option<u64>; 3] {
        let held = self.held.as_ref().ok();
        [
            held.map(|held| held.private_bytes),
            held.map(|held| held.shared_bytes),
            held.map(|held| held.proportional_bytes),
        ]
    }

    fn cells(&self) -> Vec<String> {
        let [cpu, processes, memory] = self.used();
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| UNKNOWN.into());
        let mut cells = vec![
            client::short(&self.pod.id).to_owned(),
            self.name(),
            or_unknown(cpu.map(|ns| format!("{:.2} s", Duration::from_nanos(ns).as_secs_f64()))),
            or_unknown(processes.map(|count| count.to_string())),
        ];
        let sizes = [memory].into_iter().chain(self.held());
        cells.extend(sizes.map(|bytes| or_unknown(bytes.map(|n| HumanBytes(n).to_string()))));
        cells
    }

    fn json(&self) -> serde_json::Value {
        let [cpu, processes, memory] = self.used();
        let [private, shared, proportional] = self.held();
        serde_json::json!({
            "id": self.pod.id,
            "name": self.name(),
            "cpu_ns": cpu,
            "processes": processes,
            "memory_in_pod": memory,
            "private_on_host": private,
            "shared_on_host": shared,
            "pss": proportional,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_left_open() {
        let mut row = Row {
            pod: cri::PodSandbox {
                id: "0123456789abcdef".into(),
                ..cri::PodSandbox::default()
            },
            used: Err(CliError::Daemon("silent".into())),
            held: Ok(PodMemoryResponse {
                private_bytes: 3 << 19,
                shared_bytes: 0,
                proportional_bytes: 2 << 20,
            }),
        };
        let cells = row.cells();
        let known = ["-", "-", "-", "1.50 MiB", "0 B", "2.00 MiB"];
        assert_eq!(cells[0], "0123456789ab");
        assert_eq!(cells[2..], known);
        assert!(row.json()["cpu_ns"].is_null());
        row.used = Ok(cri::LinuxPodSandboxStats {
            process: Some(cri::ProcessUsage {
                process_count: Some(cri::UInt64Value { value: 3 }),
                ..cri::ProcessUsage::default()
            }),
            ..cri::LinuxPodSandboxStats::default()
        });
        assert_eq!(row.cells()[3], "3");
        assert_eq!(row.json()["private_on_host"], 3 << 19);
    }
}
