//! The host users that pod processes run as: each pod has one of its own, so that none can signal, trace or look into
//! another's process, whatever its guest has made of it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;

use super::CriError;
use super::registry::lock;

/// Users of a range, given to pods. What is given is in the pods' records, so that it lasts as long as they do.
pub struct Users {
    range: Range<u32>,
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    taken: BTreeSet<u32>,
    /// Where the search goes on: an ID that was freed is not given again at once.
    next: u32,
}

impl Users {
    /// All users of this range, which is not empty.
    pub fn new(range: Range<u32>) -> Self {
        Self {
            range,
            given: Mutex::default(),
        }
    }

    /// A user that no pod has.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED when there is none.
    pub fn take(&self) -> Result<u32, CriError> {
        let mut given = lock(&self.given);
        let from = given.next.clamp(self.range.start, self.range.end);
        let free = (from..self.range.end)
            .chain(self.range.start..from)
            .find(|user| !given.taken.contains(user));
        let user = free.ok_or_else(|| {
            CriError::new(
                tonic::Code::ResourceExhausted,
                format!(
                    "all {} users for pods are in use; remove pods, or configure more with microvm.users",
                    self.range.len()
                ),
            )
        })?;
        given.taken.insert(user);
        given.next = user.saturating_add(1);
        Ok(user)
    }

    /// Notes that a pod of an earlier daemon has this user, which may be of an earlier range.
    pub fn note(&self, user: u32) {
        lock(&self.given).taken.insert(user);
    }

    /// Takes a user back.
    pub fn free(&self, user: u32) {
        lock(&self.given).taken.remove(&user);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_pods_have_the_same_user() {
        let users = Users::new(1000..1003);
        users.note(1001);
        users.note(7);
        assert_eq!(users.take().unwrap(), 1000);
        assert_eq!(users.take().unwrap(), 1002);
        let error = users.take().unwrap_err();
        assert_eq!(error.code, tonic::Code::ResourceExhausted);
        users.free(1000);
        users.free(1002);
        assert_eq!(users.take().unwrap(), 1000, "the search begins anew");
        assert_eq!(users.take().unwrap(), 1002);
        users.free(1000);
        users.free(1001);
        users.free(1002);
        assert_eq!(users.take().unwrap(), 1000);
        users.free(1000);
        assert_eq!(users.take().unwrap(), 1001, "not the one just freed");
    }
}
