//! What is made of an agent's word, for the fuzz target `agent_replies`.

use std::sync::Arc;

use caisson_proto::agent;

use super::super::metrics;
use super::super::registry::{Container, Pod};
use super::exits::End;
use super::stats::{convert, interfaces};
use crate::store::{ContainerRecord, ContainerState, SandboxRecord, SandboxState};

fn container() -> Arc<Container> {
    let pod = Pod::new(SandboxRecord {
        state: SandboxState::Ready,
        ..SandboxRecord::first("p".into(), "p".into(), 1)
    });
    let record = ContainerRecord {
        state: ContainerState::Running,
        started_at: 1,
        guest_pid: 1,
        ..ContainerRecord::first("c".into(), "p".into(), "c".into(), 1)
    };
    Container::new(record, pod)
}

/// What an agent tells of the use of resources.
pub(crate) fn stats(answer: &agent::StatsResponse) {
    // Twice: a rate is computed from one answer to the next.
    let container = container();
    for stats in answer.containers.iter().chain(&answer.containers).take(200) {
        let told = convert(&container, stats);
        assert!(told.cpu.is_some_and(|cpu| cpu.timestamp >= 0));
        metrics::fuzz(stats, answer.sandbox.as_ref());
    }
    if let Some(sandbox) = &answer.sandbox {
        for (name, _) in interfaces(&sandbox.interfaces) {
            assert!(name.chars().count() <= 16);
        }
    }
}

/// What an agent tells of the end of a process.
pub(crate) fn exit(status: agent::ExitStatus) {
    let end = End::from_agent(&status, 1);
    assert!((0..=255).contains(&end.code) && end.at >= 1, "{end:?}");
}
