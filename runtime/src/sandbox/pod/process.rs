//! The pod process as the host sees it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use caisson_vmm_protocol::CONTROL_FD;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_raw, setsid};

use super::dir::PodDir;
use crate::steps::{self, Step};

/// Starts `caisson-vmm` in a session of its own: it outlives the daemon. It is the first process of a PID namespace, and
/// in the pod's network namespace `netns`; without one, in an empty one. `place` puts the new process into its
/// cgroup. Returns the daemon's end of its control socket.
pub fn start(
    vmm: &Path,
    dir: &PodDir,
    netns: Option<&Path>,
    place: impl FnOnce(u32) -> io::Result<()>,
) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs: OwnedFd = theirs.into();
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.vmm_log())?;
    let mut command = Command::new(vmm);
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let control = theirs.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe system calls are made, on descriptors that the
    // parent holds open until spawn returns. dup2 clears close-on-exec, and if the socket already is
    // CONTROL_FD, fcntl does.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            if control == CONTROL_FD {
                let fd = std::os::fd::BorrowedFd::borrow_raw(control);
                nix::fcntl::fcntl(
                    fd,
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
            } else {
                let fd = std::os::fd::BorrowedFd::borrow_raw(control);
                let _leaked_to_exec =
                    std::os::fd::IntoRawFd::into_raw_fd(dup2_raw(fd, CONTROL_FD)?);
            }
            Ok(())
        });
    }
    let mut child = in_namespaces(netns, || {
        command
            .spawn()
            .map_err(|e| io::Error::other(format!("{} cannot be run: {e}", vmm.display())))
    })?;
    steps::done(Step::ProcessStarted);
    let placed = note_pid(dir, child.id()).and_then(|()| {
        steps::done(Step::ProcessNoted);
        place(child.id())
    });
    if let Err(error) = placed {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    steps::done(Step::ProcessPlaced);
    reap(child)?;
    Ok(ours)
}

/// Does `spawn` on a thread of its own, whose children are in a new PID namespace and in this network namespace: a thread
/// that has such children can have no threads, so it ends then.
fn in_namespaces(
    netns: Option<&Path>,
    spawn: impl FnOnce() -> io::Result<Child> + Send,
) -> io::Result<Child> {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        match netns {
            Some(path) => setns(fs::File::open(path)?, CloneFlags::CLONE_NEWNET)?,
            None => unshare(CloneFlags::CLONE_NEWNET)?,
        }
        spawn()
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("pod-start".into())
            .spawn_scoped(scope, inside)?
            .join()
            .map_err(|_| io::Error::other("the thread that starts the pod process has panicked"))?
    })
}

/// Keeps a process whose end is learnt otherwise from staying a zombie.
pub fn reap(mut child: Child) -> io::Result<()> {
    std::thread::Builder::new()
        .name("reap".into())
        .stack_size(64 << 10)
        .spawn(move || child.wait())
        .map(drop)
}

/// The pod process's ID, if it still runs. A process ID that was given to another process is not it.
pub fn find(dir: &PodDir) -> Option<u32> {
    let noted = fs::read_to_string(dir.pid()).ok()?;
    let (pid, started) = noted.trim().split_once(' ')?;
    let pid: u32 = pid.parse().ok()?;
    (start_time(pid)? == started).then_some(pid)
}

/// Whether a signal has stopped the pod process, so that nothing of it runs (proc(5), field 3 of stat).
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    state.starts_with(['T', 't'])
}

/// How long any thread of a process has waited for a CPU, in all: the longest of them.
pub fn waited_for_cpu(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let waits = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| {
            let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').nth(1)?.parse().ok()
        });
    Duration::from_nanos(waits.max().unwrap_or(0))
}

/// Ends the pod process by force, if it still runs, and waits until it is gone. Idempotent.
pub async fn end(dir: &PodDir) -> io::Result<()> {
    for _ in 0..500 {
        let Some(pid) = find(dir) else { return Ok(()) };
        let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
        match kill(pid, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(e.into()),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(io::Error::other(
        "the pod process is still there 5 s after SIGKILL",
    ))
}

/// Notes which process is the pod's, for [`find`].
pub fn note_pid(dir: &PodDir, pid: u32) -> io::Result<()> {
    let started = start_time(pid).ok_or_else(|| io::Error::other("it ended at once"))?;
    let new = dir.pid().with_extension("new");
    fs::write(&new, format!("{pid} {started}\n"))?;
    fs::rename(new, dir.pid())
}

/// A running process's start time in clock ticks since boot (proc(5), field 22 of stat); `None` for a zombie.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_told_from_one_that_sleeps() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        assert!(!is_stopped(child.id()));
        kill(pid, Signal::SIGSTOP).unwrap();
        while !is_stopped(child.id()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let waited = waited_for_cpu(child.id());
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(waited_for_cpu(child.id()), waited, "it waits for no CPU");
        kill(pid, Signal::SIGKILL).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn start_times_tell_processes_apart() {
        let own = start_time(std::process::id()).unwrap();
        assert!(own.parse::<u64>().unwrap() > 0);
        assert_eq!(start_time(u32::MAX), None);
        let mut child = Command::new("true").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(start_time(child.id()), None, "a zombie has ended");
        child.wait().unwrap();
    }
}
