//! CRI's Exec, Attach and PortForward: what is checked before a URL is issued, and what is done when it is dialled.

mod backend;

use std::sync::Arc;

use caisson_proto::cri;
use caisson_streaming::{Request, Wants};

pub use backend::Backend;

use crate::cri::containers::view;
use crate::cri::registry::Container;
use crate::cri::{Context, CriError};
use crate::store::ContainerState;

/// Issues the URL of an exec (CRI `Exec`).
///
/// # Errors
/// NOT_FOUND; FAILED_PRECONDITION for a container that does not run; INVALID_ARGUMENT for a request without a command or
/// a stream, or with a terminal and a standard error; RESOURCE_EXHAUSTED while too many URLs are unused.
pub fn exec(context: &Context, request: cri::ExecRequest) -> Result<String, CriError> {
    let wants = Wants {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        tty: request.tty,
    };
    check(wants)?;
    if request.cmd.is_empty() {
        return Err(CriError::invalid("the request has no command to run"));
    }
    let container = context.registry.container(&request.container_id)?;
    running(&container)?;
    issue(
        context,
        Request::Exec {
            container: container.id.clone(),
            command: request.cmd,
            wants,
        },
    )
}

/// Issues the URL of an attachment to a container's own process (CRI `Attach`).
///
/// # Errors
/// As [`exec`], the command apart; FAILED_PRECONDITION for standard input of a container that has none.
pub fn attach(context: &Context, request: cri::AttachRequest) -> Result<String, CriError> {
    let wants = Wants {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        tty: request.tty,
    };
    check(wants)?;
    let container = context.registry.container(&request.container_id)?;
    running(&container)?;
    let record = container.record();
    let config = &record.config.0;
    if wants.stdin && !config.stdin && !config.tty {
        return Err(CriError::precondition(format!(
            "container {} was made without a standard input",
            container.id
        )));
    }
    issue(
        context,
        Request::Attach {
            container: container.id.clone(),
            wants,
        },
    )
}

/// Issues the URL of connections to a pod's ports (CRI `PortForward`).
///
/// # Errors
/// NOT_FOUND; FAILED_PRECONDITION for a pod that is not ready; INVALID_ARGUMENT for a port out of range.
pub fn port_forward(
    context: &Context,
    request: cri::PortForwardRequest,
) -> Result<String, CriError> {
    let pod = context.registry.pod(&request.pod_sandbox_id)?;
    pod.ready()?;
    let port = |port: &i32| match u16::try_from(*port) {
        Ok(port @ 1..) => Ok(port),
        _ => Err(CriError::invalid(format!(
            "{port} is not a port (1 to 65535)"
        ))),
    };
    let ports = request.port.iter().map(port).collect::<Result<_, _>>()?;
    let pod = pod.id.clone();
    issue(context, Request::PortForward { pod, ports })
}

fn check(wants: Wants) -> Result<(), CriError> {
    if wants.tty && wants.stderr {
        return Err(CriError::invalid(
            "a terminal has no standard error of its own: tty and stderr exclude each other",
        ));
    }
    if !wants.stdin && !wants.stdout && !wants.stderr {
        return Err(CriError::invalid(
            "the request asks for none of stdin, stdout and stderr",
        ));
    }
    Ok(())
}

fn running(container: &Arc<Container>) -> Result<(), CriError> {
    match container.state() {
        ContainerState::Running => container.pod.ready().map(drop),
        state => Err(CriError::precondition(format!(
            "container {} has no streams to connect: it is {}",
            container.id,
            view::word(state)
        ))),
    }
}

fn issue(context: &Context, request: Request) -> Result<String, CriError> {
    context
        .streaming
        .issue(request)
        .map_err(|error| CriError::new(tonic::Code::ResourceExhausted, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_checked_as_the_interface_says() {
        let wants = |stdin, stdout, stderr, tty| {
            check(Wants {
                stdin,
                stdout,
                stderr,
                tty,
            })
        };
        wants(true, true, true, false).unwrap();
        wants(true, true, false, true).unwrap();
        for refused in [
            wants(false, false, false, false),
            wants(false, false, false, true),
            wants(true, true, true, true),
        ] {
            assert_eq!(refused.unwrap_err().code, tonic::Code::InvalidArgument);
        }
    }
}
