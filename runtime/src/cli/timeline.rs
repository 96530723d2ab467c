//! `caisson timeline`: the steps of a pod's start as a waterfall.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use caisson_proto::cli::{Timing, TimingsRequest};
use clap::Args;

use super::client::{CliError, Client};

/// How wide the waterfall is, in characters.
const WIDTH: usize = 40;

/// The arguments of `caisson timeline`.
#[derive(Debug, Args)]
pub struct TimelineArgs {
    /// The name or ID of a pod, or of a container of it.
    pod: String,
    /// Write a picture (SVG) to this file instead.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Shows the steps of a pod's start.
pub async fn timeline(client: &Client, args: TimelineArgs) -> Result<ExitCode, CliError> {
    let pod = client.pod_of(&args.pod).await?;
    let steps = steps(client, &pod).await?;
    match args.svg {
        Some(file) => std::fs::write(&file, picture(&steps)).map_err(|error| {
            CliError::Usage(format!("{} cannot be written: {error}", file.display()))
        })?,
        None => lines(&steps).iter().for_each(|line| println!("{line}")),
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

/// When the last step ended, in microseconds.
fn end(steps: &[Timing]) -> u64 {
    let ends = steps.iter().map(|step| step.start_us + step.duration_us);
    ends.max().unwrap_or(0).max(1)
}

fn title(end: u64) -> String {
    let milliseconds = end as f64 / 1000.0;
    format!("time from the request to a started container: {milliseconds:.1} ms")
}

fn lines(steps: &[Timing]) -> Vec<String> {
    let end = end(steps);
    let widest = steps.iter().map(|s| s.step.len()).max().unwrap_or(0);
    let scale = |us: u64| (us as usize * WIDTH) / end as usize;
    let mut lines = vec![title(end)];
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

/// The waterfall as a picture. The steps of the pod process, which are parts of others, are lighter.
fn picture(steps: &[Timing]) -> String {
    const ROW: usize = 20;
    const LEFT: f64 = 230.0;
    const BARS: f64 = 500.0;
    let end = end(steps);
    let height = ROW * (steps.len() + 2);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"830\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">{}</text>\n",
        escaped(&title(end))
    );
    for (row, step) in (1..).zip(steps) {
        let (top, base) = (row * ROW + 8, row * ROW + 22);
        let x = LEFT + BARS * step.start_us as f64 / end as f64;
        let width = (BARS * step.duration_us as f64 / end as f64).max(1.0);
        let color = if step.step.starts_with("vmm: ") {
            "#a8c8e8"
        } else {
            "#2f6fa8"
        };
        let (name, milliseconds) = (escaped(&step.step), step.duration_us as f64 / 1000.0);
        // Writing to a string does not fail.
        let _ = writeln!(
            svg,
            "<text x=\"220\" y=\"{base}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"16\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{base}\">{milliseconds:.1} ms</text>",
            x + width + 4.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Names of steps come from the pod process, too.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
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

    #[test]
    fn a_picture_has_a_bar_for_each_step() {
        let step = |name: &str, start_us, duration_us| Timing {
            step: name.into(),
            start_us,
            duration_us,
        };
        let svg = picture(&[step("first", 0, 400), step("vmm: <b> & c", 400, 600)]);
        assert_eq!(svg.matches("<rect x=").count(), 2);
        assert!(
            svg.contains("width=\"200.0\"") && svg.contains("width=\"300.0\""),
            "{svg}"
        );
        assert!(svg.contains("vmm: &lt;b> &amp; c"), "{svg}");
        assert_eq!(picture(&[]).matches("<rect x=").count(), 0);
    }
}
