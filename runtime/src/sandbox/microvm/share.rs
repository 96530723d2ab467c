//! The share: what of the host a guest sees over virtio-fs.
//!
//! Its root is a read-only bind mount in which the daemon alone can make mount points. Volumes are mounted on
//! them in the pod process's mount namespace ([`namespace`]), so they end with it, and the host never has them.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::namespace;
use super::tree::Tree;
use crate::mounts;
use crate::sandbox::pod::dir::PodDir;
use crate::sandbox::{SandboxError, SharedVolume, VolumeOptions};
use crate::steps::{self, Step};

/// Where the guest mounts the share.
pub const GUEST_PATH: &str = "/run/caisson/share";
/// The most volumes of one container.
const MAX_VOLUMES: u32 = 1024;

/// A pod's share.
#[derive(Clone, Debug)]
pub struct Share {
    id: Arc<str>,
    dir: PodDir,
    changing: Arc<tokio::sync::Mutex<()>>,
}

impl Share {
    /// The share of this pod.
    pub fn new(id: &str, dir: &PodDir) -> Self {
        Self {
            id: id.into(),
            dir: dir.clone(),
            changing: Arc::default(),
        }
    }

    /// Makes the empty share and opens its root.
    pub fn create(&self) -> io::Result<OwnedFd> {
        let (source, root) = (self.dir.share_source(), self.dir.share());
        fs::create_dir_all(source.join("c"))?;
        fs::create_dir_all(&root)?;
        let none = None::<&str>;
        mount(Some(&source), &root, none, MsFlags::MS_BIND, none)?;
        mount(none, &root, none, MsFlags::MS_PRIVATE, none)?;
        let read_only = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount(none, &root, none, read_only, none)?;
        Ok(fs::File::open(&root)?.into())
    }

    /// Shows a file or directory of the host.
    pub async fn volume(
        &self,
        container_id: &str,
        host_path: &Path,
        options: VolumeOptions,
    ) -> Result<SharedVolume, SandboxError> {
        let _one_at_a_time = self.changing.lock().await;
        let (share, path, container) =
            (self.clone(), host_path.to_owned(), container_id.to_owned());
        blocking(move || {
            let place = share.free_place(&container)?;
            share.attach(&Tree::of_volume(&path, options)?, &place)?;
            let only_on_top = options.read_only && !options.recursive_read_only;
            Ok(SharedVolume {
                path: format!("{GUEST_PATH}/{place}"),
                ids: None,
                partly_writable: only_on_top && (options.follows_host || has_mounts_below(&path)?),
            })
        })
        .await
        .map_err(|e| self.error(host_path, e.to_string()))
    }

    /// Takes away the volumes of a container.
    pub async fn unshare(&self, container_id: &str) -> Result<(), SandboxError> {
        let _one_at_a_time = self.changing.lock().await;
        let (share, container) = (self.clone(), container_id.to_owned());
        blocking(move || share.detach_all(&container))
            .await
            .map_err(|e| self.error(Path::new(container_id), e.to_string()))
    }

    /// Unmounts the share of a pod whose process has ended. Idempotent.
    pub async fn remove_all(&self) -> Result<(), SandboxError> {
        let root = self.dir.share();
        let detached = root.clone();
        blocking(move || detach(&detached))
            .await
            .map_err(|e| self.error(&root, e.to_string()))
    }

    fn error(&self, path: &Path, cause: String) -> SandboxError {
        SandboxError::Share {
            id: self.id.to_string(),
            path: path.to_owned(),
            cause,
        }
    }

    /// A place for one more volume of the container.
    fn free_place(&self, container_id: &str) -> io::Result<String> {
        let source = self.dir.share_source();
        fs::create_dir_all(source.join("c").join(container_id))?;
        (0..MAX_VOLUMES)
            .map(|n| format!("c/{container_id}/{n}"))
            .find(|place| !source.join(place).exists())
            .ok_or_else(|| {
                io::Error::other(format!("the container has {MAX_VOLUMES} volumes already"))
            })
    }

    /// Mounts `tree` at `place` of the share, where it may be already.
    fn attach(&self, tree: &Tree, place: &str) -> io::Result<()> {
        let point = self.dir.share_source().join(place);
        tree.make_point(&point)?;
        steps::done(Step::VolumePlaceMade);
        let inside = Path::new("/").join(place);
        let attached = namespace::run(&self.dir, || tree.attach(&inside))
            .and_then(|done| done.ok_or_else(|| io::Error::other("the pod process has ended")));
        if attached.is_err() {
            let _ = remove_point(&point);
        }
        attached
    }

    fn detach_all(&self, container_id: &str) -> io::Result<()> {
        let points = self.dir.share_source().join("c").join(container_id);
        let places = match fs::read_dir(&points) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()?,
        };
        let inside = Path::new("/c").join(container_id);
        // With the pod process its mounts have gone.
        namespace::run(&self.dir, || {
            places
                .iter()
                .try_for_each(|name| detach(&inside.join(name)))
        })?;
        for name in &places {
            remove_point(&points.join(name))?;
        }
        fs::remove_dir(points)
    }
}

/// Whether something is mounted below a path, not on it.
fn has_mounts_below(path: &Path) -> io::Result<bool> {
    Ok(mounts::below(path)?.any(|mount| mount.point != path))
}

/// Unmounts what is mounted there, with all below it; nothing there is no error.
fn detach(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => continue,
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Removes an empty mount point; never anything that has content.
fn remove_point(point: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(point)?;
    if meta.is_dir() {
        fs::remove_dir(point)
    } else if meta.len() == 0 {
        fs::remove_file(point)
    } else {
        Err(io::Error::other(format!(
            "{} is not an empty mount point",
            point.display()
        )))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

#[cfg(test)]
mod tests;
