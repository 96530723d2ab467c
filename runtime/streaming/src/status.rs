//! How a command ended, as the error stream tells it: Kubernetes' `Status` object from version 4 of the protocol on,
//! and plain text before.

use serde::{Deserialize, Serialize};

use crate::BackendError;

/// The most bytes of a sentence that goes into a status.
const MAX_MESSAGE: usize = 4096;

/// A Kubernetes `meta/v1` Status, as far as it is used here.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Status {
    /// Always there, always empty.
    pub metadata: Empty,
    /// "Success" or "Failure".
    pub status: String,
    /// For people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// "NonZeroExitCode" or "InternalError".
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// More about a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
    /// As an HTTP status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u16>,
}

/// An object without members.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Empty {}

/// More about a failure.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Details {
    /// Each cause.
    pub causes: Vec<Cause>,
}

/// One cause of a failure.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Cause {
    /// What kind of cause: "ExitCode".
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The exit code in decimal, or a sentence.
    pub message: String,
}

impl Status {
    /// Of what a command, or an attached client, came to. `what` says what was tried, such as "executing command in
    /// container".
    pub fn of(result: &Result<i32, BackendError>, what: &str) -> Self {
        match result {
            Ok(0) => Self {
                status: "Success".into(),
                ..Self::default()
            },
            Ok(code) => Self {
                status: "Failure".into(),
                message: format!("command terminated with non-zero exit code: exit status {code}"),
                reason: "NonZeroExitCode".into(),
                details: Some(Details {
                    causes: vec![Cause {
                        reason: "ExitCode".into(),
                        message: code.to_string(),
                    }],
                }),
                ..Self::default()
            },
            Err(error) => {
                let said: String = error.0.chars().take(MAX_MESSAGE).collect();
                let said = format!("error {what}: {said}");
                Self {
                    status: "Failure".into(),
                    message: format!("Internal error occurred: {said}"),
                    reason: "InternalError".into(),
                    details: Some(Details {
                        causes: vec![Cause {
                            message: said,
                            ..Cause::default()
                        }],
                    }),
                    code: Some(500),
                    ..Self::default()
                }
            }
        }
    }

    /// What goes into the error stream.
    pub fn encode(&self, structured: bool) -> Vec<u8> {
        match structured {
            // Plain data, which always serializes.
            true => serde_json::to_vec(self).unwrap_or_default(),
            false => self.message.clone().into_bytes(),
        }
    }

    /// The exit code that a status tells; `None` for a failure that is not the command's own.
    pub fn exit_code(&self) -> Option<i32> {
        if self.status == "Success" {
            return Some(0);
        }
        let causes = &self.details.as_ref()?.causes;
        let cause = causes.iter().find(|cause| cause.reason == "ExitCode")?;
        cause.message.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_have_the_form_that_clients_parse() {
        let json = |result| {
            String::from_utf8(Status::of(&result, "executing command in container").encode(true))
                .unwrap()
        };
        assert_eq!(json(Ok(0)), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(
            json(Ok(3)),
            r#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: exit status 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
        );
        let failed = json(Err(BackendError("no \"such\" program".into())));
        let parsed: Status = serde_json::from_str(&failed).unwrap();
        assert_eq!(parsed.exit_code(), None);
        assert!(
            parsed
                .message
                .ends_with("error executing command in container: no \"such\" program")
        );
        assert_eq!(Status::of(&Ok(0), "").encode(false), b"");
        assert_eq!(Status::of(&Ok(7), "").exit_code(), Some(7));
    }
}
