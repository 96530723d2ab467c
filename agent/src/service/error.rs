//! What an RPC can fail with, and the gRPC code a client sees.

use std::io;

use thiserror::Error;
use tonic::{Code, Status};

use super::validate::InvalidId;
use crate::engine::EngineError;
use crate::engine::spec::SpecError;
use crate::sandbox::SandboxError;

/// The longest message sent: gRPC puts it into a header, whose size clients bound.
const MESSAGE_MAX: usize = 2048;

/// Why an RPC failed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the messages say it
pub enum ServiceError {
    #[error("{0}")]
    Id(#[from] InvalidId),
    #[error("container {0} does not exist")]
    NoContainer(String),
    #[error("container {0} has no exec {1}")]
    NoExec(String, String),
    #[error("container {0} exists already: remove it or choose another id")]
    ContainerExists(String),
    #[error("exec {1} of container {0} exists already: choose another id")]
    ExecExists(String, String),
    #[error("container {0} is being created or removed: try again")]
    Busy(String),
    #[error("container {0} is not running")]
    NotRunning(String),
    #[error("container {0} has been started before")]
    NotCreated(String),
    #[error("{0} exist already, that is the most: remove some first")]
    TooMany(String),
    #[error("the sandbox is not set up: call SetupSandbox first")]
    SandboxNotReady,
    #[error("SetupSandbox was called before")]
    SandboxTwice,
    #[error("the pod stands still while it is written to a snapshot: try again")]
    Quiescent,
    #[error("the pod does not stand still: call Quiesce first")]
    NotQuiescent,
    #[error("container {0} cannot stand still: {1}")]
    InUse(String, &'static str),
    #[error("the guest is shutting down")]
    ShuttingDown,
    #[error("{field}: {reason}")]
    Argument { field: &'static str, reason: String },
    #[error("process {0} has no terminal")]
    NoTerminal(String),
    #[error("{0}")]
    Spec(#[from] SpecError),
    #[error("{0}")]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Sandbox(#[from] SandboxError),
    #[error("{step}: {error}")]
    Io {
        step: &'static str,
        error: io::Error,
    },
    #[error("a task of the agent ended early: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl ServiceError {
    fn code(&self) -> Code {
        match self {
            Self::Id(_) | Self::Argument { .. } | Self::Spec(_) => Code::InvalidArgument,
            Self::NoContainer(_) | Self::NoExec(..) => Code::NotFound,
            Self::ContainerExists(_) | Self::ExecExists(..) => Code::AlreadyExists,
            Self::NotRunning(_)
            | Self::NotCreated(_)
            | Self::SandboxNotReady
            | Self::SandboxTwice
            | Self::NotQuiescent
            | Self::InUse(..)
            | Self::NoTerminal(_) => Code::FailedPrecondition,
            Self::Busy(_) | Self::Quiescent | Self::ShuttingDown => Code::Unavailable,
            Self::TooMany(_) => Code::ResourceExhausted,
            Self::Sandbox(SandboxError::Invalid { .. }) => Code::InvalidArgument,
            Self::Engine(error) => engine_code(error),
            Self::Sandbox(SandboxError::Step { .. }) | Self::Io { .. } | Self::Task(_) => {
                Code::Internal
            }
        }
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let mut message = error.to_string();
        if message.len() > MESSAGE_MAX {
            let end = (0..=MESSAGE_MAX)
                .rev()
                .find(|&end| message.is_char_boundary(end));
            message.truncate(end.unwrap_or(0));
            message.push('…');
        }
        let mut status = Self::new(error.code(), message);
        if let ServiceError::Engine(EngineError::Unexecutable { why, .. }) = error {
            why.add_to(&mut status);
        }
        status
    }
}

fn engine_code(error: &EngineError) -> Code {
    match error {
        EngineError::State { .. } => Code::FailedPrecondition,
        error if error.is_invalid_argument() => Code::InvalidArgument,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use caisson_proto::Unexecutable;

    use super::*;

    #[test]
    fn a_program_that_cannot_be_executed_is_told_apart() {
        let why = Unexecutable::Missing;
        let reason = "cannot execute x".to_owned();
        let status = Status::from(ServiceError::Engine(EngineError::Unexecutable {
            reason,
            why,
        }));
        assert_eq!(Unexecutable::of(&status), Some(why));
        let other = EngineError::Init("cannot execute hooks".into());
        assert_eq!(Unexecutable::of(&ServiceError::Engine(other).into()), None);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let error = ServiceError::NoContainer("é".repeat(4000));
        let status = Status::from(error);
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().len() <= MESSAGE_MAX + 3);
    }
}
