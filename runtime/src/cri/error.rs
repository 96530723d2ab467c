//! Why a call of the interface failed, and the gRPC code that says so.

use caisson_proto::Unexecutable;
use tonic::{Code, Status};

use crate::network::NetworkError;
use crate::sandbox::SandboxError;
use crate::snapshot::SnapshotError;
use crate::store::StoreError;

/// The most bytes of a sentence that came out of a guest.
const MAX_GUEST_MESSAGE: usize = 2048;

/// A call that failed: the code that tells a client what to do, and one sentence for people.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CriError {
    /// What kind of failure.
    pub code: Code,
    /// What failed, on what, what to do.
    pub message: String,
    /// It was a program that cannot be executed.
    pub unexecutable: Option<Unexecutable>,
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

    /// Nobody answers at the moment.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
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
            unexecutable: None,
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
        Self {
            unexecutable: Unexecutable::of(status),
            ..Self::new(code, format!("the agent could not {what}: {said}"))
        }
    }
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        let mut status = Self::new(error.code, error.message);
        if let Some(why) = error.unexecutable {
            why.add_to(&mut status);
        }
        status
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
            SandboxError::Network(error) => return error.clone().into(),
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

impl From<SnapshotError> for CriError {
    fn from(error: SnapshotError) -> Self {
        let code = match &error {
            SnapshotError::Exists(_) => Code::AlreadyExists,
            SnapshotError::File { .. } | SnapshotError::Stream(_) => Code::Internal,
            _ => Code::FailedPrecondition,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_be_executed_is_told_on() {
        let mut status = Status::internal("cannot execute /x: No such file");
        let of = |status: &Status| CriError::from_agent("start container c", status);
        assert_eq!(of(&status).unexecutable, None);
        Unexecutable::Missing.add_to(&mut status);
        let told = Status::from(of(&status));
        assert_eq!(Unexecutable::of(&told), Some(Unexecutable::Missing));
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
