//! What goes wrong while a container is made, run or removed.

use std::io;

use caisson_proto::Unexecutable;

use super::spec::SpecError;

/// An error of the engine: one sentence that says what failed, and on what.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The spec cannot be done; the caller's mistake.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The container's id, or another argument beside the spec.
    #[error("{0}")]
    Argument(String),
    /// The kernel refused a limit.
    #[error("{field}: {source}")]
    Resource {
        /// The field of the spec.
        field: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A step in the agent failed.
    #[error("cannot {what}: {source}")]
    System {
        /// The step and its object.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A step in the container's first process failed; it says which.
    #[error("{0}")]
    Init(String),
    /// The container's program cannot be executed.
    #[error("{reason}")]
    Unexecutable {
        /// The step's sentence.
        reason: String,
        /// Why.
        why: Unexecutable,
    },
    /// The container is not in the state the call needs.
    #[error("container {id} {state}")]
    State {
        /// The container.
        id: String,
        /// What it is instead.
        state: &'static str,
    },
}

impl EngineError {
    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            what: what.into(),
            source: source.into(),
        }
    }

    /// A failure that the container's first process tells.
    pub(crate) fn init(reason: String, unexecutable: Option<Unexecutable>) -> Self {
        match unexecutable {
            Some(why) => Self::Unexecutable { reason, why },
            None => Self::Init(reason),
        }
    }

    pub(crate) fn resource(field: &str, source: io::Error) -> Self {
        Self::Resource {
            field: field.to_owned(),
            source,
        }
    }

    /// Whether the caller's input is at fault, as opposed to the system's state.
    #[must_use]
    pub fn is_invalid_argument(&self) -> bool {
        matches!(self, Self::Spec(_) | Self::Argument(_))
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
