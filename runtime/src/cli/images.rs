//! `caisson pull`, `load`, `images` and `rmi`.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use caisson_proto::cli::{LoadRequest, PullProgress, PullRequest};
use caisson_proto::cri;
use clap::Args;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tonic::Streaming;

use super::client::{self, CliError, Client};
use super::credentials;
use super::table::Table;

/// The most bars at a time: an image has at most as many layers.
const MAX_BARS: usize = 256;

/// The arguments of `caisson pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// No progress, only the image's ID.
    #[arg(short, long)]
    quiet: bool,
    /// The user at the registry, as `name:password`; better: the variable CAISSON_CREDS.
    #[arg(
        long,
        value_name = "USER:PASSWORD",
        env = "CAISSON_CREDS",
        hide_env_values = true
    )]
    creds: Option<String>,
    /// Where `docker login` keeps credentials; without it $DOCKER_CONFIG/config.json or ~/.docker/config.json.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// Names of images.
    #[arg(required = true)]
    images: Vec<String>,
}

/// The arguments of `caisson load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// No progress, only the image's ID.
    #[arg(short, long)]
    quiet: bool,
    /// The name to give the image, if the file has none or another.
    #[arg(long)]
    name: Option<String>,
    /// An OCI layout directory, or an OCI or docker archive.
    path: PathBuf,
}

/// The arguments of `caisson images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Only IDs.
    #[arg(short, long)]
    quiet: bool,
}

/// The arguments of `caisson rmi`.
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Names or IDs.
    #[arg(required = true)]
    images: Vec<String>,
}

/// Pulls images, with a bar for each layer.
pub async fn pull(client: &Client, args: PullArgs) -> Result<ExitCode, CliError> {
    let given = args.creds.as_deref().map(|c| c.split_once(':'));
    if given == Some(None) {
        return Err(CliError::Usage(
            "--creds needs a user and a password with a colon between them".into(),
        ));
    }
    for image in &args.images {
        let mut request = PullRequest {
            image: image.clone(),
            ..PullRequest::default()
        };
        match given.flatten() {
            Some((user, password)) => {
                request.username = user.to_owned();
                request.password = password.to_owned();
            }
            None => credentials::fill(&mut request, args.authfile.as_deref())?,
        }
        let progress = client.cli.clone().pull(request).await?.into_inner();
        println!("{}", follow(progress, args.quiet).await?.image_id);
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes in an image from a file.
pub async fn load(client: &Client, args: LoadArgs) -> Result<ExitCode, CliError> {
    let path = args.path.canonicalize().map_err(|cause| CliError::Io {
        what: format!("{} cannot be loaded", args.path.display()),
        cause,
    })?;
    let request = LoadRequest {
        path: path.to_string_lossy().into_owned(),
        name: args.name.unwrap_or_default(),
    };
    let progress = client.cli.clone().load(request).await?.into_inner();
    let done = follow(progress, args.quiet).await?;
    if args.quiet || done.image_name.is_empty() {
        println!("{}", done.image_id);
    } else {
        println!("{}", done.image_name);
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists images.
pub async fn images(client: &Client, args: ImagesArgs) -> Result<ExitCode, CliError> {
    let images = client
        .images
        .clone()
        .list_images(cri::ListImagesRequest { filter: None })
        .await?
        .into_inner()
        .images;
    let mut table = Table::new(&["NAME", "IMAGE ID", "SIZE"]);
    for image in &images {
        if args.quiet {
            println!("{}", image.id);
            continue;
        }
        let mut names = image.repo_tags.clone();
        if names.is_empty() {
            names.push(
                image
                    .repo_digests
                    .first()
                    .cloned()
                    .unwrap_or("<none>".into()),
            );
        }
        for name in names {
            table.row(vec![
                name,
                client::short(&image.id).to_owned(),
                HumanBytes(image.size).to_string(),
            ]);
        }
    }
    if !args.quiet {
        table.print();
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes images.
pub async fn rmi(client: &Client, args: RmiArgs) -> Result<ExitCode, CliError> {
    for image in &args.images {
        let request = cri::ListImagesRequest {
            filter: Some(cri::ImageFilter {
                image: Some(spec(image)),
            }),
        };
        let listed = client.images.clone().list_images(request).await?;
        if listed.into_inner().images.is_empty() {
            return Err(CliError::Usage(format!(
                "there is no image {image:?}; `caisson images` lists all"
            )));
        }
        let request = cri::RemoveImageRequest {
            image: Some(spec(image)),
        };
        client.images.clone().remove_image(request).await?;
        println!("{image}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Pulls the image if it is not here yet.
pub async fn ensure(client: &Client, image: &str) -> Result<(), CliError> {
    if status(client, image).await?.is_some() {
        return Ok(());
    }
    let mut request = PullRequest {
        image: image.to_owned(),
        ..PullRequest::default()
    };
    credentials::fill(&mut request, None)?;
    let progress = client.cli.clone().pull(request).await?.into_inner();
    follow(progress, false).await.map(drop)
}

async fn status(client: &Client, image: &str) -> Result<Option<cri::Image>, CliError> {
    let request = cri::ImageStatusRequest {
        image: Some(spec(image)),
        verbose: false,
    };
    let response = client.images.clone().image_status(request).await?;
    Ok(response.into_inner().image)
}

pub(super) fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        ..cri::ImageSpec::default()
    }
}

/// Shows progress until the end; the last message.
async fn follow(
    mut progress: Streaming<PullProgress>,
    quiet: bool,
) -> Result<PullProgress, CliError> {
    let target = if quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let bars = MultiProgress::with_draw_target(target);
    let mut by_item: HashMap<String, ProgressBar> = HashMap::new();
    let mut last = PullProgress::default();
    while let Some(step) = progress.message().await? {
        if !step.item.is_empty() && (by_item.contains_key(&step.item) || by_item.len() < MAX_BARS) {
            let bar = by_item
                .entry(step.item.clone())
                .or_insert_with(|| bars.add(bar(&step.item)));
            bar.set_length(step.total_bytes.max(step.done_bytes));
            bar.set_position(step.done_bytes);
            bar.set_message(step.status.clone());
            if step.status == "done" {
                bar.finish();
            }
        }
        last = step;
    }
    if last.image_id.is_empty() {
        return Err(CliError::Daemon(
            "the daemon ended the transfer without an image".into(),
        ));
    }
    Ok(last)
}

fn bar(item: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>14} [{bar:30}] {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12} {msg}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
    .progress_chars("=> ");
    let bar = ProgressBar::no_length().with_style(style);
    bar.set_prefix(client::short(item).to_owned());
    bar
}
