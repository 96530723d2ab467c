//! What the guest holds on the server: each inode it has looked up and each file it has open is a descriptor
//! of this process, of which there are not endlessly many and the rest of the machine needs some.

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
    /// The inode of each open handle.
    handles: HashMap<u64, u64>,
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

    /// Notes an open handle.
    pub fn open(&self, handle: u64, inode: u64) {
        self.held().handles.insert(handle, inode);
    }

    /// Notes that a handle was released.
    pub fn release(&self, handle: u64) {
        self.held().handles.remove(&handle);
    }

    /// Takes everything out: inodes with their lookups, and handles with their inodes.
    pub fn clear(&self) -> (Pairs, Pairs) {
        let held = std::mem::take(&mut *self.held());
        (
            held.inodes.into_iter().collect(),
            held.handles.into_iter().collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Ledger;

    #[test]
    fn what_is_held_is_bounded_and_given_back() {
        let ledger = Ledger::new(3);
        assert!(ledger.look_up(10) && ledger.look_up(11));
        ledger.open(1, 10);
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
}
