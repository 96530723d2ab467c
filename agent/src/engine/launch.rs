//! Starting the process that becomes a container's: the agent's own program anew, in a clean process of one thread.
//!
//! A copy of the running agent could do next to nothing safely (it has threads, and other threads' locks), so
//! between fork and exec nothing happens but the placing of descriptors.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::channel::Channel;
use super::error::EngineError;
use super::plan::Plan;
use super::{Stdio, paths};

/// First argument of the agent's program when the engine starts it: `main` must then call [`super::init_main`] before
/// anything else.
pub const INIT: &str = "container-init";

/// Where the started process finds its end of the channel; the plan, the control group and the namespace or
/// process to join, and the host's mount namespace follow.
pub(crate) const CHANNEL: RawFd = 3;
/// The plan as JSON.
pub(crate) const PLAN: RawFd = 4;
/// The control group's directory.
pub(crate) const CGROUP: RawFd = 5;
/// A user namespace, or a process whose namespaces are joined.
pub(crate) const TARGET: RawFd = 6;
/// The host's mount namespace, of an agent that runs there.
pub(crate) const HOST: RawFd = 7;

/// A started process.
pub(crate) struct Launched {
    /// Its number. It ends once it has made the container's process, or its hooks have run.
    pub pid: i32,
    /// The agent's end.
    pub channel: Channel,
}

/// Starts the process.
///
/// # Errors
/// If a descriptor cannot be made or the fork fails; a failing exec shows as the channel's end.
pub(crate) fn launch(
    plan: &Plan,
    stdio: &Stdio,
    cgroup: Option<BorrowedFd<'_>>,
    target: Option<BorrowedFd<'_>>,
) -> Result<Launched, EngineError> {
    prepare(plan, stdio, cgroup, target)
        .map_err(|error| EngineError::system("start a container's process", error))
}

fn prepare(
    plan: &Plan,
    stdio: &Stdio,
    cgroup: Option<BorrowedFd<'_>>,
    target: Option<BorrowedFd<'_>>,
) -> io::Result<Launched> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let (ours, theirs) = Channel::pair()?;
    let mut document = File::from(memfd_create(c"plan", MFdFlags::MFD_CLOEXEC)?);
    serde_json::to_writer(io::BufWriter::new(&document), plan)?;
    document.flush()?;
    document.seek(SeekFrom::Start(0))?;
    let or_null = |one: &Option<OwnedFd>| match one {
        Some(one) => above(one.as_fd()),
        None => above(null.as_fd()),
    };
    // In the order of their final numbers.
    let sources = [
        or_null(&stdio.stdin)?,
        or_null(&stdio.stdout)?,
        or_null(&stdio.stderr)?,
        above(theirs.as_fd())?,
        above(document.as_fd())?,
        above(cgroup.unwrap_or(null.as_fd()))?,
        above(target.unwrap_or(null.as_fd()))?,
        above(paths::host().unwrap_or(null.as_fd()))?,
    ];
    let numbers = sources.each_ref().map(AsRawFd::as_raw_fd);
    let program = CString::new(paths::get().program.as_os_str().as_bytes())?;
    let name = CString::new(INIT)?;
    let arguments = [c"caisson-agent".as_ptr(), name.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: the child calls only functions that are safe after a fork of a process with threads: dup2,
    // sigprocmask, execve, _exit; everything they use was made before.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            for (target, source) in numbers.into_iter().enumerate() {
                // SAFETY: both are numbers; the source is open and above all targets.
                if unsafe { libc::dup2(source, target as RawFd) } < 0 {
                    // SAFETY: ends the process without running anything of the agent's.
                    unsafe { libc::_exit(127) };
                }
            }
            // SAFETY: the set is made by sigemptyset before it is read; the pointers are to strings that end in
            // NUL and to arrays that end in null.
            unsafe {
                let mut signals = std::mem::zeroed();
                libc::sigemptyset(&raw mut signals);
                libc::sigprocmask(libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut());
                libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                libc::_exit(127)
            }
        }
        pid => Ok(Launched { pid, channel: ours }),
    }
}

/// A copy of a descriptor whose number is above all that the new process uses.
fn above(descriptor: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let copy = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(16))?;
    // SAFETY: fcntl has just made it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(copy) })
}
