//! What the process gives up before the guest runs: the host's files, its privileges, its identity.
//!
//! Afterwards it sees the share's root directory as `/` (an empty file system where there is no share),
//! is an unprivileged user of the host in a user namespace of its own, and holds only those capabilities
//! there that a file server needs for its clients' files. What the daemon shows later it mounts below the
//! share's root in our mount namespace, which is left to the host's user namespace and so to its root.
//!
//! Threads, memory that is locked, message queues and core dumps are limited, and Landlock, where the kernel has it, says
//! once more what the namespaces say.
//!
//! Two steps, because a file server opens `/proc/self/fd` when it is made: [`Jail::prepare`] makes the
//! root, still with the host's `/` around it, and [`Jail::enter`] goes in. Both want a process with one
//! thread.

mod landlock;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use caisson_vmm_protocol::JailConfig;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{
    ForkResult, Gid, Uid, chdir, fchdir, fork, pivot_root, setgroups, setresgid, setresuid,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs,
};

/// What the file server does on behalf of its clients, inside our user namespace.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);
/// All user or group IDs, each mapped to itself.
const IDENTITY_MAP: &[u8] = b"0 0 4294967295\n";

/// The most threads: vCPUs, devices, containers' logs, and clients of the control socket.
const MAX_THREADS: u64 = 1024;

/// A step of the jail that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("the jail cannot {step}: {source}; caisson serve must run as root")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}

/// A root directory to go into.
pub struct Jail {
    root: OwnedFd,
    serves_files: bool,
}

impl Jail {
    /// Leaves the host's mount namespace and makes the new root a mount of its own. The host's files are
    /// still in reach.
    ///
    /// # Errors
    /// [`JailError`] names the step.
    pub fn prepare(share: Option<BorrowedFd<'_>>) -> Result<Self, JailError> {
        if let Some(share) = share {
            // The working directory follows into the new namespace; a descriptor would stay in the old one.
            fchdir(share).map_err(step("enter the share's root directory"))?;
        }
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("leave the host's mount namespace"))?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
            .map_err(step("keep its mounts from the host"))?;
        let root = match share {
            Some(_) => open_tree(
                rustix::fs::CWD,
                ".",
                OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE,
            )
            .map_err(step("mount the share's root directory"))?,
            None => empty_root().map_err(step("mount an empty root directory"))?,
        };
        move_mount(
            &root,
            "",
            rustix::fs::CWD,
            "/",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(step("place its root directory"))?;
        Ok(Self {
            root,
            serves_files: share.is_some(),
        })
    }

    /// The new root directory, for a file server that is made before [`Jail::enter`].
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Goes in: the new root, the namespaces, the identity, the capabilities, the limits. Returns the version of
    /// Landlock that is in force; 0: this kernel has none.
    ///
    /// # Errors
    /// [`JailError`] names the step. The process must end then.
    pub fn enter(self, identity: &JailConfig) -> Result<u32, JailError> {
        let own_proc = open(
            &*CString::from(c"/proc/self"),
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(step("open /proc/self"))?;
        fchdir(&self.root).map_err(step("enter its root directory"))?;
        drop(self.root);
        pivot_root(".", ".").map_err(step("make its root directory the root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(step("let go of the host's root"))?;
        chdir("/").map_err(step("enter its root directory"))?;
        leave_user_namespace(own_proc)?;
        unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
            .map_err(step("leave the host's IPC and UTS namespaces"))?;
        drop_privileges(identity, self.serves_files)?;
        limit_resources().map_err(step("limit its resources"))?;
        landlock::confine(self.serves_files).map_err(step("confine itself by Landlock"))
    }
}

fn empty_root() -> Result<OwnedFd, rustix::io::Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "size", "4k")?;
    fsconfig_set_string(&context, "mode", "0555")?;
    fsconfig_create(&context)?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// Moves into a new user namespace in which every ID is what it was. A map of all IDs can be written only
/// from the parent namespace, so a child stays behind for as long as that takes.
fn leave_user_namespace(own_proc: OwnedFd) -> Result<(), JailError> {
    let (mut unshared, mut tell) = io::pipe().map_err(step("make a pipe"))?;
    // SAFETY: this process has one thread, so the child may do anything; it writes two files and exits.
    let child = match unsafe { fork() }.map_err(step("start the process that maps user IDs"))? {
        ForkResult::Child => {
            drop(tell);
            let done = unshared
                .read_exact(&mut [0])
                .and_then(|()| write_map(&own_proc, "uid_map"))
                .and_then(|()| write_map(&own_proc, "gid_map"));
            let status = done.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => child,
    };
    drop(unshared);
    let told = unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(step("leave the host's user namespace"))
        .and_then(|()| {
            tell.write_all(&[1])
                .map_err(step("have its user IDs mapped"))
        });
    drop(tell);
    let status = waitpid(child, None).map_err(step("have its user IDs mapped"))?;
    told?;
    match status {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, errno) => Err(step("map its user IDs")(
            io::Error::from_raw_os_error(errno),
        )),
        _ => Err(step("map its user IDs")(io::Error::from(
            io::ErrorKind::Interrupted,
        ))),
    }
}

fn write_map(own_proc: &OwnedFd, name: &str) -> io::Result<()> {
    let file = openat(
        own_proc,
        name,
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    // The kernel takes a map in one write or not at all.
    match File::from(file).write(IDENTITY_MAP)? {
        n if n == IDENTITY_MAP.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn drop_privileges(identity: &JailConfig, serves_files: bool) -> Result<(), JailError> {
    let keep = if serves_files {
        FILE_SERVER
    } else {
        CapabilitySet::empty()
    };
    // The file server changes its identity for each client; its capabilities must not change with it.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED,
    )
    .map_err(step("fix its capabilities"))?;
    for capability in CapabilitySet::all() {
        if !keep.contains(capability) {
            match remove_capability_from_bounding_set(capability) {
                // A capability that is newer than this kernel.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(e) => return Err(step("drop capabilities")(e)),
            }
        }
    }
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setgroups(&[]).map_err(step("leave its groups"))?;
    setresgid(gid, gid, gid).map_err(step("become an unprivileged group"))?;
    setresuid(uid, uid, uid).map_err(step("become an unprivileged user"))?;
    clear_ambient_capability_set().map_err(step("drop capabilities"))?;
    let sets = CapabilitySets {
        effective: keep,
        permitted: keep,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("refuse new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("refuse to be traced"))
}

/// What its work does not need. Descriptors are limited before: see [`crate::process`].
fn limit_resources() -> nix::Result<()> {
    for (resource, most) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_NPROC, MAX_THREADS),
    ] {
        setrlimit(resource, most, most)?;
    }
    Ok(())
}
