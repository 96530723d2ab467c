//! Why a call of the interface failed, and the gRPC code that says so.

use tonic::{Code, Status};

use crate::network::NetworkError;
use crate::sandbox::SandboxError;
use crate::store::StoreError;

/// The most bytes of a sentence that came out of a guest.
const MAX_GUEST_MESSAGE: usize = 2048;

/// How a message ends where the cause is ENOENT.
const NO_SUCH_FILE: &str = "(os error 2)";

/// A call that failed: the code that tells a client what to do, and one sentence for people.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CriError {
    /// What kind of failure.
    pub code: Code,
    /// What failed, on what, what to do.
    pub message: String,
}

impl CriError {
    /// No such pod, container or image.
    pub fn not_found(what: &str, id: &str) -> Self {
        Self::new(Code::NotFound, format!("no {what} {id} is known here"))
    }

    /// The request cannot be meant.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// The state does not allow it.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// Caisson does not do it.
    pub fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(Code::Unimplemented, message)
    }

    /// It took too long.
    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(Code::DeadlineExceeded, message)
    }

    /// Something of the node failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// A sentence with a code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// What an agent answered. It is a guest's word: bounded, and printable.
    pub fn from_agent(what: &str, status: &Status) -> Self {
        let said: String = status
            .message()
            .chars()
            .filter(|c| !c.is_control())
            .take(MAX_GUEST_MESSAGE)
            .collect();
        let code = match status.code() {
            code @ (Code::NotFound
            | Code::AlreadyExists
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
            | Code::Unimplemented) => code,
            _ => Code::Internal,
        };
        Self::new(code, format!("the agent could not {what}: {said}"))
    }

    /// As [`not_executed`], of this error.
    pub fn not_executed(&self) -> Option<u8> {
        not_executed(&self.message)
    }
}

/// The exit status by which shells tell that a program could not be run: 127 where it is not there, 126 where it
/// is and cannot be executed. `None` for any other failure. The agent says this in words alone.
pub fn not_executed(message: &str) -> Option<u8> {
    message.contains("cannot execute ").then(|| {
        if message.contains(NO_SUCH_FILE) {
            127
        } else {
            126
        }
    })
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        Self::new(error.code, error.message)
    }
}

impl From<StoreError> for CriError {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NameInUse { .. } => Code::AlreadyExists,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SandboxError> for CriError {
    fn from(error: SandboxError) -> Self {
        let code = match &error {
            SandboxError::Ended { .. } => Code::FailedPrecondition,
            SandboxError::Share { .. } => Code::InvalidArgument,
            SandboxError::Dial { .. } => Code::Unavailable,
            SandboxError::Start { .. }
            | SandboxError::Reset { .. }
            | SandboxError::Control { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<NetworkError> for CriError {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::NotConfigured(_) => Code::FailedPrecondition,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_has_a_shells_exit_status() {
        let of = |message: &str| CriError::internal(message).not_executed();
        assert_eq!(
            of("cannot execute /x: No such file (os error 2)"),
            Some(127)
        );
        assert_eq!(
            of("cannot execute /: Is a directory (os error 21)"),
            Some(126)
        );
        assert_eq!(of("cannot mount /x: No such file (os error 2)"), None);
    }

    #[test]
    fn what_a_guest_says_is_bounded_and_printable() {
        let status = Status::new(Code::DataLoss, format!("a\u{1b}[2J{}", "x".repeat(100_000)));
        let error = CriError::from_agent("start container c", &status);
        assert_eq!(error.code, Code::Internal);
        assert!(error.message.len() < 3000);
        assert!(!error.message.contains('\u{1b}'));
    }
}
