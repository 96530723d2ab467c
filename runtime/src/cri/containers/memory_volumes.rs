//! The kubelet's volumes in memory: emptyDir with the medium `Memory`.
//!
//! The kubelet mounts a tmpfs on the host for each. In a microVM that would be memory of the host beside the guest's, reached
//! over virtio-fs; so the guest gets a tmpfs of its own in the place, of the same size and with the same owner and mode,
//! which all containers of the pod share. The kubelet puts nothing into such a volume but the directories of sub-paths.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use caisson_proto::agent;

use crate::mounts::{self, Mount};
use crate::sandbox::ids::{IdRange, UserIds};

/// The directory of a pod's emptyDir volumes, in its directory `volumes`.
const PLUGIN: &str = "kubernetes.io~empty-dir";
/// Where the agent has the volumes of its containers.
const AGENT_PATH: &str = "/run/caisson/volumes";

/// The kernel's ID for an owner that cannot be told.
const NOBODY: u32 = 65_534;

/// What a mounted path of the host is.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Found {
    /// A volume in memory, mounted there, or the part of it with this path.
    Memory { volume: PathBuf, sub_path: String },
    /// A volume of huge pages.
    HugePages,
}

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryVolumeError {
    /// The host's mounts or the volume cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is of huge pages.
    #[error(
        "is an emptyDir of huge pages, and the guest has none; use the medium Memory or a handler of kind `host`"
    )]
    HugePages,
}

/// The volume in memory that a path of the host is, or is a part of; `None` for any other path. With `ids`, its owner is the
/// one that the pod sees.
///
/// # Errors
/// [`MemoryVolumeError`].
pub async fn find(
    path: &Path,
    ids: Option<UserIds>,
) -> Result<Option<agent::MemoryVolume>, MemoryVolumeError> {
    let path = path.to_owned();
    let found = tokio::task::spawn_blocking(move || match classify(&mounts::table()?, &path) {
        None => Ok(None),
        Some(Found::HugePages) => Err(MemoryVolumeError::HugePages),
        Some(Found::Memory { volume, sub_path }) => {
            Ok(Some(describe(&volume, sub_path, &path, ids)?))
        }
    });
    found.await.map_err(io::Error::other)?
}

/// Where the agent has the memory volume of this number.
pub fn place(container_id: &str, number: usize) -> String {
    format!("{AGENT_PATH}/{container_id}/m{number}")
}

fn classify(mounts: &[Mount], path: &Path) -> Option<Found> {
    // The last one on the path covers the others.
    let top = mounts.iter().rev().find(|mount| mount.point == path)?;
    let volume = mounts.iter().find(|mount| {
        mount.device == top.device && mount.root == Path::new("/") && is_empty_dir(&mount.point)
    })?;
    match top.kind.as_str() {
        "hugetlbfs" => Some(Found::HugePages),
        "tmpfs" => Some(Found::Memory {
            volume: volume.point.clone(),
            sub_path: top
                .root
                .to_string_lossy()
                .trim_start_matches('/')
                .to_owned(),
        }),
        _ => None,
    }
}

/// Whether the kubelet has an emptyDir there: `.../volumes/kubernetes.io~empty-dir/NAME`.
fn is_empty_dir(point: &Path) -> bool {
    let name = |path: Option<&Path>| path.and_then(Path::file_name).map(ToOwned::to_owned);
    let parent = point.parent();
    name(parent).is_some_and(|name| name == PLUGIN)
        && name(parent.and_then(Path::parent)).is_some_and(|name| name == "volumes")
}

fn describe(
    volume: &Path,
    sub_path: String,
    path: &Path,
    ids: Option<UserIds>,
) -> io::Result<agent::MemoryVolume> {
    let directory = |path: &Path| {
        let meta = std::fs::metadata(path)?;
        Ok::<_, io::Error>(agent::Directory {
            mode: meta.permissions().mode() & 0o7777,
            uid: ids.map_or(meta.uid(), |ids| outside(meta.uid(), ids.uids)),
            gid: ids.map_or(meta.gid(), |ids| outside(meta.gid(), ids.gids)),
        })
    };
    let fs = nix::sys::statvfs::statvfs(volume)?;
    let name = volume
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| io::Error::other("its name is not text"))?;
    Ok(agent::MemoryVolume {
        name: name.to_owned(),
        size_bytes: fs.blocks().saturating_mul(fs.fragment_size()),
        root: Some(directory(volume)?),
        sub: if sub_path.is_empty() {
            None
        } else {
            Some(directory(path)?)
        },
        sub_path,
    })
}

/// What an ID of the pod is outside of it, as a mount with mapped IDs has it; nobody where it is none of the pod's.
fn outside(id: u32, range: IdRange) -> u32 {
    match range.first.checked_add(id) {
        Some(outside) if id < range.length => outside,
        _ => NOBODY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_mapped() {
        let range = IdRange {
            first: 100_000,
            length: 65_536,
        };
        assert_eq!(outside(0, range), 100_000);
        assert_eq!(outside(2000, range), 102_000);
        assert_eq!(outside(65_536, range), NOBODY);
    }

    const POD: &str = "/var/lib/kubelet/pods/uid";

    #[test]
    fn only_the_kubelets_own_tmpfs_is_one() {
        let mounts = mounts::parse(&format!(
            "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
             23 22 0:5 / {POD}/volumes/kubernetes.io~empty-dir/cache rw shared:2 - tmpfs tmpfs rw,size=16384k\n\
             24 22 0:6 / {POD}/volumes/kubernetes.io~secret/s rw shared:3 - tmpfs tmpfs rw\n\
             25 22 0:5 /a/b\\040c {POD}/volume-subpaths/cache/c/0 rw shared:2 - tmpfs tmpfs rw\n\
             26 22 0:7 / /run rw shared:4 - tmpfs tmpfs rw\n\
             27 22 0:7 /x {POD}/volume-subpaths/host/c/0 rw shared:4 - tmpfs tmpfs rw\n\
             28 22 0:8 / {POD}/volumes/kubernetes.io~empty-dir/huge rw - hugetlbfs nodev rw\n\
             29 22 8:2 / {POD}/volumes/kubernetes.io~empty-dir/disk rw - ext4 /dev/sda2 rw\n"
        ));
        let of = |path: &str| classify(&mounts, Path::new(&format!("{POD}/{path}")));
        let memory = |sub_path: &str| {
            Some(Found::Memory {
                volume: format!("{POD}/volumes/kubernetes.io~empty-dir/cache").into(),
                sub_path: sub_path.to_owned(),
            })
        };
        assert_eq!(of("volumes/kubernetes.io~empty-dir/cache"), memory(""));
        assert_eq!(of("volume-subpaths/cache/c/0"), memory("a/b c"));
        assert_eq!(
            of("volumes/kubernetes.io~empty-dir/huge"),
            Some(Found::HugePages)
        );
        for other in [
            "volumes/kubernetes.io~secret/s",
            "volume-subpaths/host/c/0",
            "volumes/kubernetes.io~empty-dir/disk",
            "volumes/kubernetes.io~empty-dir/cache/below",
            "volumes/kubernetes.io~empty-dir/plain",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(classify(&mounts, Path::new("/run")), None);
    }
}
