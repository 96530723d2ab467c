//! Root file systems: read-only layers under a writable one, stacked with overlayfs
//! (Documentation/filesystems/overlayfs.rst of the kernel).

mod layers;
mod loopdev;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::error::EngineError;
use super::paths;
use layers::LayerMount;

/// Layers an image can have, as in other runtimes.
const MAX_LAYERS: usize = 127;
/// The kernel takes one page of options, with a NUL at the end.
const MAX_OPTIONS: usize = 4095;

/// What a container's root file system is made of.
#[derive(Debug, Clone, Default)]
pub struct RootFs {
    /// EROFS images, lowest first: paths in the guest, on a shared mount.
    pub layers: Vec<PathBuf>,
}

/// A mounted root file system.
#[derive(Debug)]
pub(crate) struct Mounted {
    target: PathBuf,
    scratch: PathBuf,
    /// Unmounted when they are dropped, after the overlay.
    _layers: Vec<LayerMount>,
}

impl Mounted {
    /// Mounts a container's root file system; with `ids`, as the user namespace it is a descriptor of sees it.
    ///
    /// # Errors
    /// If a layer is missing or no EROFS image, or the overlay is refused; nothing stays mounted then.
    pub fn mount(
        id: &str,
        rootfs: &RootFs,
        ids: Option<BorrowedFd<'_>>,
    ) -> Result<Self, EngineError> {
        if rootfs.layers.is_empty() || rootfs.layers.len() > MAX_LAYERS {
            return Err(EngineError::Argument(format!(
                "the root file system of {id} has {} layers; it needs between 1 and {MAX_LAYERS}",
                rootfs.layers.len()
            )));
        }
        let mut layers = Vec::with_capacity(rootfs.layers.len());
        for image in &rootfs.layers {
            let layer = LayerMount::of_image(image)?;
            if let Some(namespace) = ids {
                layers.push(layer.with_ids_of(namespace)?);
            }
            layers.push(layer);
        }
        let (target, scratch) = (paths::get().rootfs(id), paths::get().scratch(id));
        let what = format!("mount the root file system {}", target.display());
        let mounted = Self {
            target,
            scratch,
            _layers: layers,
        };
        // From here on, dropping it undoes what was done.
        mounted
            .overlay(ids.is_some())
            .map_err(|error| EngineError::system(what, error))?;
        Ok(mounted)
    }

    fn overlay(&self, mapped: bool) -> io::Result<()> {
        // Of each pair the first is the one with mapped ids.
        let lower: Vec<&Path> = self
            ._layers
            .iter()
            .step_by(if mapped { 2 } else { 1 })
            .map(|layer| layer.path.as_path())
            .collect();
        let (upper, work) = (self.upper(), self.scratch.join("work"));
        fs::create_dir_all(&self.target)?;
        fs::create_dir_all(paths::get().scratch.as_path())?;
        // One that exists has another container's files.
        fs::create_dir(&self.scratch)?;
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        // The merged root directory takes its attributes from the writable layer's.
        if let Some(top) = lower.last() {
            let attributes = fs::metadata(top)?;
            chown(&upper, Some(attributes.uid()), Some(attributes.gid()))?;
            fs::set_permissions(
                &upper,
                fs::Permissions::from_mode(attributes.mode() & 0o7777),
            )?;
        }
        let list: Vec<_> = lower
            .iter()
            .rev()
            .map(|path| path.to_string_lossy())
            .collect();
        // Volatile: what a container wrote is gone with it, so nothing is gained by waiting for the disk.
        let options = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            list.join(":"),
            upper.display(),
            work.display()
        );
        if options.len() > MAX_OPTIONS {
            return Err(io::Error::other(format!(
                "its {} layers need {} bytes of options, the kernel takes {MAX_OPTIONS}",
                list.len(),
                options.len()
            )));
        }
        mount(
            Some("overlay"),
            &self.target,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(())
    }

    /// Directory of what the container wrote.
    pub fn upper(&self) -> PathBuf {
        self.scratch.join("upper")
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Detached if something in the agent still looks at it; nothing of the container is left.
        if umount2(&self.target, MntFlags::UMOUNT_NOFOLLOW).is_err() {
            let _ = umount2(
                &self.target,
                MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
            );
        }
        let _ = fs::remove_dir(&self.target);
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// Takes a user namespace's descriptor where there is one.
pub(crate) fn borrow<T: AsFd>(descriptor: &Option<T>) -> Option<BorrowedFd<'_>> {
    descriptor.as_ref().map(AsFd::as_fd)
}
