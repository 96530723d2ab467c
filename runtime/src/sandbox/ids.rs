//! IDs of a pod that are others outside of it, and the user namespaces by which the host's kernel knows that.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getpid};
use tokio::sync::OnceCell;

/// A range of IDs. The pod counts them from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IdRange {
    /// The first, outside of the pod.
    pub first: u32,
    /// How many; at least 1.
    pub length: u32,
}

/// The users and groups of a pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UserIds {
    /// Users.
    pub uids: IdRange,
    /// Groups.
    pub gids: IdRange,
}

/// A user namespace with these IDs. Blocks.
///
/// # Errors
/// If the kernel refuses one.
pub fn user_namespace(ids: &UserIds) -> io::Result<File> {
    make(ids, CloneFlags::CLONE_NEWUSER, "user")
}

/// A network namespace that belongs to a user namespace with these IDs. Blocks.
///
/// # Errors
/// If the kernel refuses one.
pub fn network_namespace(ids: &UserIds) -> io::Result<File> {
    make(
        ids,
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET,
        "net",
    )
}

/// Only a process of one thread can enter a user namespace, so a copy of this one does, and ends when its namespace is
/// open here.
fn make(ids: &UserIds, new: CloneFlags, name: &str) -> io::Result<File> {
    let parent = getpid();
    let (mut entered, tell) = io::pipe()?;
    // SAFETY: the child makes only system calls, on what was made before, and never returns.
    let child = match unsafe { fork() }? {
        ForkResult::Child => stay(new, &tell, parent),
        ForkResult::Parent { child } => child,
    };
    drop(tell);
    let opened = (|| {
        let mut error = [0];
        entered.read_exact(&mut error)?;
        if error != [0] {
            return Err(io::Error::from_raw_os_error(error[0].into()));
        }
        for (file, range) in [("uid_map", ids.uids), ("gid_map", ids.gids)] {
            // The kernel takes a map in one write or not at all.
            let line = format!("0 {} {}\n", range.first, range.length);
            fs::write(format!("/proc/{child}/{file}"), line)?;
        }
        File::open(format!("/proc/{child}/ns/{name}"))
    })();
    kill(child, Signal::SIGKILL)?;
    waitpid(child, None)?;
    opened
}

/// The child: enters the namespaces, says how that went, and waits for its end.
fn stay(new: CloneFlags, tell: &io::PipeWriter, parent: Pid) -> ! {
    let error = unshare(new).err().map_or(0, |errno| errno as i32);
    // Error numbers are below 134 (errno(3)).
    let byte = [error as u8];
    // SAFETY: system calls with numbers, and one byte that lives until the call returns.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() == parent.as_raw() {
            libc::write(tell.as_raw_fd(), byte.as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        libc::_exit(0)
    }
}

/// Whether this machine can map the IDs of pods, and of volumes on the file system of `directory`. Found out once.
pub async fn usable(directory: &Path) -> bool {
    static USABLE: OnceCell<bool> = OnceCell::const_new();
    let directory = directory.to_owned();
    *USABLE
        .get_or_init(|| async {
            let tried = tokio::task::spawn_blocking(move || super::microvm::try_ids(&directory));
            let tried = tried.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            tried
                .inspect_err(|error| {
                    tracing::warn!(%error, "pods with user namespaces are not possible on this machine");
                })
                .is_ok()
        })
        .await
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const IDS: UserIds = UserIds {
        uids: IdRange {
            first: 100_000,
            length: 65_536,
        },
        gids: IdRange {
            first: 200_000,
            length: 65_536,
        },
    };

    #[test]
    fn a_network_namespace_belongs_to_a_user_namespace_that_is_not_ours() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        const NS_GET_USERNS: libc::Ioctl = 0xb701;
        let identity = |file: &File| {
            let meta = file.metadata().unwrap();
            (meta.dev(), meta.ino())
        };
        let own = identity(&File::open("/proc/self/ns/user").unwrap());
        // Several at once: none keeps another from ending.
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    assert_ne!(identity(&user_namespace(&IDS).unwrap()), own);
                    let network = network_namespace(&IDS).unwrap();
                    // SAFETY: this request takes no argument and returns a new descriptor.
                    let owner = unsafe {
                        let owner = libc::ioctl(network.as_raw_fd(), NS_GET_USERNS);
                        assert!(owner >= 0);
                        File::from_raw_fd(owner)
                    };
                    assert_ne!(identity(&owner), own);
                });
            }
        });
        let impossible = UserIds {
            uids: IdRange {
                first: u32::MAX,
                length: 2,
            },
            ..IDS
        };
        assert!(user_namespace(&impossible).is_err());
    }
}
