//! What is made of an agent's word, for the fuzz target `agent_replies`.

use std::sync::Arc;

use caisson_proto::agent;

use super::super::metrics;
use super::super::registry::{Container, Pod};
use super::exits::End;
use super::stats::{convert, interfaces};
use crate::store::{ContainerRecord, ContainerState, Proto, SandboxRecord, SandboxState};

fn container() -> Arc<Container> {
    let pod = Pod::new(SandboxRecord {
        id: "p".into(),
        name: "p".into(),
        handler: String::new(),
        kind: Default::default(),
        created_at: 1,
        state: SandboxState::Ready,
        reason: String::new(),
        silence: None,
        config: Proto::default(),
        network: None,
        user: 0,
    });
    let record = ContainerRecord {
        id: "c".into(),
        sandbox_id: "p".into(),
        name: "c".into(),
        state: ContainerState::Running,
        created_at: 1,
        started_at: 1,
        finished_at: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        config: Proto::default(),
        resources: Proto::default(),
        image_id: String::new(),
        image_ref: String::new(),
        layers: Vec::new(),
        log_path: Default::default(),
        stop_signal: 15,
        process: serde_json::Value::Null,
        guest_pid: 1,
        user: None,
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
