//! How containers end: one task for each running container waits for it.

use std::sync::Arc;
use std::time::Duration;

use caisson_proto::{agent, cri};

use super::super::registry::{Container, Pod, now};
use super::super::spec::signal;
use super::super::{Context, guest};
use super::KILLED_CODE;
use crate::sandbox::{Sandbox, sentence};
use crate::steps::{self, Step};
use crate::store::ContainerState;

/// How long the output of an ended container may take into its log before its end is told all the same. The pod
/// process goes on writing after that.
const DRAIN: Duration = Duration::from_secs(10);
/// The pause before an agent that did not answer is asked again.
const RETRY: Duration = Duration::from_millis(500);

/// How a container ended.
#[derive(Clone, Debug)]
pub struct End {
    /// 0 to 255.
    pub code: i32,
    /// As in `ContainerRecord::reason`.
    pub reason: &'static str,
    /// One sentence; may be empty.
    pub message: String,
    /// Unix time in nanoseconds.
    pub at: i64,
}

impl End {
    /// What an agent says, which is a guest's word.
    pub(super) fn from_agent(status: &agent::ExitStatus, started_at: i64) -> Self {
        let code = status.code.clamp(0, 255);
        let reason = match (status.oom_killed, code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        Self {
            code,
            reason,
            message: String::new(),
            // A guest's clock that is far off would confuse whoever compares it with the host's.
            at: if (started_at..=now()).contains(&status.exited_at_ns) {
                status.exited_at_ns
            } else {
                // The node's clock may have been set back since.
                now().max(started_at)
            },
        }
    }
}

/// Waits in a task of its own for the container to end, and notes it.
pub fn watch(context: &Arc<Context>, container: &Arc<Container>, sandbox: Arc<dyn Sandbox>) {
    let (context, container) = (context.clone(), container.clone());
    tokio::spawn(async move {
        let end = wait(&container, sandbox.as_ref()).await;
        if end.reason != "ContainerLost" {
            // Its output before its end: who sees the end finds the log complete.
            // must-test: exec and logs that lose the tail of the output when the process ends quickly
            kill_rest(&container, sandbox.as_ref()).await;
            if !sandbox.log_drained(&container.id, DRAIN).await {
                tracing::warn!(container = container.id, "the log is not complete yet");
            }
        }
        finish(&context, &container, end).await;
    });
}

async fn wait(container: &Container, sandbox: &dyn Sandbox) -> End {
    let mut ended = sandbox.ended();
    let started_at = container.record().started_at;
    loop {
        let mut client = sandbox.agent();
        let request = agent::WaitRequest {
            container_id: container.id.clone(),
            exec_id: String::new(),
        };
        let answer = tokio::select! {
            biased;
            answer = client.wait(request) => answer,
            reason = ended.wait_for(Option::is_some) => {
                return lost(&reason.ok().and_then(|r| r.as_ref().map(sentence)).unwrap_or_default());
            }
        };
        match answer {
            Ok(response) => {
                if let Some(status) = response.into_inner().status {
                    return End::from_agent(&status, started_at);
                }
                tracing::warn!(container = container.id, "the agent told no exit status");
            }
            Err(status) if status.code() == tonic::Code::NotFound => {
                return lost("the agent does not know the container any more");
            }
            Err(status) => {
                tracing::debug!(container = container.id, %status, "the wait for the container broke off");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The end of a container that went with its sandbox.
pub fn lost(why: &str) -> End {
    End {
        code: KILLED_CODE,
        reason: "ContainerLost",
        message: format!("the container ended with its sandbox: {why}"),
        at: now(),
    }
}

/// In a PID namespace that outlives it, what a container's process left behind would hold its output open.
async fn kill_rest(container: &Container, sandbox: &dyn Sandbox) {
    let record = container.record();
    let own = record
        .config
        .0
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref())
        .is_some_and(|options| options.pid() == cri::NamespaceMode::Container);
    if own {
        return;
    }
    let mut client = sandbox.agent();
    let request = agent::SignalRequest {
        container_id: container.id.clone(),
        exec_id: String::new(),
        signal: signal::KILL,
        all: true,
    };
    let killed = guest::call(
        sandbox,
        "kill what a container left behind",
        guest::QUICK,
        client.signal(request),
    );
    if let Err(error) = killed.await {
        tracing::debug!(container = container.id, %error, "nothing could be killed");
    }
}

/// Notes a container's end, once, and tells those who wait for it.
pub async fn finish(context: &Context, container: &Container, end: End) {
    let first = container.change(|record| {
        // One that is being made or removed is left to whoever does that.
        let running = matches!(
            record.state,
            ContainerState::Created | ContainerState::Starting | ContainerState::Running
        );
        if running {
            record.state = ContainerState::Exited;
            record.exit_code = end.code;
            record.reason = if end.reason == "ContainerLost" {
                "Error".to_owned()
            } else {
                end.reason.to_owned()
            };
            record.message = end.message;
            record.finished_at = end.at;
        }
        running
    });
    if first {
        steps::done(Step::EndHeard);
        if let Err(error) = context.registry.save_container(container).await {
            tracing::error!(container = container.id, %error, "the container's end could not be written");
        }
        steps::done(Step::EndSaved);
        context
            .registry
            .emit(cri::ContainerEventType::ContainerStoppedEvent, container);
    }
    container.exited.send_replace(true);
}

/// Notes the end of a container whose sandbox has ended, if nobody has yet. A running one is left a moment to its own
/// watcher, which may hold its real exit status.
pub async fn sandbox_ended(context: &Context, container: &Container, why: &str) {
    if container.state() == ContainerState::Running {
        let mut exited = container.exited.subscribe();
        let wait = tokio::time::timeout(DRAIN + RETRY, exited.wait_for(|exited| *exited));
        if wait.await.is_ok() {
            return;
        }
    }
    if !matches!(
        container.state(),
        ContainerState::Creating | ContainerState::Exited | ContainerState::Removing
    ) {
        finish(context, container, lost(why)).await;
    }
}

/// Does that for all containers of a pod.
pub async fn all_ended(context: &Context, pod: &Pod, why: &str) {
    let all = context.registry.containers_of(&pod.id);
    let ends = all
        .iter()
        .map(|container| sandbox_ended(context, container, why));
    futures::future::join_all(ends).await;
}

/// Waits until the container's end is noted.
pub async fn noted(container: &Container) {
    // The sender lives in the container, so this does not fail.
    let _ = container
        .exited
        .subscribe()
        .wait_for(|exited| *exited)
        .await;
}

/// Waits until the container's end is noted. False after `limit`.
pub async fn wait_noted(container: &Container, limit: Duration) -> bool {
    tokio::time::timeout(limit, noted(container)).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: i32, oom_killed: bool, at: i64) -> agent::ExitStatus {
        agent::ExitStatus {
            code,
            exited_at_ns: at,
            oom_killed,
        }
    }

    #[test]
    fn an_agents_word_is_taken_within_reason() {
        let end = |code, oom| End::from_agent(&status(code, oom, 0), 1);
        assert_eq!((end(0, false).code, end(0, false).reason), (0, "Completed"));
        assert_eq!((end(3, false).code, end(3, false).reason), (3, "Error"));
        assert_eq!(
            (end(137, true).code, end(137, true).reason),
            (137, "OOMKilled")
        );
        assert_eq!(end(70_000, false).code, 255);
        assert_eq!(end(-1, false).code, 0);
        let started = now();
        assert!(End::from_agent(&status(0, false, i64::MAX), started).at <= now());
        assert!(End::from_agent(&status(0, false, 5), started).at >= started);
    }
}
