//! The first record of a container: what was asked for, checked.

use std::path::{Component, Path, PathBuf};

use caisson_proto::cri;

use crate::cri::registry::{Pod, now};
use crate::cri::spec::signal;
use crate::cri::{CriError, new_id};
use crate::image::Image;
use crate::store::{ContainerRecord, Proto};

/// The record of a container that is about to be made in a pod.
///
/// # Errors
/// INVALID_ARGUMENT that names what is missing or cannot be.
pub(super) fn of(
    pod: &Pod,
    config: cri::ContainerConfig,
    image: &Image,
    volumes: &[Image],
) -> Result<ContainerRecord, CriError> {
    let metadata = config
        .metadata
        .clone()
        .filter(|metadata| !metadata.name.is_empty())
        .ok_or_else(|| {
            CriError::invalid("the container configuration has no metadata with a name")
        })?;
    let pod_record = pod.record();
    let pod_config = &pod_record.config.0;
    let of = pod_config.metadata.clone().unwrap_or_default();
    let log_path = log_path(&pod_config.log_directory, &config.log_path)?;
    let stop_signal = match signal::from_cri(config.stop_signal) {
        Some(signal) => signal,
        None if image.config.stop_signal.is_empty() => signal::TERM,
        None => signal::parse(&image.config.stop_signal).ok_or_else(|| {
            CriError::invalid(format!(
                "the image's stop signal {} is not known; name one in the configuration",
                image.config.stop_signal
            ))
        })?,
    };
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    let name = format!(
        "{}_{}_{}_{}_{}",
        metadata.name, of.name, of.namespace, of.uid, metadata.attempt
    );
    Ok(ContainerRecord {
        config: Proto(config),
        resources: Proto(resources),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        layers: std::iter::once(image)
            .chain(volumes)
            .flat_map(|image| &image.layers)
            .map(ToString::to_string)
            .collect(),
        log_path,
        stop_signal,
        ..ContainerRecord::first(new_id(), pod.id.clone(), name, now())
    })
}

/// The log's path on the host; empty when the client wants none.
fn log_path(directory: &str, file: &str) -> Result<PathBuf, CriError> {
    if directory.is_empty() || file.is_empty() {
        return Ok(PathBuf::new());
    }
    let plain = Path::new(file)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain || !directory.starts_with('/') {
        return Err(CriError::invalid(format!(
            "the log path {file} must be relative, without .., in an absolute log_directory (here {directory})"
        )));
    }
    Ok(Path::new(directory).join(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_paths_stay_in_their_directory() {
        assert_eq!(
            log_path("/var/log/pods/p", "c/0.log").unwrap(),
            Path::new("/var/log/pods/p/c/0.log")
        );
        assert_eq!(log_path("", "c/0.log").unwrap(), Path::new(""));
        assert_eq!(log_path("/x", "").unwrap(), Path::new(""));
        for (directory, file) in [("/x", "../y"), ("/x", "/etc/passwd"), ("x", "y")] {
            assert!(log_path(directory, file).is_err(), "{directory} {file}");
        }
    }
}
