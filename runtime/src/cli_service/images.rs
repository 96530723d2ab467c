//! Pull and load with progress, save, prune.

use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use caisson_proto::cli;
use tokio::sync::mpsc;
use tonic::Status;

use crate::cri::{Context, CriError, image_service};
use crate::image::{Auth, Image, Progress};

/// Bytes of an archive in one message.
const CHUNK: usize = 256 << 10;

type Sender = mpsc::Sender<Result<cli::PullProgress, Status>>;

/// Pulls an image; goes on to its end when the client goes away.
///
/// # Errors
/// INVALID_ARGUMENT for a request without an image.
pub fn pull(
    context: &Arc<Context>,
    request: cli::PullRequest,
    sender: Sender,
) -> Result<(), CriError> {
    if request.image.is_empty() {
        return Err(CriError::invalid("the request names no image"));
    }
    let auth = if !request.registry_token.is_empty() {
        Some(Auth::Bearer(request.registry_token))
    } else if !request.identity_token.is_empty() {
        Some(Auth::Identity(request.identity_token))
    } else {
        (!request.username.is_empty()).then_some(Auth::Basic {
            username: request.username,
            password: request.password,
        })
    };
    let context = context.clone();
    tokio::spawn(async move {
        let progress = reporter(sender.clone());
        let result = context.images.pull(&request.image, auth, progress).await;
        let last = result
            .map(|image| done(&image, request.image))
            .map_err(|error| CriError::from(error).into());
        let _ = sender.send(last).await;
    });
    Ok(())
}

/// Takes images in from a file or directory of the daemon's host.
///
/// # Errors
/// INVALID_ARGUMENT for a path that is not absolute.
pub fn load(
    context: &Arc<Context>,
    request: cli::LoadRequest,
    sender: Sender,
) -> Result<(), CriError> {
    let path = PathBuf::from(request.path);
    if !path.is_absolute() {
        return Err(CriError::invalid(format!(
            "the path {} to load from is not absolute",
            path.display()
        )));
    }
    let context = context.clone();
    tokio::spawn(async move {
        let progress = reporter(sender.clone());
        let name = Some(request.name.as_str()).filter(|name| !name.is_empty());
        match context.images.load(&path, name, progress).await {
            Ok(images) => {
                for image in &images {
                    let name = name_of(image);
                    let _ = sender.send(Ok(done(image, name))).await;
                }
                if images.is_empty() {
                    let _ = sender.send(Err(no_image(&path))).await;
                }
            }
            Err(error) => {
                let _ = sender.send(Err(CriError::from(error).into())).await;
            }
        }
    });
    Ok(())
}

/// Sends images as an archive. When the client goes away, it ends.
///
/// # Errors
/// INVALID_ARGUMENT for a request without images.
pub fn save(
    context: &Arc<Context>,
    request: cli::SaveRequest,
    sender: mpsc::Sender<Result<cli::SaveChunk, Status>>,
) -> Result<(), CriError> {
    if request.images.is_empty() {
        return Err(CriError::invalid("the request names no image"));
    }
    let context = context.clone();
    tokio::spawn(async move {
        let chunks = BufWriter::with_capacity(CHUNK, Chunks(sender.clone()));
        let last = match context.images.save(&request.images, chunks).await {
            Ok(()) => Ok(cli::SaveChunk {
                complete: true,
                ..Default::default()
            }),
            Err(error) => Err(CriError::from(error).into()),
        };
        let _ = sender.send(last).await;
    });
    Ok(())
}

/// A stream of chunks as a writer. It is used where it may block.
struct Chunks(mpsc::Sender<Result<cli::SaveChunk, Status>>);

impl io::Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(CHUNK)];
        let chunk = cli::SaveChunk {
            data: part.to_vec(),
            complete: false,
        };
        self.0
            .blocking_send(Ok(chunk))
            .map_err(|_| io::Error::other("the client has gone away"))?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Removes images that have no tag or, with `all`, that no container has.
///
/// # Errors
/// The disk fails.
pub async fn prune(context: &Arc<Context>, all: bool) -> Result<cli::PruneResponse, CriError> {
    let containers = context.registry.containers();
    let used = containers
        .iter()
        .map(|container| container.record().image_id.clone())
        .collect();
    let using = context.clone();
    let pruned = context
        .images
        .prune(all, used, move || image_service::layers_in_use(&using))
        .await?;
    Ok(cli::PruneResponse {
        image_ids: pruned.images,
        freed_bytes: pruned.freed,
    })
}

fn no_image(path: &Path) -> Status {
    CriError::new(
        tonic::Code::NotFound,
        format!("{} holds no image for linux/amd64", path.display()),
    )
    .into()
}

fn name_of(image: &Image) -> String {
    image
        .repo_tags
        .first()
        .or(image.repo_digests.first())
        .unwrap_or(&image.id)
        .clone()
}

fn done(image: &Image, name: String) -> cli::PullProgress {
    cli::PullProgress {
        item: name.clone(),
        status: "done".into(),
        image_id: image.id.clone(),
        image_name: name,
        ..Default::default()
    }
}

/// Hands progress on. What a slow client has no room for is left out: the next one says more.
fn reporter(sender: Sender) -> impl Fn(Progress) + Send + Sync + 'static {
    move |progress: Progress| {
        let _ = sender.try_send(Ok(cli::PullProgress {
            item: progress.item,
            done_bytes: progress.done,
            total_bytes: progress.total,
            status: progress.status.to_string(),
            ..Default::default()
        }));
    }
}
