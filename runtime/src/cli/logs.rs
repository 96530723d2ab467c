//! `caisson logs`: the container's log file, in the CRI format, as the output it was.

use std::io::{self, BufRead, BufReader, Write};
use std::process::ExitCode;
use std::time::Duration;

use caisson_proto::cri;
use clap::Args;

use super::client::{CliError, Client};

/// How long to wait for more at the end of a log that is followed.
const POLL: Duration = Duration::from_millis(100);

/// The arguments of `caisson logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on as the container writes, until it ends.
    #[arg(short, long)]
    follow: bool,
    /// Show when each line was written.
    #[arg(short, long)]
    timestamps: bool,
    /// Only the last lines, so many of them.
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
    /// The container's name or ID.
    container: String,
}

/// Shows the log.
pub async fn logs(client: &Client, args: LogsArgs) -> Result<ExitCode, CliError> {
    let container = client.find(&args.container).await?;
    let path = status(client, &container.id).await?.log_path;
    if path.is_empty() {
        return Err(CliError::Usage(format!(
            "container {} has no log",
            args.container
        )));
    }
    let file = std::fs::File::open(&path).map_err(|cause| CliError::Io {
        what: format!("the log {path} cannot be opened"),
        cause,
    })?;
    let read = |cause| CliError::Io {
        what: format!("the log {path} cannot be read"),
        cause,
    };
    let mut reader = BufReader::new(file);
    let mut lines: Vec<Vec<u8>> = Vec::new();
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line).map_err(read)? {
        lines.push(std::mem::take(&mut line));
        if let Some(tail) = args.tail
            && lines.len() > 2 * tail + 1024
        {
            lines.drain(..lines.len() - tail);
        }
        if args.tail.is_none() {
            show(&lines.swap_remove(0), args.timestamps)?;
        }
    }
    let skip = lines.len().saturating_sub(args.tail.unwrap_or(usize::MAX));
    for line in &lines[skip..] {
        show(line, args.timestamps)?;
    }
    if !args.follow {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        // The state first: what is in the log after the container has ended is all there will be.
        let state = status(client, &container.id).await?.state();
        let mut more = false;
        while next_line(&mut reader, &mut line).map_err(read)? {
            show(&std::mem::take(&mut line), args.timestamps)?;
            more = true;
        }
        if !more && state == cri::ContainerState::ContainerExited {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn status(client: &Client, id: &str) -> Result<cri::ContainerStatus, CliError> {
    let request = cri::ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: false,
    };
    let response = client.runtime.clone().container_status(request).await?;
    Ok(response.into_inner().status.unwrap_or_default())
}

/// Reads one whole line into `line`; false at the end of what is there now. An unfinished line stays in `line` and is
/// completed by the next call.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    reader.read_until(b'\n', line)?;
    Ok(line.last() == Some(&b'\n'))
}

/// A line of the CRI log format: time, stream, tags, content.
struct Entry<'a> {
    time: &'a [u8],
    to_stderr: bool,
    partial: bool,
    content: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let (time, stream, tags, content) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let to_stderr = match stream {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    Some(Entry {
        time,
        to_stderr,
        partial: tags.split(|b| *b == b':').any(|tag| tag == b"P"),
        content: content.strip_suffix(b"\n").unwrap_or(content),
    })
}

fn show(line: &[u8], timestamps: bool) -> Result<(), CliError> {
    let Some(entry) = parse(line) else {
        return Ok(());
    };
    let mut text = Vec::with_capacity(line.len());
    if timestamps {
        text.extend_from_slice(entry.time);
        text.push(b' ');
    }
    text.extend_from_slice(entry.content);
    if !entry.partial {
        text.push(b'\n');
    }
    let written = if entry.to_stderr {
        io::stderr().write_all(&text)
    } else {
        let mut out = io::stdout();
        out.write_all(&text).and_then(|()| out.flush())
    };
    match written {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(CliError::Quiet(141)),
        other => other.map_err(|cause| CliError::Io {
            what: "the output cannot be written".into(),
            cause,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_taken_apart() {
        let entry = parse(b"2026-01-01T00:00:00Z stderr P a b \n").unwrap();
        assert!(entry.to_stderr && entry.partial);
        assert_eq!(entry.content, b"a b ");
        assert_eq!(entry.time, b"2026-01-01T00:00:00Z");
        assert!(!parse(b"t stdout F \n").unwrap().partial);
        assert!(parse(b"t stdfoo F x\n").is_none());
        assert!(parse(b"garbage\n").is_none());
    }

    #[test]
    fn an_unfinished_line_waits_for_its_end() {
        let mut line = Vec::new();
        assert!(!next_line(&mut &b"half"[..], &mut line).unwrap());
        assert!(next_line(&mut &b" whole\n"[..], &mut line).unwrap());
        assert_eq!(line, b"half whole\n");
    }
}
