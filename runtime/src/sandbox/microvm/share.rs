//! The share: what of the host a guest sees over virtio-fs.
//!
//! Its root is a read-only bind mount that the daemon alone can put mount points into. A volume or layer is a
//! detached mount that gets its flags (read-only, nosuid) first and is moved into place then, because the pod
//! process gets a copy by mount propagation, and later changes of flags do not propagate.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::SandboxError;
use super::dir::PodDir;

/// Where the guest mounts the share.
pub const GUEST_PATH: &str = "/run/caisson/share";
/// The most volumes of one container.
const MAX_VOLUMES: u32 = 1024;

/// A pod's share.
#[derive(Clone, Debug)]
pub struct Share {
    id: Arc<str>,
    source: PathBuf,
    root: PathBuf,
    changing: Arc<tokio::sync::Mutex<()>>,
}

impl Share {
    /// The share of this pod.
    pub fn new(id: &str, dir: &PodDir) -> Self {
        Self {
            id: id.into(),
            source: dir.share_source(),
            root: dir.share(),
            changing: Arc::default(),
        }
    }

    /// Makes the empty share and opens its root.
    pub fn create(&self) -> io::Result<OwnedFd> {
        fs::create_dir_all(self.source.join("layers"))?;
        fs::create_dir_all(self.source.join("c"))?;
        fs::create_dir_all(&self.root)?;
        let none = None::<&str>;
        mount(Some(&self.source), &self.root, none, MsFlags::MS_BIND, none)?;
        // A peer group of its own: what is mounted here later reaches the pod process and nothing else.
        mount(none, &self.root, none, MsFlags::MS_PRIVATE, none)?;
        mount(none, &self.root, none, MsFlags::MS_SHARED, none)?;
        let read_only = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount(none, &self.root, none, read_only, none)?;
        Ok(fs::File::open(&self.root)?.into())
    }

    /// Shows an image layer, read-only; its path in the guest.
    pub async fn layer(&self, layer: &Path) -> Result<String, SandboxError> {
        let error = |cause: String| self.error(layer, cause);
        let name = layer
            .file_name()
            .and_then(|n| n.to_str())
            .ok_or_else(|| error("its name is not text".into()))?;
        let inside = format!("layers/{name}");
        let _one_at_a_time = self.changing.lock().await;
        let (share, path, place) = (self.clone(), layer.to_owned(), inside.clone());
        blocking(move || {
            if share.source.join(&place).exists() {
                return Ok(());
            }
            share.attach(&path, &place, true, true)
        })
        .await
        .map_err(|e| error(e.to_string()))?;
        Ok(format!("{GUEST_PATH}/{inside}"))
    }

    /// Shows a file or directory of the host; its path in the guest.
    pub async fn volume(
        &self,
        container_id: &str,
        host_path: &Path,
        read_only: bool,
    ) -> Result<String, SandboxError> {
        let _one_at_a_time = self.changing.lock().await;
        let (share, path, container) =
            (self.clone(), host_path.to_owned(), container_id.to_owned());
        blocking(move || {
            let place = share.free_place(&container)?;
            share.attach(&path, &place, read_only, false)?;
            Ok(format!("{GUEST_PATH}/{place}"))
        })
        .await
        .map_err(|e| self.error(host_path, e.to_string()))
    }

    /// Takes away the volumes of a container. Layers stay until the pod goes: others may use them.
    pub async fn unshare(&self, container_id: &str) -> Result<(), SandboxError> {
        let _one_at_a_time = self.changing.lock().await;
        let (share, container) = (self.clone(), container_id.to_owned());
        blocking(move || share.detach_all(&container))
            .await
            .map_err(|e| self.error(Path::new(container_id), e.to_string()))
    }

    /// Unmounts the share with everything in it. Idempotent.
    pub async fn remove_all(&self) -> Result<(), SandboxError> {
        let _one_at_a_time = self.changing.lock().await;
        let root = self.root.clone();
        blocking(move || detach(&root))
            .await
            .map_err(|e| self.error(&self.root, e.to_string()))
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
        fs::create_dir_all(self.source.join("c").join(container_id))?;
        (0..MAX_VOLUMES)
            .map(|n| format!("c/{container_id}/{n}"))
            .find(|place| !self.source.join(place).exists())
            .ok_or_else(|| {
                io::Error::other(format!("the container has {MAX_VOLUMES} volumes already"))
            })
    }

    /// Mounts `path` at `place` of the share.
    fn attach(&self, path: &Path, place: &str, read_only: bool, single: bool) -> io::Result<()> {
        let kind = fs::metadata(path)?.file_type();
        if kind.is_socket() {
            return Err(io::Error::other(
                "it is a socket, and a socket of the host cannot be reached from a virtual machine",
            ));
        }
        if !kind.is_dir() && !kind.is_file() {
            return Err(io::Error::other("it is neither a file nor a directory"));
        }
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if !single {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, path, flags)?;
        set_attributes(&tree, read_only)?;
        let point = self.source.join(place);
        if kind.is_dir() {
            fs::create_dir(&point)?;
        } else {
            fs::File::create(&point)?;
        }
        let moved = move_mount(
            &tree,
            "",
            CWD,
            self.root.join(place),
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        );
        if let Err(error) = moved {
            let _ = remove_point(&point);
            return Err(error.into());
        }
        Ok(())
    }

    fn detach_all(&self, container_id: &str) -> io::Result<()> {
        let points = self.source.join("c").join(container_id);
        let entries = match fs::read_dir(&points) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let place = Path::new("c").join(container_id).join(entry.file_name());
            detach(&self.root.join(&place))?;
            remove_point(&entry.path())?;
        }
        fs::remove_dir(points)
    }
}

/// Unmounts what is mounted there, with all below it; nothing there is no error.
fn detach(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
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

/// Sets a detached mount tree's flags, recursively, and cuts it off from later mounts on the host.
fn set_attributes(tree: &OwnedFd, read_only: bool) -> io::Result<()> {
    let mut attributes = nix::libc::mount_attr {
        attr_set: nix::libc::MOUNT_ATTR_NOSUID | nix::libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: nix::libc::MS_PRIVATE,
        userns_fd: 0,
    };
    if read_only {
        attributes.attr_set |= nix::libc::MOUNT_ATTR_RDONLY;
    }
    let empty = CString::default();
    // SAFETY: the path is a NUL-terminated string, and the kernel reads `size_of` bytes of the structure, which
    // lives until the call returns.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            nix::libc::AT_EMPTY_PATH | nix::libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<nix::libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(dir: &Path) -> Share {
        Share {
            id: "p".into(),
            source: dir.join("share.host"),
            root: dir.join("share"),
            changing: Arc::default(),
        }
    }

    #[tokio::test]
    async fn volumes_and_layers_come_and_go() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let share = share(temp.path());
        share.create().unwrap();
        let host = temp.path().join("volume");
        fs::create_dir(&host).unwrap();
        fs::write(host.join("f"), "x").unwrap();
        let layer = temp.path().join("l.erofs");
        fs::write(&layer, "layer").unwrap();

        let read_only = share.volume("c1", &host, true).await.unwrap();
        let writable = share.volume("c1", &host, false).await.unwrap();
        assert_eq!(read_only, "/run/caisson/share/c/c1/0");
        assert_eq!(writable, "/run/caisson/share/c/c1/1");
        assert!(fs::write(share.root.join("c/c1/0/f"), "y").is_err());
        fs::write(share.root.join("c/c1/1/f"), "y").unwrap();
        assert_eq!(fs::read_to_string(host.join("f")).unwrap(), "y");
        assert!(fs::write(share.root.join("own"), "y").is_err());
        for _ in 0..2 {
            share.layer(&layer).await.unwrap();
        }
        assert!(fs::write(share.root.join("layers/l.erofs"), "y").is_err());

        let socket = temp.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = share.volume("c1", &socket, false).await.unwrap_err();
        assert!(error.to_string().contains("is a socket"), "{error}");
        assert!(
            share
                .volume("c1", &temp.path().join("no"), false)
                .await
                .is_err()
        );

        share.unshare("c1").await.unwrap();
        share.unshare("c1").await.unwrap();
        assert!(!share.root.join("c/c1").exists());
        assert_eq!(fs::read_to_string(host.join("f")).unwrap(), "y");
        share.remove_all().await.unwrap();
        share.remove_all().await.unwrap();
        assert_eq!(super::super::dir::mounted_below(temp.path()).unwrap(), None);
    }
}
