//! A container's volumes: what may be shared with a guest, and how.

use std::path::PathBuf;

use caisson_proto::{agent, cri};
use cri::MountPropagation;

use super::super::CriError;
use super::super::spec::{self, Volume};
use super::memory_volumes::{self, MemoryVolumeError};
use super::{image_volumes, propagation};
use crate::sandbox::ids::UserIds;
use crate::sandbox::{Sandbox, SharedVolume, VolumeOptions};

/// The most volumes of one container.
const MAX_VOLUMES: usize = 512;

/// A volume that was checked.
#[derive(Debug)]
pub struct Checked {
    source: Source,
    mount: cri::Mount,
    ids: Option<UserIds>,
}

/// Where a volume's content is.
#[derive(Debug)]
enum Source {
    /// At this path of the host.
    Host(PathBuf),
    /// In the guest's memory.
    Memory(agent::MemoryVolume),
    /// In an image.
    Image,
}

impl Checked {
    /// What the agent is told of the volumes in memory, in their order.
    pub fn memory_volumes(all: &[Self]) -> Vec<agent::MemoryVolume> {
        all.iter()
            .filter_map(|volume| match &volume.source {
                Source::Memory(memory) => Some(memory.clone()),
                Source::Host(_) | Source::Image => None,
            })
            .collect()
    }
}

/// Checks the mounts that a client asks for and follows symbolic links to what they mean. `pod` are the pod's IDs.
///
/// # Errors
/// INVALID_ARGUMENT or UNIMPLEMENTED that names the mount and what about it is not possible.
pub async fn resolve(
    mounts: &[cri::Mount],
    on_host: bool,
    pod: Option<UserIds>,
) -> Result<Vec<Checked>, CriError> {
    if mounts.len() > MAX_VOLUMES {
        return Err(CriError::invalid(format!(
            "the container has {} mounts; at most {MAX_VOLUMES} are possible",
            mounts.len()
        )));
    }
    let mut all = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let at = &mount.container_path;
        if mount.propagation() == MountPropagation::PropagationBidirectional && !on_host {
            return Err(CriError::unimplemented(format!(
                "the mount at {at} has the propagation PROPAGATION_BIDIRECTIONAL, and mounts do not propagate out of a microVM; use a handler of kind `host`"
            )));
        }
        let ids = spec::mount_ids(mount, pod)?;
        if mount.recursive_read_only && !mount.readonly {
            return Err(CriError::invalid(format!(
                "the mount at {at} has recursive_read_only without readonly"
            )));
        }
        if mount.recursive_read_only && mount.propagation() != MountPropagation::PropagationPrivate
        {
            return Err(CriError::invalid(format!(
                "the mount at {at} has recursive_read_only, and mounts that appear later would not be; use PROPAGATION_PRIVATE"
            )));
        }
        if image_volumes::is_image(mount) {
            // The agent mounts it with the IDs of the container.
            all.push(Checked {
                source: Source::Image,
                mount: mount.clone(),
                ids: None,
            });
            continue;
        }
        if !mount.host_path.starts_with('/') {
            return Err(CriError::invalid(format!(
                "the mount at {at} has the host path {:?}, which is not absolute",
                mount.host_path
            )));
        }
        let path = tokio::fs::canonicalize(&mount.host_path)
            .await
            .map_err(|error| {
                CriError::invalid(format!(
                    "the mount at {at} has the host path {}, which cannot be used: {error}",
                    mount.host_path
                ))
            })?;
        let kind = tokio::fs::metadata(&path)
            .await
            .map_err(|error| CriError::invalid(format!("{}: {error}", path.display())))?
            .file_type();
        // A device must not be mistaken for a directory of the host, nor the other way round.
        // must-test: a bind-mounted directory mistaken for a block device
        if !on_host && !kind.is_dir() && !kind.is_file() {
            return Err(CriError::unimplemented(format!(
                "the mount at {at} has the host path {}, which is a socket, a pipe or a device and means nothing in a microVM; use a handler of kind `host`",
                mount.host_path
            )));
        }
        let memory = if on_host || !kind.is_dir() {
            None
        } else {
            memory_volumes::find(&path, ids).await.map_err(|error| {
                let text = format!("the mount at {at}, {}, {error}", mount.host_path);
                match error {
                    MemoryVolumeError::HugePages => CriError::unimplemented(text),
                    MemoryVolumeError::Read(_) => CriError::internal(text),
                }
            })?
        };
        let source = match memory {
            // Nothing is mounted below it that could propagate.
            Some(memory) => Source::Memory(memory),
            None => {
                propagation::check(&path, mount).await?;
                Source::Host(path)
            }
        };
        all.push(Checked {
            source,
            mount: mount.clone(),
            ids,
        });
    }
    Ok(all)
}

/// Shares the volumes with the guest, in their order.
///
/// # Errors
/// The first that cannot be shared.
pub async fn share(
    sandbox: &dyn Sandbox,
    container_id: &str,
    volumes: Vec<Checked>,
) -> Result<Vec<Volume>, CriError> {
    let mut shared = Vec::with_capacity(volumes.len());
    let (mut images, mut memory) = (0, 0);
    for Checked { source, mount, ids } in volumes {
        let propagation = mount.propagation();
        let volume = match source {
            Source::Host(path) => {
                let options = VolumeOptions {
                    read_only: mount.readonly,
                    recursive_read_only: mount.recursive_read_only,
                    follows_host: propagation != MountPropagation::PropagationPrivate,
                    ids,
                };
                sandbox.share_volume(container_id, &path, options).await?
            }
            Source::Memory(_) => {
                memory += 1;
                SharedVolume {
                    path: memory_volumes::place(container_id, memory - 1),
                    partly_writable: false,
                    ids: None,
                }
            }
            Source::Image => {
                images += 1;
                SharedVolume {
                    path: image_volumes::place(container_id, images - 1),
                    partly_writable: false,
                    ids: None,
                }
            }
        };
        shared.push(Volume {
            source: volume.path,
            destination: mount.container_path,
            read_only: mount.readonly && !volume.partly_writable,
            recursive_read_only: mount.recursive_read_only,
            propagation,
            ids: volume.ids,
        });
    }
    Ok(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(host_path: &str) -> cri::Mount {
        cri::Mount {
            container_path: "/data".into(),
            host_path: host_path.into(),
            ..Default::default()
        }
    }

    // must-test: a bind-mounted directory mistaken for a block device
    #[tokio::test]
    async fn only_files_and_directories_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [
            socket.to_str().unwrap(),
            "/dev/null",
            "/nonexistent",
            "relative",
        ] {
            let error = resolve(&[mount(path)], false, None).await.unwrap_err();
            assert!(error.message.contains(path), "{error}");
            assert!(error.message.contains("/data"), "{error}");
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let resolved = resolve(&[mount(link.to_str().unwrap())], false, None)
            .await
            .unwrap();
        let here = dir.path().canonicalize().unwrap();
        assert!(matches!(&resolved[0].source, Source::Host(path) if *path == here));
    }

    #[tokio::test]
    async fn the_host_shares_whatever_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [socket.to_str().unwrap(), "/dev/null", "/"] {
            resolve(&[mount(path)], true, None).await.unwrap();
        }
        assert!(resolve(&[mount("/nonexistent")], true, None).await.is_err());
    }

    #[tokio::test]
    async fn what_cannot_be_honoured_is_refused_by_name() {
        let shared = cri::Mount {
            propagation: cri::MountPropagation::PropagationBidirectional as i32,
            ..mount("/tmp")
        };
        let error = resolve(&[shared], false, None).await.unwrap_err();
        assert!(
            error.message.contains("PROPAGATION_BIDIRECTIONAL"),
            "{error}"
        );
        let rro = cri::Mount {
            recursive_read_only: true,
            ..mount("/tmp")
        };
        assert!(resolve(&[rro], false, None).await.is_err());
        let rro = cri::Mount {
            recursive_read_only: true,
            readonly: true,
            propagation: MountPropagation::PropagationHostToContainer as i32,
            ..mount("/tmp")
        };
        for on_host in [false, true] {
            let error = resolve(std::slice::from_ref(&rro), on_host, None)
                .await
                .unwrap_err();
            assert!(error.message.contains("recursive_read_only"), "{error}");
        }
    }
}
