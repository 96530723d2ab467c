//! Shared mounts, the scratch space of writable layers, and the pod's `/dev/shm`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::plan::{Scratch, SharedMount};
use super::{Context, SandboxError, create_dir};
use crate::{disks, paths};

/// How long a disk may take to appear after the agent runs.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);
/// The pod's `/dev/shm`, as other runtimes size it.
const SHM_SIZE: &str = "mode=1777,size=64m";

/// Mounts virtio-fs devices by tag.
pub fn mount_shared(mounts: &[SharedMount]) -> Result<(), SandboxError> {
    for shared in mounts {
        create_dir(&shared.path)?;
        let mut flags = MsFlags::MS_NODEV;
        if shared.read_only {
            flags |= MsFlags::MS_RDONLY;
        }
        mount(
            Some(shared.tag.as_str()),
            &shared.path,
            Some("virtiofs"),
            flags,
            None::<&str>,
        )
        .context(|| {
            format!(
                "mount the shared directory {} on {}",
                shared.tag,
                shared.path.display()
            )
        })?;
        // What a container mounts there with bidirectional propagation is for the others, too.
        mount(
            None::<&str>,
            &shared.path,
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .context(|| format!("share mounts below {}", shared.path.display()))?;
    }
    Ok(())
}

/// Unmounts virtio-fs devices. What a container has mounted there with bidirectional propagation is in use.
pub fn unmount_shared() -> Result<(), SandboxError> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")
        .context(|| "read the mounts of the agent".into())?;
    // Source, mount point, type (proc(5)). The agent's own mount points have no characters that are written otherwise.
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some(point), Some("virtiofs")) = (words.next(), words.next()) {
            umount2(point, MntFlags::empty()).context(|| {
                format!("unmount the shared directory on {point}, which a container uses")
            })?;
        }
    }
    Ok(())
}

/// Mounts the place of writable layers.
pub fn mount_scratch(scratch: &Scratch) -> Result<(), SandboxError> {
    create_dir(paths::SCRATCH)?;
    match scratch {
        Scratch::Disk(serial) => {
            let device = find_disk(serial).context(|| format!("find the scratch disk {serial}"))?;
            mount(
                Some(&device),
                paths::SCRATCH,
                Some("ext4"),
                MsFlags::MS_NOATIME,
                Some(disks::SCRATCH_OPTIONS),
            )
            .context(|| format!("mount {} on {}", device.display(), paths::SCRATCH))
        }
        Scratch::Tmpfs(size) => {
            let options = match size {
                0 => "mode=0755".to_owned(),
                size => format!("mode=0755,size={size}"),
            };
            mount(
                Some("tmpfs"),
                paths::SCRATCH,
                Some("tmpfs"),
                MsFlags::MS_NOATIME,
                Some(options.as_str()),
            )
            .context(|| format!("mount a tmpfs on {}", paths::SCRATCH))
        }
    }
}

/// Mounts the pod's shared memory.
pub fn mount_shm() -> Result<(), SandboxError> {
    let path = Path::new(paths::SANDBOX).join("shm");
    create_dir(&path)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), &path, Some("tmpfs"), flags, Some(SHM_SIZE))
        .context(|| format!("mount a tmpfs on {}", path.display()))
}

/// The device node of the virtio-blk disk with this serial. A hot-plugged one can come a moment later.
fn find_disk(serial: &str) -> io::Result<PathBuf> {
    let deadline = Instant::now() + DISK_TIMEOUT;
    loop {
        match disks::find(serial) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            found => return found,
        }
    }
}

/// Unmounts everything below the agent's directory, the latest first.
pub fn unmount_all() {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mounts") else {
        return;
    };
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let below = points.filter(|point| point.starts_with(paths::BASE));
    let mut below: Vec<&str> = below.collect();
    below.reverse();
    for point in below {
        if umount2(point, MntFlags::empty()).is_err() {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}
