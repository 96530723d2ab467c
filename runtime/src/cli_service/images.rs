//! Pull and load with progress.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use caisson_proto::cli;
use tokio::sync::mpsc;
use tonic::Status;

use crate::cri::{Context, CriError};
use crate::image::{Auth, Image, Progress};

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
    let auth = (!request.username.is_empty()).then_some(Auth::Basic {
        username: request.username,
        password: request.password,
    });
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
