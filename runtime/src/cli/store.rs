//! `caisson save` and `prune`.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use caisson_proto::cli::{PruneRequest, SaveChunk, SaveRequest};
use clap::Args;
use indicatif::HumanBytes;
use tonic::Streaming;

use super::client::{self, CliError, Client};

/// The arguments of `caisson save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Write here, and not to standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Names or IDs. A name is saved as it is given, an ID with all names of its image.
    #[arg(required = true)]
    images: Vec<String>,
}

/// The arguments of `caisson prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// All images that no container uses, those with names too. Pinned ones stay.
    #[arg(short, long)]
    all: bool,
}

/// Writes images to an archive. A file gets its name when it is complete.
pub async fn save(client: &Client, args: SaveArgs) -> Result<ExitCode, CliError> {
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            return Err(CliError::Usage(
                "an archive is nothing for a terminal; use -o FILE".into(),
            ));
        }
        let chunks = open(client, args.images).await?;
        copy(
            chunks,
            &mut io::stdout().lock(),
            Path::new("standard output"),
        )
        .await?;
        return Ok(ExitCode::SUCCESS);
    };
    let wrong = |cause| CliError::Io {
        what: format!("{} cannot be written", path.display()),
        cause,
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let chunks = open(client, args.images).await?;
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(wrong)?;
    copy(chunks, &mut file, path).await?;
    file.persist(path).map_err(|error| wrong(error.error))?;
    Ok(ExitCode::SUCCESS)
}

async fn open(client: &Client, images: Vec<String>) -> Result<Streaming<SaveChunk>, CliError> {
    let request = SaveRequest { images };
    Ok(client.cli.clone().save(request).await?.into_inner())
}

async fn copy(
    mut chunks: Streaming<SaveChunk>,
    to: &mut impl Write,
    path: &Path,
) -> Result<(), CliError> {
    let wrong = |cause| CliError::Io {
        what: format!("{} cannot be written", path.display()),
        cause,
    };
    while let Some(chunk) = chunks.message().await? {
        to.write_all(&chunk.data).map_err(wrong)?;
        if chunk.complete {
            return to.flush().map_err(wrong);
        }
    }
    Err(CliError::Daemon(
        "the daemon ended the archive before it was complete".into(),
    ))
}

/// Removes images that nobody uses.
pub async fn prune(client: &Client, args: PruneArgs) -> Result<ExitCode, CliError> {
    let request = PruneRequest { all: args.all };
    let pruned = client.cli.clone().prune(request).await?.into_inner();
    for id in &pruned.image_ids {
        println!("{}", client::short(id));
    }
    eprintln!("{} freed", HumanBytes(pruned.freed_bytes));
    Ok(ExitCode::SUCCESS)
}
