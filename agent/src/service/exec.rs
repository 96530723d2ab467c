//! Exec, Signal, Wait, ResizeTty.

use std::sync::Arc;

use caisson_proto::agent::{ExecRequest, ExitStatus, ResizeTtyRequest, SignalRequest};

use super::container::{ExecStatus, Process};
use super::containers::with_engine;
use super::error::ServiceError;
use super::exits;
use super::pod::Pod;
use super::stdio::{Streams, Wanted};
use super::validate;
use crate::engine::spec;
use crate::streams::Kind;
use crate::{debug, warn};

/// An exec's name in a request; empty is the container's own process.
fn exec_name(exec: &str) -> Result<Option<&str>, ServiceError> {
    if exec.is_empty() {
        return Ok(None);
    }
    validate::exec_id(exec)?;
    Ok(Some(exec))
}

/// Starts one more process in a container and gives its PID.
pub async fn exec(pod: Arc<Pod>, request: ExecRequest) -> Result<i32, ServiceError> {
    let container = pod.container(&request.container_id)?;
    pod.check_moving()?;
    validate::exec_id(&request.exec_id)?;
    if !container.is_running() {
        return Err(ServiceError::NotRunning(container.id.clone()));
    }
    let reservation = container.reserve_exec(&request.exec_id)?;
    let process = spec::Process::parse(&request.process_json)?;
    let wanted = Wanted {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    let (pipes, stdio) = Streams::pipes(wanted).map_err(|error| ServiceError::Io {
        step: "make the pipes of the standard streams",
        error,
    })?;
    let oom_kills = container.count_oom_kills();
    let window = pod.reaper.spawning();
    let started = with_engine(&container, move |engine| engine.exec(process, stdio)).await;
    let (pid, master) = match started {
        Err(_) if !container.is_running() => {
            return Err(ServiceError::NotRunning(container.id.clone()));
        }
        started => started?,
    };
    let exit = window.claim(pid);
    drop(window);
    let streams = match master.map(Streams::terminal).transpose() {
        Ok(terminal) => terminal.unwrap_or(pipes),
        Err(error) => {
            pod.reaper.signal(pid, libc::SIGKILL);
            return Err(ServiceError::Io {
                step: "take the terminal",
                error,
            });
        }
    };
    let process = Process::new(pid, streams);
    reservation.fulfil(process.clone());
    debug!(
        "container {} exec {}: process {pid}",
        container.id, request.exec_id
    );
    exits::watch_exec(pod, container, request.exec_id, process, oom_kills, exit);
    Ok(pid)
}

/// Sends a signal.
pub async fn signal(pod: Arc<Pod>, request: SignalRequest) -> Result<(), ServiceError> {
    let container = pod.container(&request.container_id)?;
    let exec = exec_name(&request.exec_id)?;
    if !(1..=64).contains(&request.signal) {
        return Err(ServiceError::Argument {
            field: "signal",
            reason: format!("{} is not between 1 and 64", request.signal),
        });
    }
    if request.all {
        let signal = request.signal;
        return with_engine(&container, move |engine| engine.signal_all(signal)).await;
    }
    let process = match container.status_source(exec)? {
        ExecStatus::Process(process) => process,
        ExecStatus::Known(_) => return Ok(()),
    };
    pod.reaper.signal(process.pid, request.signal);
    Ok(())
}

/// Answers when a process has ended.
pub async fn wait(pod: &Pod, container: &str, exec: &str) -> Result<ExitStatus, ServiceError> {
    let source = pod.container(container)?.status_source(exec_name(exec)?)?;
    Ok(match source {
        ExecStatus::Process(process) => process.wait().await,
        ExecStatus::Known(status) => status,
    })
}

/// Sets a terminal's window size.
pub async fn resize(pod: &Pod, request: ResizeTtyRequest) -> Result<(), ServiceError> {
    let process = pod
        .container(&request.container_id)?
        .process(exec_name(&request.exec_id)?)?;
    let size = |field: &'static str, value: u32| match u16::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(ServiceError::Argument {
            field,
            reason: format!("{value} is not between 1 and 65535"),
        }),
    };
    let columns = size("columns", request.columns)?;
    let rows = size("rows", request.rows)?;
    let terminal = process
        .streams
        .get(Kind::Tty)
        .map_err(|_| ServiceError::NoTerminal(process.pid.to_string()))?;
    // A terminal that has ended has no size to change.
    if let Err(error) = terminal.resize(columns, rows) {
        warn!("resize the terminal of process {}: {error}", process.pid);
    }
    Ok(())
}
