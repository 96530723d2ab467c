//! The PID namespace that containers of a pod share if the pod asks for it.
//!
//! A PID namespace lives as long as its PID 1, so that a process has to sit in it: the agent's own binary,
//! started again as `caisson-agent pause`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::unistd::{ForkResult, Pid, fork, pause};

use super::{Context, SandboxError, create_dir, namespaces};
use crate::paths;

/// The first argument that makes the binary the pause process.
pub const PAUSE: &str = "pause";

static PAUSE_PID: AtomicI32 = AtomicI32::new(0);

fn bind_path() -> PathBuf {
    Path::new(paths::NAMESPACES).join("pid")
}

/// Starts the pause process and keeps its namespace at `/run/caisson/ns/pid`. It belongs to the pod's user namespace if
/// there is one (`mapped`).
pub fn create(mapped: bool) -> Result<(), SandboxError> {
    create_dir(paths::NAMESPACES)?;
    let pid = start(mapped).context(|| "start the process of the shared PID namespace".into())?;
    PAUSE_PID.store(pid, Ordering::Relaxed);
    let path = bind_path();
    File::create(&path).context(|| format!("create {}", path.display()))?;
    let namespace = format!("/proc/{pid}/ns/pid");
    mount(
        Some(namespace.as_str()),
        &path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context(|| format!("bind {namespace} on {}", path.display()))
}

/// Ends the namespace with everything in it.
pub fn remove() {
    let _ = umount2(&bind_path(), MntFlags::MNT_DETACH);
    let pid = PAUSE_PID.swap(0, Ordering::Relaxed);
    if pid > 0 {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Starts the binary again; that process forks PID 1 of the new namespace, says its PID and ends. The reaper
/// takes its status; here only its output is awaited.
fn start(mapped: bool) -> io::Result<i32> {
    let mut child = Command::new(&crate::engine::paths::get().program)
        .arg(PAUSE)
        .args(mapped.then(namespaces::user))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut text = String::new();
    if let Some(output) = child.stdout.take() {
        output.take(64).read_to_string(&mut text)?;
    }
    match text.trim_end().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(io::Error::other(format!(
            "it said {text:?} in place of a PID"
        ))),
    }
}

/// The pause process itself. Does not return while the namespace lives.
pub fn main() -> io::Result<()> {
    // The user namespace to which the new one is to belong.
    if let Some(user) = std::env::args_os().nth(2) {
        setns(File::open(user)?, CloneFlags::CLONE_NEWUSER)?;
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: this process has one thread, so that the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            println!("{child}");
            io::stdout().flush()
        }
        ForkResult::Child => {
            // The containers see it, and must not get at the agent's files through it.
            nix::sys::prctl::set_dumpable(false)?;
            SigSet::all().thread_block()?;
            // Children of PID 1 that are ignored are reaped by the kernel.
            // SAFETY: SIG_IGN runs no code.
            unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            nix::unistd::setsid()?;
            for fd in 0..3 {
                let _ = nix::unistd::close(fd);
            }
            loop {
                pause();
            }
        }
    }
}
