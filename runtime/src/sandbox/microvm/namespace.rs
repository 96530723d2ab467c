//! The pod process's mount namespace, in which the share's volumes are mounted.
//!
//! A mount of the host's own namespace would make every mount point below a volume busy there: with a volume of `/` no
//! other pod's volumes could be removed. The pod's namespace ends with its process, and what is mounted there with it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};

use crate::sandbox::pod::dir::PodDir;
use crate::sandbox::pod::process;

/// Does `work` where `/` is the pod's share, on a thread of its own: only one that shares nothing with others can
/// change its namespace. `None` if the pod process has ended.
pub fn run<T: Send>(
    dir: &PodDir,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<Option<T>> {
    let Some(namespace) = open(dir)? else {
        return Ok(None);
    };
    let share = identity(&fs::metadata(dir.share_source())?);
    let inside = || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        if identity(&fs::metadata("/")?) != share {
            return Err(io::Error::other("the pod process is not in its share"));
        }
        work().map(Some)
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("pod-mounts".into())
            .spawn_scoped(scope, inside)?
            .join()
            .map_err(|_| io::Error::other("the thread that mounts has panicked"))?
    })
}

/// Which file it is, wherever it is mounted.
pub fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn open(dir: &PodDir) -> io::Result<Option<File>> {
    let Some(pid) = process::find(dir) else {
        return Ok(None);
    };
    let namespace = match File::open(Path::new("/proc").join(pid.to_string()).join("ns/mnt")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // Found again, it had its number all the time, so this namespace is no other process's.
    Ok((process::find(dir) == Some(pid)).then_some(namespace))
}
