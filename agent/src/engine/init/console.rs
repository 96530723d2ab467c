//! The terminal of a process: a pseudo-terminal of the container's own devpts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::statfs::fstatfs;
use nix::unistd::{Uid, fchown};

use super::resolve::Tree;
use super::{During, Step};
use crate::engine::spec::Process;
use crate::engine::sys;

/// Of linux/magic.h.
const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Both ends.
pub(super) struct Terminal {
    /// The agent's.
    pub master: OwnedFd,
    /// The process's.
    pub slave: OwnedFd,
}

/// Opens a terminal in the container's `/dev/pts`.
pub(super) fn open(tree: &Tree, process: &Process) -> Result<Terminal, Step> {
    let opened = || -> io::Result<Terminal> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let master = tree.open("/dev/pts/ptmx", flags)?;
        // What an image or the container has put there could be any file.
        if fstatfs(&master)?.filesystem_type().0 != DEVPTS_SUPER_MAGIC {
            return Err(io::Error::other("it is not on a devpts"));
        }
        sys::unlock_terminal(master.as_fd())?;
        let slave = sys::terminal_peer(master.as_fd())?;
        if let Some(size) = process.console_size {
            sys::set_terminal_size(master.as_fd(), size.height, size.width)?;
        }
        Ok(Terminal { master, slave })
    };
    opened().during(|| {
        "open a terminal at /dev/pts/ptmx (process.terminal needs a devpts in mounts)".into()
    })
}

impl Terminal {
    /// Makes the process's end the user's own.
    pub fn give_to(&self, uid: u32) -> Result<(), Step> {
        fchown(&self.slave, Some(Uid::from_raw(uid)), None)
            .during(|| format!("give the terminal to user {uid}"))
    }

    /// Shows the process's end as `/dev/console`.
    pub fn show_as_console(&self, tree: &Tree) -> Result<(), Step> {
        let show = || -> io::Result<()> {
            let place = tree.file("/dev/console")?;
            let copy = sys::clone_tree(self.slave.as_fd(), c"", false)?;
            sys::attach(copy.as_fd(), place.as_fd())
        };
        show().during(|| "make /dev/console".into())
    }

    /// Makes it the standard streams and the controlling terminal of the calling session leader.
    pub fn take(&self) -> Result<(), Step> {
        let take = || -> io::Result<()> {
            sys::take_terminal(self.slave.as_fd())?;
            nix::unistd::dup2_stdin(&self.slave)?;
            nix::unistd::dup2_stdout(&self.slave)?;
            nix::unistd::dup2_stderr(&self.slave)?;
            Ok(())
        };
        take().during(|| "make the terminal the controlling one".into())
    }
}
