//! Reaps every child of the agent and hands exit statuses to whoever waits for them.
//!
//! The agent is PID 1 (or a child subreaper), so that orphans of containers end here too. There is one
//! `waitpid` loop; no other code of the agent waits for a process.
//!
//! A process can end before the one who started it has learned its PID. [`Reaper::spawning`] therefore opens a
//! window first: statuses that arrive while a window is open are kept until it closes. Outside of windows the
//! statuses of unknown processes are dropped at once, so that a later process with a reused PID never gets the
//! status of an older one.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::{debug, warn};

/// Statuses of unclaimed processes kept at most. Orphans that end while a container is being made are in
/// it too; the oldest go first.
const UNCLAIMED_MAX: usize = 16 * 1024;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n after signal n.
    pub code: i32,
    /// The signal that killed it, real-time signals included.
    pub signal: Option<i32>,
    /// Unix time in nanoseconds.
    pub at_ns: i64,
}

impl Exit {
    /// From `waitpid`'s status word.
    fn from_status(status: i32) -> Option<Self> {
        let (code, signal) = if libc::WIFEXITED(status) {
            (libc::WEXITSTATUS(status), None)
        } else if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            (128 + signal, Some(signal))
        } else {
            return None;
        };
        Some(Self {
            code,
            signal,
            at_ns: unix_time_ns(),
        })
    }
}

/// The guest's clock, in nanoseconds since 1970.
pub fn unix_time_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
        })
}

#[derive(Default)]
struct State {
    next: u64,
    /// Starting points of open windows.
    windows: BTreeSet<u64>,
    /// (sequence number, PID, how it ended), oldest first.
    unclaimed: VecDeque<(u64, i32, Exit)>,
    claims: HashMap<i32, oneshot::Sender<Exit>>,
}

/// The one place that reaps. Clones share the state.
#[derive(Clone, Default)]
pub struct Reaper {
    state: Arc<Mutex<State>>,
}

/// An open window; see the module's documentation. Dropping it closes the window.
pub struct Spawning {
    reaper: Reaper,
    from: u64,
}

impl Reaper {
    /// A reaper that has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a window. Call it before the process is started.
    pub fn spawning(&self) -> Spawning {
        let mut state = self.lock();
        let from = state.next;
        state.next += 1;
        state.windows.insert(from);
        Spawning {
            reaper: self.clone(),
            from,
        }
    }

    /// Reaps on every `SIGCHLD`, for ever. Ends only if the signal handler cannot be installed.
    pub async fn run(self) -> std::io::Error {
        let mut children = match signal(SignalKind::child()) {
            Ok(children) => children,
            Err(error) => return error,
        };
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return std::io::Error::other("the SIGCHLD stream has ended");
            }
        }
    }

    /// Reaps everything that has ended by now. One signal can stand for several children.
    pub fn reap(&self) {
        loop {
            let mut status = 0;
            // SAFETY: `status` is a valid place for one int. libc's call and not nix's: nix fails on a
            // process killed by a real-time signal, when the status is already consumed.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::__WALL) };
            if pid <= 0 {
                return;
            }
            if let Some(exit) = Exit::from_status(status) {
                self.ended(pid, exit);
            }
        }
    }

    /// Sends a signal to a claimed process that has not been reaped. Call it on the event loop's thread, where
    /// [`Reaper::reap`] runs too: then the PID cannot have become another process's in between.
    pub fn signal(&self, pid: i32, signal: i32) {
        if self.lock().claims.contains_key(&pid) {
            // SAFETY: kill(2) takes numbers only. nix knows no real-time signals.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn ended(&self, pid: i32, exit: Exit) {
        let mut state = self.lock();
        if let Some(claim) = state.claims.remove(&pid) {
            // Nobody waits any more if the container is gone.
            let _ = claim.send(exit);
            return;
        }
        if state.windows.is_empty() {
            debug!("reaped orphan {pid}, code {}", exit.code);
            return;
        }
        if state.unclaimed.len() >= UNCLAIMED_MAX {
            state.unclaimed.pop_front();
            warn!("more than {UNCLAIMED_MAX} unclaimed exits, the oldest is dropped");
        }
        let sequence = state.next;
        state.next += 1;
        state.unclaimed.push_back((sequence, pid, exit));
    }
}

impl Spawning {
    /// The exit of a process started in this window, at once if it has ended already.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.reaper.lock();
        let found = state
            .unclaimed
            .iter()
            .rposition(|&(sequence, ended, _)| sequence > self.from && ended == pid);
        match found.and_then(|index| state.unclaimed.remove(index)) {
            Some((_, _, exit)) => {
                let _ = sender.send(exit);
            }
            None => {
                state.claims.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        state.windows.remove(&self.from);
        let oldest = state.windows.first().copied();
        match oldest {
            None => state.unclaimed.clear(),
            Some(oldest) => state.unclaimed.retain(|&(sequence, ..)| sequence > oldest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            signal: None,
            at_ns: 1,
        }
    }

    #[test]
    fn status_words() {
        assert_eq!(
            Exit::from_status(7 << 8).map(|e| (e.code, e.signal)),
            Some((7, None))
        );
        assert_eq!(
            Exit::from_status(9).map(|e| (e.code, e.signal)),
            Some((137, Some(9)))
        );
        // Real-time signal 64, which nix cannot name.
        assert_eq!(
            Exit::from_status(64).map(|e| (e.code, e.signal)),
            Some((192, Some(64)))
        );
        // Stopped, not ended.
        assert_eq!(Exit::from_status(0x137f), None);
    }

    #[test]
    fn an_exit_before_the_claim_is_kept_for_it() {
        let reaper = Reaper::new();
        let window = reaper.spawning();
        reaper.ended(10, exit(3));
        assert_eq!(window.claim(10).try_recv().unwrap().code, 3);
    }

    #[test]
    fn an_exit_after_the_claim_arrives() {
        let reaper = Reaper::new();
        let mut claim = reaper.spawning().claim(10);
        assert!(claim.try_recv().is_err());
        reaper.ended(10, exit(4));
        assert_eq!(claim.try_recv().unwrap().code, 4);
    }

    #[test]
    fn a_reused_pid_does_not_get_an_old_status() {
        let reaper = Reaper::new();
        reaper.ended(10, exit(1)); // outside of any window
        let first = reaper.spawning();
        reaper.ended(10, exit(2)); // in the first window only
        let second = reaper.spawning();
        let mut claim = second.claim(10);
        assert!(claim.try_recv().is_err());
        drop(first);
        reaper.ended(10, exit(3));
        assert_eq!(claim.try_recv().unwrap().code, 3);
    }

    #[test]
    fn nothing_is_kept_when_no_window_is_open_and_the_number_is_bounded() {
        let reaper = Reaper::new();
        let window = reaper.spawning();
        for pid in 0..UNCLAIMED_MAX as i32 + 10 {
            reaper.ended(pid, exit(0));
        }
        assert_eq!(reaper.lock().unclaimed.len(), UNCLAIMED_MAX);
        drop(window);
        assert_eq!(reaper.lock().unclaimed.len(), 0);
        reaper.ended(5, exit(0));
        assert_eq!(reaper.lock().unclaimed.len(), 0);
    }
}
