//! What a kubelet may rely on beside the plain path: versions, users, idempotence, events, limits, log rotation.

use std::fs;

use caisson_proto::cri;
use caisson_tests::{Container, IMAGE, Node, Pod, read_log};
use tonic::Code;

const SLEEP: &str = "exec sleep 1000";

/// A container with a security context of its own; its exit code and what it said.
async fn as_user(
    node: &Node,
    pod: &Pod,
    name: &str,
    security: cri::LinuxContainerSecurityContext,
) -> (i32, String) {
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: IMAGE.to_owned(),
                ..cri::ImageSpec::default()
            }),
            command: [
                "sh",
                "-c",
                "id -u; id -g; id -G; grep CapEff /proc/self/status",
            ]
            .map(str::to_owned)
            .to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(cri::NamespaceOption {
                        pid: cri::NamespaceMode::Container.into(),
                        ..cri::NamespaceOption::default()
                    }),
                    ..security
                }),
                resources: None,
            }),
            ..cri::ContainerConfig::default()
        }),
        sandbox_config: Some(pod.config.clone()),
    };
    let response = node.runtime.clone().create_container(request).await;
    let container = Container {
        id: response.expect("CreateContainer").into_inner().container_id,
        log: format!("{}/{name}.log", pod.config.log_directory).into(),
    };
    node.start_container(&container)
        .await
        .expect("StartContainer");
    let status = node.ended(&container).await;
    let said: Vec<_> = read_log(&container.log)
        .into_iter()
        .map(|line| String::from_utf8_lossy(&line.content).into_owned())
        .collect();
    (status.exit_code, said.join("|"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_with_a_kubelet_holds() {
    let Some(node) = Node::start().await else {
        return;
    };
    let mut runtime = node.runtime.clone();
    let mut events = runtime
        .get_container_events(cri::GetEventsRequest {})
        .await
        .expect("GetContainerEvents")
        .into_inner();

    let pod = node.pod("contract").await;
    let name_in_use = node.pod_with("contract", Default::default()).await;
    let name_in_use = name_in_use.unwrap_err();
    assert_eq!(name_in_use.code(), Code::AlreadyExists);
    assert!(name_in_use.message().contains(&pod.id), "{name_in_use}");

    // Users by number and by the names that the image knows.
    let number = |value| Some(cri::Int64Value { value });
    let (code, said) = as_user(
        &node,
        &pod,
        "numbers",
        cri::LinuxContainerSecurityContext {
            run_as_user: number(1234),
            run_as_group: number(2345),
            supplemental_groups: vec![3456],
            ..Default::default()
        },
    )
    .await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.starts_with("1234|2345|2345 3456|") && said.ends_with("0000000000000000"),
        "{said}"
    );
    let (code, said) = as_user(
        &node,
        &pod,
        "named",
        cri::LinuxContainerSecurityContext {
            run_as_username: "nobody".to_owned(),
            ..Default::default()
        },
    )
    .await;
    assert!(
        code == 0 && said.starts_with("65534|65534|65534|"),
        "{said}"
    );

    // Limits change while it runs; a log goes on in a new file.
    let container = node
        .run(
            &pod,
            "c",
            "trap '' TERM; while :; do echo tick; sleep 1; done",
        )
        .await;
    runtime
        .update_container_resources(cri::UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        })
        .await
        .expect("UpdateContainerResources");
    assert_eq!(
        node.says(&container, "cat /sys/fs/cgroup/memory.max").await,
        (64 << 20).to_string()
    );
    let rotated = container.log.with_extension("1");
    fs::rename(&container.log, &rotated).unwrap();
    runtime
        .reopen_container_log(cri::ReopenContainerLogRequest {
            container_id: container.id.clone(),
        })
        .await
        .expect("ReopenContainerLog");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while fs::metadata(&container.log).map_or(0, |meta| meta.len()) == 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "nothing in the new log"
        );
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(!read_log(&rotated).is_empty());

    // It ignores SIGTERM, so it is killed when the grace is over. Every call can be made twice.
    for _ in 0..2 {
        node.stop_container(&container, 1).await;
    }
    let status = node.status(&container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);
    let started_twice = node.start_container(&container).await.unwrap_err();
    assert_eq!(started_twice.code(), Code::FailedPrecondition);
    for _ in 0..2 {
        runtime
            .remove_container(cri::RemoveContainerRequest {
                container_id: container.id.clone(),
            })
            .await
            .expect("RemoveContainer");
    }
    let gone = runtime
        .container_status(cri::ContainerStatusRequest {
            container_id: container.id.clone(),
            verbose: false,
        })
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    // The name is free again.
    node.run(&pod, "c", SLEEP).await;
    for _ in 0..2 {
        node.remove(&pod).await;
    }

    let mut kinds = Vec::new();
    while let Some(event) = events.message().await.expect("an event") {
        if event.container_id == container.id {
            kinds.push(event.container_event_type());
        }
        if event.container_id == pod.id
            && event.container_event_type() == cri::ContainerEventType::ContainerDeletedEvent
        {
            break;
        }
    }
    use cri::ContainerEventType as E;
    assert_eq!(
        kinds,
        [
            E::ContainerCreatedEvent,
            E::ContainerStartedEvent,
            E::ContainerStoppedEvent,
            E::ContainerDeletedEvent
        ]
    );
    node.assert_nothing_left().await;
}
