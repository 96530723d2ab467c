//! What happens when a process has ended.

use std::sync::Arc;

use caisson_proto::agent::{Event, ExitStatus, event};
use tokio::sync::oneshot;

use super::container::{Container, Process};
use super::oom;
use super::pod::Pod;
use crate::log::{self, Level};
use crate::reaper::Exit;
use crate::warn;

/// Watches a container's own process.
pub fn watch_init(pod: Arc<Pod>, container: Arc<Container>, exit: oneshot::Receiver<Exit>) {
    tokio::spawn(async move {
        let Ok(exit) = exit.await else { return };
        // Told first, so that a reader knows the reason before the exit.
        oom::tell(&pod, &container);
        // Any OOM kill in the container counts: a shell passes its child's fate on as its own exit code.
        let oom_killed = exit.code != 0 && container.count_oom_kills() > 0;
        finish(&pod, &container, "", &container.init, exit, oom_killed);
        // Without a PID namespace of its own the container's other processes do not end with the first.
        let kill = tokio::task::spawn_blocking(move || {
            if let Err(error) = container.engine.signal_all(libc::SIGKILL) {
                warn!("end what is left of container {}: {error}", container.id);
            }
        });
        let _ = kill.await;
    });
}

/// Watches an exec.
pub fn watch_exec(
    pod: Arc<Pod>,
    container: Arc<Container>,
    exec: String,
    process: Arc<Process>,
    oom_kills_before: u64,
    exit: oneshot::Receiver<Exit>,
) {
    tokio::spawn(async move {
        let Ok(exit) = exit.await else { return };
        oom::tell(&pod, &container);
        let killed = exit.signal == Some(libc::SIGKILL);
        let oom_killed = killed && container.count_oom_kills() > oom_kills_before;
        finish(&pod, &container, &exec, &process, exit, oom_killed);
        container.exec_finished(&exec);
    });
}

fn finish(
    pod: &Pod,
    container: &Container,
    exec: &str,
    process: &Process,
    exit: Exit,
    oom_killed: bool,
) {
    let status = ExitStatus {
        code: exit.code,
        exited_at_ns: exit.at_ns,
        oom_killed,
    };
    process.ended(status);
    // An exec's client is told, and each byte of the console is an exit to the VMM.
    let level = if exec.is_empty() {
        Level::Info
    } else {
        Level::Debug
    };
    log::write(
        level,
        format_args!(
            "container {} {exec}: process {} ended with {}",
            container.id, process.pid, exit.code
        ),
    );
    pod.tell(Event {
        container_id: container.id.clone(),
        exec_id: exec.into(),
        kind: Some(event::Kind::Exited(status)),
    });
}
