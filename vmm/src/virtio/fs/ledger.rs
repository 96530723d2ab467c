//! What the guest holds on the server: each inode it has looked up and each file it has open is a descriptor
//! of this process, of which there are not endlessly many and the rest of the machine needs some. And how each
//! file was opened, which the guest is not asked a second time.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Numbers that belong together.
type Pairs = Vec<(u64, u64)>;

/// Counts what the guest holds.
pub struct Ledger {
    most: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// Lookups of each inode that were not forgotten.
    inodes: HashMap<u64, u64>,
    handles: HashMap<u64, Opened>,
}

/// An open handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What is open.
    pub inode: u64,
    /// The flags that it was opened with (`open(2)`).
    pub flags: u32,
    /// A handle of the same file, for writes that append where this one's do not, or the other way about.
    pub twin: Option<u64>,
}

impl Ledger {
    /// A ledger for at most this many inodes and handles together.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Two maps of numbers: valid whatever thread panicked.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a lookup. False, and nothing noted, where it is of a new inode and there is no room.
    pub fn look_up(&self, inode: u64) -> bool {
        let mut held = self.held();
        let full = held.inodes.len() + held.handles.len() >= self.most;
        if full && !held.inodes.contains_key(&inode) {
            return false;
        }
        let count = held.inodes.entry(inode).or_default();
        *count = count.saturating_add(1);
        true
    }

    /// Notes that lookups were forgotten.
    pub fn forget(&self, inode: u64, count: u64) {
        let mut held = self.held();
        if let Some(lookups) = held.inodes.get_mut(&inode) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 {
                held.inodes.remove(&inode);
            }
        }
    }

    /// Whether there is room for one more handle.
    pub fn has_room(&self) -> bool {
        let held = self.held();
        held.inodes.len() + held.handles.len() < self.most
    }

    /// Notes an open handle, and the flags that it was opened with.
    pub fn open(&self, handle: u64, inode: u64, flags: u32) {
        let opened = Opened {
            inode,
            flags,
            twin: None,
        };
        self.held().handles.insert(handle, opened);
    }

    /// Notes that an open handle has a twin.
    pub fn pair(&self, handle: u64, twin: u64) {
        if let Some(opened) = self.held().handles.get_mut(&handle) {
            opened.twin = Some(twin);
        }
    }

    /// An open handle.
    pub fn opened(&self, handle: u64) -> Option<Opened> {
        self.held().handles.get(&handle).copied()
    }

    /// Notes that a handle was released; returns its twin, which is to be released as well.
    pub fn release(&self, handle: u64) -> Option<u64> {
        self.held().handles.remove(&handle)?.twin
    }

    /// Takes everything out: inodes with their lookups, and handles with their inodes.
    pub fn clear(&self) -> (Pairs, Pairs) {
        let held = std::mem::take(&mut *self.held());
        (
            held.inodes.into_iter().collect(),
            held.handles
                .into_iter()
                .map(|(handle, opened)| (handle, opened.inode))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{Ledger, Opened};

    #[test]
    fn what_is_held_is_bounded_and_given_back() {
        let ledger = Ledger::new(3);
        assert!(ledger.look_up(10) && ledger.look_up(11));
        ledger.open(1, 10, 0);
        assert!(!ledger.has_room());
        assert!(!ledger.look_up(12), "full");
        assert!(ledger.look_up(10), "known");
        ledger.forget(10, 1);
        assert!(!ledger.look_up(12), "one lookup of 10 is left");
        ledger.forget(10, u64::MAX);
        assert!(ledger.look_up(12));
        ledger.release(1);
        assert!(ledger.has_room());
        ledger.forget(99, 1);
        let (mut inodes, handles) = ledger.clear();
        inodes.sort_unstable();
        assert_eq!((inodes, handles), (vec![(11, 1), (12, 1)], vec![]));
        assert!(ledger.look_up(13));
    }

    #[test]
    fn a_handle_is_released_with_its_twin() {
        let ledger = Ledger::new(3);
        assert_eq!((ledger.opened(1), ledger.release(1)), (None, None));
        ledger.pair(1, 2);
        assert_eq!(ledger.opened(1), None);
        ledger.open(1, 10, 0o2001);
        ledger.open(2, 10, 1);
        ledger.pair(1, 2);
        let opened = Opened {
            inode: 10,
            flags: 0o2001,
            twin: Some(2),
        };
        assert_eq!(ledger.opened(1), Some(opened));
        assert_eq!((ledger.release(1), ledger.release(2)), (Some(2), None));
        assert_eq!(ledger.clear().1, vec![]);
    }
}
