//! Root file systems: read-only layers under a writable one, stacked with overlayfs
//! (Documentation/filesystems/overlayfs.rst of the kernel).

mod disk;
mod layers;
mod loopdev;
mod memory;
mod volume;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::error::EngineError;
use super::paths;
use crate::disks;
pub use disk::DiskRange;
pub use layers::Layer;
use layers::LayerMount;
pub use memory::{Directory, MemoryVolume};
pub use volume::ImageVolume;
use volume::VolumeMount;

/// Layers an image can have, as in other runtimes.
const MAX_LAYERS: usize = 127;
/// Images a container can have as volumes, and volumes in memory.
const MAX_VOLUMES: usize = 512;
/// The kernel takes one page of options, with a NUL at the end.
const MAX_OPTIONS: usize = 4095;

/// What a container's root file system is made of, and its volumes that are no shared mounts.
#[derive(Debug, Clone, Default)]
pub struct RootFs {
    /// EROFS images, lowest first.
    pub layers: Vec<Layer>,
    /// Images that the spec's mounts find in [`paths::Paths::volumes`].
    pub volumes: Vec<ImageVolume>,
    /// Volumes in memory, found there too.
    pub memory: Vec<MemoryVolume>,
}

/// A mounted root file system.
#[derive(Debug)]
pub(crate) struct Mounted {
    target: PathBuf,
    scratch: PathBuf,
    /// Unmounted when they are dropped, after the overlay.
    layers: Vec<LayerMount>,
    _volumes: Vec<VolumeMount>,
}

impl Mounted {
    /// Mounts a container's root file system; with `ids`, as the user namespace it is a descriptor of sees it.
    ///
    /// # Errors
    /// If a layer is missing or no EROFS image, or a mount is refused; nothing stays mounted then.
    pub fn mount(
        id: &str,
        rootfs: &RootFs,
        ids: Option<BorrowedFd<'_>>,
    ) -> Result<Self, EngineError> {
        for (count, kind) in [
            (rootfs.volumes.len(), "images as volumes"),
            (rootfs.memory.len(), "volumes in memory"),
        ] {
            if count > MAX_VOLUMES {
                return Err(EngineError::Argument(format!(
                    "{id} has {count} {kind}; at most {MAX_VOLUMES} are possible"
                )));
            }
        }
        let layers = mount_layers(&rootfs.layers, ids)?;
        let images = (0..)
            .zip(&rootfs.volumes)
            .map(|(number, volume)| VolumeMount::mount(id, number, volume, ids));
        let memory = (0..)
            .zip(&rootfs.memory)
            .map(|(number, volume)| VolumeMount::of_memory(id, number, volume));
        let volumes = images.chain(memory).collect::<Result<_, _>>()?;
        let (target, scratch) = (paths::get().rootfs(id), paths::get().scratch(id));
        let what = format!("mount the root file system {}", target.display());
        let mounted = Self {
            target,
            scratch,
            layers,
            _volumes: volumes,
        };
        // From here on, dropping it undoes what was done.
        mounted
            .overlay(ids.is_some())
            .map_err(|error| EngineError::system(what, error))?;
        Ok(mounted)
    }

    fn overlay(&self, mapped: bool) -> io::Result<()> {
        let lower = places(&self.layers, mapped);
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
        // Volatile: what a container wrote is gone with it, so nothing is gained by waiting for the disk.
        let writable = format!(
            ",upperdir={},workdir={},volatile",
            upper.display(),
            work.display()
        );
        stack(&lower, &writable, &self.target, MsFlags::empty())
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
        // Nothing of the container is left.
        unmount(&self.target);
        let _ = fs::remove_dir(&self.target);
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// Mounts the layers of an image, the lowest first; with `ids` each is preceded by a view of it with these.
fn mount_layers(
    images: &[Layer],
    ids: Option<BorrowedFd<'_>>,
) -> Result<Vec<LayerMount>, EngineError> {
    if images.is_empty() || images.len() > MAX_LAYERS {
        return Err(EngineError::Argument(format!(
            "an image has {} layers; it needs between 1 and {MAX_LAYERS}",
            images.len()
        )));
    }
    let mut layers = Vec::with_capacity(images.len());
    for image in images {
        let layer = LayerMount::of_image(image)?;
        if let Some(namespace) = ids {
            layers.push(layer.with_ids_of(namespace)?);
        }
        layers.push(layer);
    }
    Ok(layers)
}

/// Where [`mount_layers`] has mounted what a container sees, the lowest first.
fn places(layers: &[LayerMount], mapped: bool) -> Vec<&Path> {
    layers
        .iter()
        .step_by(if mapped { 2 } else { 1 })
        .map(|layer| layer.path.as_path())
        .collect()
}

/// Mounts layers, the lowest first, one on the other.
fn stack(lower: &[&Path], more: &str, target: &Path, flags: MsFlags) -> io::Result<()> {
    let list: Vec<_> = lower
        .iter()
        .rev()
        .map(|path| path.to_string_lossy())
        .collect();
    let options = format!("lowerdir={}{more}", list.join(":"));
    if options.len() > MAX_OPTIONS {
        return Err(io::Error::other(format!(
            "its {} layers need {} bytes of options, the kernel takes {MAX_OPTIONS}",
            list.len(),
            options.len()
        )));
    }
    let overlay = Some("overlay");
    mount(overlay, target, overlay, flags, Some(options.as_str()))?;
    Ok(())
}

/// Mounts an ext4 file system that is in a file, for the writable layers. It goes with its last mount.
///
/// # Errors
/// If the file cannot be written, or holds no such file system.
pub fn mount_scratch(file: &Path, place: &Path) -> io::Result<()> {
    let file = fs::File::options().read(true).write(true).open(file)?;
    let part = loopdev::Part {
        writable: true,
        ..loopdev::Part::default()
    };
    let device = loopdev::attach(&file, part)?;
    let flags = MsFlags::MS_NOATIME;
    let options = Some(disks::SCRATCH_OPTIONS);
    Ok(mount(
        Some(&device.path),
        place,
        Some("ext4"),
        flags,
        options,
    )?)
}

/// Takes a mount away; detached if something in the agent still looks at it.
fn unmount(target: &Path) {
    if umount2(target, MntFlags::UMOUNT_NOFOLLOW).is_err() {
        let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// Takes a user namespace's descriptor where there is one.
pub(crate) fn borrow<T: AsFd>(descriptor: &Option<T>) -> Option<BorrowedFd<'_>> {
    descriptor.as_ref().map(AsFd::as_fd)
}
