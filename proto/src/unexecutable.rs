//! How a program that cannot be executed is told: in the metadata of a gRPC status, by the agent to the daemon and by
//! the daemon to its own clients.

use tonic::Status;
use tonic::metadata::AsciiMetadataValue;

/// The metadata's key.
const KEY: &str = "caisson-unexecutable";

/// Why a program cannot be executed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unexecutable {
    /// It is not there.
    Missing,
    /// It is there, and the kernel does not execute it.
    Refused,
}

impl Unexecutable {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Refused => "refused",
        }
    }

    /// What a word means, if it is one.
    #[must_use]
    pub fn from_word(word: &[u8]) -> Option<Self> {
        [Self::Missing, Self::Refused]
            .into_iter()
            .find(|why| why.as_str().as_bytes() == word)
    }

    /// The exit status by which shells tell it: 127 or 126.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Missing => 127,
            Self::Refused => 126,
        }
    }

    /// Puts it into a status.
    pub fn add_to(self, status: &mut Status) {
        let value = AsciiMetadataValue::from_static(self.as_str());
        status.metadata_mut().insert(KEY, value);
    }

    /// What a status tells, if it does.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        Self::from_word(status.metadata().get(KEY)?.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_it() {
        for why in [Unexecutable::Missing, Unexecutable::Refused] {
            let mut status = Status::internal("cannot execute x");
            assert_eq!(Unexecutable::of(&status), None);
            why.add_to(&mut status);
            assert_eq!(Unexecutable::of(&status), Some(why));
        }
        let mut status = Status::internal("x");
        let other = AsciiMetadataValue::from_static("0");
        status.metadata_mut().insert(KEY, other);
        assert_eq!(Unexecutable::of(&status), None);
    }
}
