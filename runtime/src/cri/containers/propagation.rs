//! Whether mounts of the host can propagate as a container asks.

use std::path::Path;

use caisson_proto::cri;
use cri::MountPropagation;

use super::super::CriError;
use crate::mounts::{self, Propagation};

/// Checks that the mount on which `path` is passes on what happens to it.
///
/// # Errors
/// INVALID_ARGUMENT that names the mount point and what it would have to be.
pub async fn check(path: &Path, mount: &cri::Mount) -> Result<(), CriError> {
    let wanted = mount.propagation();
    if wanted == MountPropagation::PropagationPrivate {
        return Ok(());
    }
    let mounts = tokio::task::spawn_blocking(mounts::table).await;
    let mounts = mounts
        .map_err(std::io::Error::other)
        .flatten()
        .map_err(|error| CriError::internal(error.to_string()))?;
    let Some(on) = mounts::around(&mounts, path) else {
        return Err(CriError::internal(format!(
            "{} is on no mount of the host",
            path.display()
        )));
    };
    let enough = match on.propagation {
        Propagation::Shared => true,
        Propagation::Slave => wanted == MountPropagation::PropagationHostToContainer,
        Propagation::Private => false,
    };
    if enough {
        return Ok(());
    }
    Err(CriError::invalid(format!(
        "the mount at {} asks for {}, but {} is on the mount {}, which is not shared; make it shared (mount --make-rshared)",
        mount.container_path,
        wanted.as_str_name(),
        path.display(),
        on.point.display()
    )))
}
