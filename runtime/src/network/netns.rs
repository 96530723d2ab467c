//! Network namespaces that live by a bind mount, as `ip netns` makes them.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::NetworkError;
use crate::sandbox::ids::{self, UserIds};

/// Makes a network namespace and binds it to `path`. One that is there already is kept. With `ids` it belongs to a user
/// namespace that has them.
pub async fn create(id: &str, path: PathBuf, ids: Option<UserIds>) -> Result<(), NetworkError> {
    on_thread(id, "create the network namespace", move || {
        if is_namespace(&path) {
            return Ok(());
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::File::create(&path)?;
        let bind = |namespace: &str| {
            let none = None::<&str>;
            mount(Some(namespace), &path, none, MsFlags::MS_BIND, none)
        };
        if let Some(ids) = ids {
            let namespace = ids::network_namespace(&ids)?;
            return Ok(bind(&format!("/proc/self/fd/{}", namespace.as_raw_fd()))?);
        }
        // The thread ends after this, and with it the only other hold on the namespace.
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(bind("/proc/thread-self/ns/net")?)
    })
    .await
}

/// Unbinds and removes the namespace at `path`; one that is not there is no error.
pub async fn remove(id: &str, path: PathBuf) -> Result<(), NetworkError> {
    on_thread(id, "remove the network namespace", move || {
        loop {
            match umount2(&path, MntFlags::MNT_DETACH) {
                // Bound more than once by an interrupted attempt: once more.
                Ok(()) => continue,
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(e) => return Err(e.into()),
            }
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    })
    .await
}

/// Runs `work` on a thread of its own inside the namespace at `path`.
pub async fn inside<T: Send + 'static>(
    id: &str,
    step: &'static str,
    path: PathBuf,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NetworkError> {
    on_thread(id, step, move || {
        let file = fs::File::open(&path)?;
        setns(file, CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .await
}

/// Whether a namespace is bound there, and not just an empty file left by an interrupted attempt.
fn is_namespace(path: &Path) -> bool {
    const NSFS_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x6e73_6673);
    nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

/// A thread that changes its namespace must end, never go back to a pool.
async fn on_thread<T: Send + 'static>(
    id: &str,
    step: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NetworkError> {
    let host = |cause: String| NetworkError::Host {
        step,
        id: id.to_owned(),
        cause,
    };
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || done.send(work()).is_ok())
        .map_err(|e| host(e.to_string()))?;
    result
        .await
        .map_err(|_| host("its thread ended early".into()))?
        .map_err(|e| host(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_namespace_is_made_entered_and_removed() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ns");
        create("t", path.clone(), None).await.unwrap();
        create("t", path.clone(), None).await.unwrap();
        let links = inside("t", "look", path.clone(), || {
            Ok(fs::read_to_string("/proc/thread-self/net/dev")?
                .lines()
                .count())
        })
        .await
        .unwrap();
        assert_eq!(links, 3, "two lines of heading and lo");
        remove("t", path.clone()).await.unwrap();
        assert!(!path.exists());
        remove("t", path).await.unwrap();
    }
}
