//! Streams that were let go of at one end and are taken up again.

use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::format::Tag;

/// Whether the end of a log's stream is the end of its output.
///
/// While the log is held, a stream that has ended waits for the next one, which has what comes after it. The threads of
/// both streams are known here by their [`Tag`]s.
#[derive(Default)]
pub struct Hold {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    held: bool,
    waiting: Vec<Tag>,
    next: Vec<(Tag, UnixStream)>,
}

impl Hold {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is valid by itself at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on streams wait at their end.
    pub fn begin(&self) {
        self.lock().held = true;
    }

    /// The streams that wait. From now on the end of any other is one.
    pub fn release(&self) -> Vec<Tag> {
        let mut state = self.lock();
        state.held = false;
        state.waiting.clone()
    }

    /// Gives a stream that waits its next one; `None`: there is none.
    pub fn give(&self, tag: Tag, next: Option<UnixStream>) {
        let mut state = self.lock();
        state.waiting.retain(|waiting| *waiting != tag);
        state.next.extend(next.map(|next| (tag, next)));
        drop(state);
        self.changed.notify_all();
    }

    /// Ends all that wait.
    pub fn end(&self) {
        for tag in self.release() {
            self.give(tag, None);
        }
    }

    /// Has `wait_for` look again.
    pub fn tell(&self) {
        let _state = self.lock();
        self.changed.notify_all();
    }

    /// What comes after a stream that has ended; at once `None` where the log is not held. The stream that has ended is closed,
    /// by which its other end hears that all of it was taken.
    pub fn next(&self, tag: Tag, ended: UnixStream) -> Option<UnixStream> {
        drop(ended);
        let mut state = self.lock();
        if !state.held {
            return None;
        }
        state.waiting.push(tag);
        self.changed.notify_all();
        while state.waiting.contains(&tag) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let next = state.next.iter().position(|(of, _)| *of == tag)?;
        Some(state.next.swap_remove(next).1)
    }

    /// Waits until as many streams wait as `left` says. False after `timeout`.
    pub fn wait_for(&self, timeout: Duration, left: impl Fn() -> usize) -> bool {
        let end = Instant::now() + timeout;
        let mut state = self.lock();
        while state.waiting.len() < left() {
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}
