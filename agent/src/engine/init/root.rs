//! The root file system: made the root of the new mount namespace with pivot_root(2).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use super::resolve::Tree;
use super::{During, Step, mounts};
use crate::engine::sys;

const NONE: Option<&str> = None;

/// Sets what passes between this mount namespace and the agent's, and mounts the root file system on itself, so that
/// it is a mount of this namespace's own.
pub(super) fn prepare(rootfs: &Path, propagation: Option<MsFlags>) -> Result<Tree, Step> {
    // Shared is the one wish that needs the agent's mounts as they are: they are the other end.
    let shared = propagation.is_some_and(|flags| flags.contains(MsFlags::MS_SHARED));
    if !shared {
        let flags = propagation
            .filter(|flags| flags.contains(MsFlags::MS_PRIVATE))
            .map_or(MsFlags::MS_SLAVE, |_| MsFlags::MS_PRIVATE);
        mount(NONE, "/", NONE, flags | MsFlags::MS_REC, NONE)
            .during(|| "detach the agent's mounts".into())?;
    }
    // pivot_root refuses a new root that is shared or whose parent is.
    mount(NONE, rootfs, NONE, MsFlags::MS_PRIVATE, NONE)
        .during(|| format!("make {} private", rootfs.display()))?;
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let below =
        open(rootfs, directory, Mode::empty()).during(|| format!("open {}", rootfs.display()))?;
    let copy = sys::clone_tree(std::os::fd::AsFd::as_fd(&below), c"", true)
        .during(|| "copy the root mount".into())?;
    sys::attach(
        std::os::fd::AsFd::as_fd(&copy),
        std::os::fd::AsFd::as_fd(&below),
    )
    .during(|| "attach the root mount".into())?;
    Ok(Tree::new(copy))
}

/// Makes the tree the root and forgets the old one.
pub(super) fn change(tree: Tree) -> Result<(), Step> {
    let old: OwnedFd = File::open("/")
        .during(|| "open the old root".into())?
        .into();
    nix::unistd::fchdir(&tree).during(|| "enter the new root".into())?;
    drop(tree);
    // The old root is put on top of the new one, where a descriptor still leads to it.
    nix::unistd::pivot_root(".", ".").during(|| "change the root".into())?;
    nix::unistd::fchdir(&old).during(|| "enter the old root".into())?;
    // Unmounting must not reach the agent.
    mount(NONE, ".", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)
        .during(|| "detach the old root".into())?;
    umount2(".", MntFlags::MNT_DETACH).during(|| "unmount the old root".into())?;
    nix::unistd::chdir("/").during(|| "enter the root".into())
}

/// Gives the root its final propagation and its write protection.
pub(super) fn settle(propagation: MsFlags, readonly: bool) -> Result<(), Step> {
    if !propagation.is_empty() {
        mount(NONE, "/", NONE, propagation, NONE)
            .during(|| "set linux.rootfsPropagation".into())?;
    }
    if readonly {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open("/", flags, Mode::empty()).during(|| "open the root".into())?;
        mounts::make_read_only(&root, false).during(|| "make the root read-only".into())?;
    }
    Ok(())
}
