//! `caisson timeline`: the steps of a pod's start as a waterfall.

use std::process::ExitCode;

use caisson_proto::cli::{Timing, TimingsRequest};
use clap::Args;

use super::client::{CliError, Client};

/// How wide the waterfall is, in characters.
const WIDTH: usize = 40;

/// The arguments of `caisson timeline`.
#[derive(Debug, Args)]
pub struct TimelineArgs {
    /// The name or ID of a container of the pod.
    container: String,
}

/// Shows the steps of the start of a container's pod.
pub async fn timeline(client: &Client, args: TimelineArgs) -> Result<ExitCode, CliError> {
    let container = client.find(&args.container).await?;
    for line in lines(&steps(client, &container.pod_sandbox_id).await?) {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the steps to standard error, beside a container's own output.
pub async fn print(client: &Client, pod: &str) -> Result<(), CliError> {
    for line in lines(&steps(client, pod).await?) {
        eprintln!("{line}");
    }
    Ok(())
}

async fn steps(client: &Client, pod: &str) -> Result<Vec<Timing>, CliError> {
    let request = TimingsRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    Ok(client
        .cli
        .clone()
        .timings(request)
        .await?
        .into_inner()
        .steps)
}

fn lines(steps: &[Timing]) -> Vec<String> {
    let end = steps
        .iter()
        .map(|s| s.start_us + s.duration_us)
        .max()
        .unwrap_or(0)
        .max(1);
    let widest = steps.iter().map(|s| s.step.len()).max().unwrap_or(0);
    let scale = |us: u64| (us as usize * WIDTH) / end as usize;
    let mut lines = vec![format!(
        "time from the request to a started container: {:.1} ms",
        end as f64 / 1000.0
    )];
    for step in steps {
        let from = scale(step.start_us).min(WIDTH - 1);
        let to = scale(step.start_us + step.duration_us).clamp(from + 1, WIDTH);
        lines.push(format!(
            "  {:widest$}  {:>9.1} ms  |{}{}{}|",
            step.step,
            step.duration_us as f64 / 1000.0,
            " ".repeat(from),
            "#".repeat(to - from),
            " ".repeat(WIDTH - to),
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_stand_where_they_were() {
        let step = |name: &str, start_us, duration_us| Timing {
            step: name.into(),
            start_us,
            duration_us,
        };
        let lines = lines(&[step("a", 0, 500), step("long", 500, 500)]);
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains(&format!("|{}{}|", "#".repeat(20), " ".repeat(20))));
        assert!(lines[2].contains(&format!("|{}{}|", " ".repeat(20), "#".repeat(20))));
        assert_eq!(lines[1].len(), lines[2].len());
    }
}
