//! CRI v1alpha2: every call of it, by a client that was generated for it.

use std::time::Duration;

use caisson_tests::alpha::image_service_client::ImageServiceClient;
use caisson_tests::alpha::runtime_service_client::RuntimeServiceClient;
use caisson_tests::{IMAGE, Node, alpha as cri};
use tonic::Code;
use tonic::transport::Channel;

type Runtime = RuntimeServiceClient<Channel>;

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_v1alpha2_is_served() {
    let Some(node) = Node::start().await else {
        return;
    };
    let mut runtime: Runtime = RuntimeServiceClient::new(node.channel.clone());
    let version = runtime.version(cri::VersionRequest::default()).await;
    assert_eq!(version.unwrap().into_inner().runtime_name, "caisson");
    let status = runtime.status(cri::StatusRequest::default()).await.unwrap();
    let conditions = status.into_inner().status.unwrap().conditions;
    assert!(
        conditions.iter().all(|condition| condition.status),
        "{conditions:?}"
    );
    runtime
        .update_runtime_config(cri::UpdateRuntimeConfigRequest::default())
        .await
        .unwrap();

    let config = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "old".into(),
            uid: "uid-old".into(),
            namespace: "test".into(),
            attempt: 0,
        }),
        log_directory: node.dir().join("old").display().to_string(),
        ..Default::default()
    };
    let request = cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    let pod = runtime.run_pod_sandbox(request).await.unwrap();
    let pod = pod.into_inner().pod_sandbox_id;
    containers(&mut runtime, &pod, config).await;
    of_the_pod(&mut runtime, &pod).await;
    images(&node).await;
    node.assert_nothing_left().await;
}

/// A container from its making to its end.
async fn containers(runtime: &mut Runtime, pod: &str, sandbox: cri::PodSandboxConfig) {
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "c".into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: IMAGE.into(),
            ..Default::default()
        }),
        command: ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
            .map(str::to_owned)
            .to_vec(),
        log_path: "c.log".into(),
        ..Default::default()
    };
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.into(),
        config: Some(config),
        sandbox_config: Some(sandbox),
    };
    let made = runtime.create_container(request).await.unwrap();
    let container_id = made.into_inner().container_id;
    let request = cri::StartContainerRequest {
        container_id: container_id.clone(),
    };
    runtime.start_container(request).await.unwrap();
    let listed = runtime.list_containers(cri::ListContainersRequest::default());
    assert_eq!(
        listed.await.unwrap().into_inner().containers[0].id,
        container_id
    );
    let request = cri::ContainerStatusRequest {
        container_id: container_id.clone(),
        verbose: true,
    };
    let status = runtime
        .container_status(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        status.status.unwrap().state(),
        cri::ContainerState::ContainerRunning
    );
    assert!(status.info.contains_key("info"));
    let request = cri::ExecSyncRequest {
        container_id: container_id.clone(),
        cmd: ["sh", "-c", "echo old; exit 4"].map(str::to_owned).to_vec(),
        timeout: 60,
    };
    let said = runtime.exec_sync(request).await.unwrap().into_inner();
    assert_eq!((said.stdout.as_slice(), said.exit_code), (&b"old\n"[..], 4));
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container_id.clone(),
        linux: Some(cri::LinuxContainerResources {
            cpu_shares: 512,
            ..Default::default()
        }),
        ..Default::default()
    };
    runtime.update_container_resources(request).await.unwrap();
    let request = cri::ReopenContainerLogRequest {
        container_id: container_id.clone(),
    };
    runtime.reopen_container_log(request).await.unwrap();
    let request = cri::ContainerStatsRequest {
        container_id: container_id.clone(),
    };
    let stats = runtime.container_stats(request).await.unwrap().into_inner();
    assert!(
        stats
            .stats
            .unwrap()
            .memory
            .unwrap()
            .working_set_bytes
            .unwrap()
            .value
            > 0
    );
    let stats = runtime.list_container_stats(cri::ListContainerStatsRequest::default());
    assert_eq!(stats.await.unwrap().into_inner().stats.len(), 1);
    streaming(runtime, pod, &container_id).await;

    let request = cri::StopContainerRequest {
        container_id: container_id.clone(),
        timeout: 30,
    };
    runtime.stop_container(request).await.unwrap();
    let request = cri::RemoveContainerRequest {
        container_id: container_id.clone(),
    };
    runtime.remove_container(request).await.unwrap();
    let request = cri::ContainerStatusRequest {
        container_id,
        verbose: false,
    };
    let gone = runtime.container_status(request).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

/// The calls that answer with the address of a stream.
async fn streaming(runtime: &mut Runtime, pod: &str, container_id: &str) {
    let exec = runtime.exec(cri::ExecRequest {
        container_id: container_id.into(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    });
    let exec = exec.await.unwrap().into_inner().url;
    let attach = runtime.attach(cri::AttachRequest {
        container_id: container_id.into(),
        stdout: true,
        ..Default::default()
    });
    let attach = attach.await.unwrap().into_inner().url;
    let forward = runtime.port_forward(cri::PortForwardRequest {
        pod_sandbox_id: pod.into(),
        port: vec![80],
    });
    let forward = forward.await.unwrap().into_inner().url;
    for (url, path) in [
        (exec, "/exec/"),
        (attach, "/attach/"),
        (forward, "/portforward/"),
    ] {
        assert!(url.starts_with("http://") && url.contains(path), "{url}");
    }
}

/// A pod's own calls, to its end.
async fn of_the_pod(runtime: &mut Runtime, pod: &str) {
    let listed = runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default());
    assert_eq!(listed.await.unwrap().into_inner().items[0].id, pod);
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.into(),
        verbose: false,
    };
    let status = runtime
        .pod_sandbox_status(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        status.status.unwrap().state(),
        cri::PodSandboxState::SandboxReady
    );
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.into(),
    };
    let stats = runtime
        .pod_sandbox_stats(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stats.stats.unwrap().attributes.unwrap().id, pod);
    let stats = runtime.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default());
    assert_eq!(stats.await.unwrap().into_inner().stats.len(), 1);
    let request = cri::StopPodSandboxRequest {
        pod_sandbox_id: pod.into(),
    };
    runtime.stop_pod_sandbox(request).await.unwrap();
    let request = cri::RemovePodSandboxRequest {
        pod_sandbox_id: pod.into(),
    };
    let removed = runtime.remove_pod_sandbox(request);
    let removed = tokio::time::timeout(Duration::from_secs(300), removed).await;
    removed.expect("RemovePodSandbox ends").unwrap();
}

/// The calls of the image service.
async fn images(node: &Node) {
    let mut images = ImageServiceClient::new(node.channel.clone());
    let listed = images.list_images(cri::ListImagesRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().images.len(), 1);
    let image = cri::ImageSpec {
        image: IMAGE.into(),
        ..Default::default()
    };
    let request = cri::ImageStatusRequest {
        image: Some(image.clone()),
        verbose: false,
    };
    let status = images.image_status(request.clone()).await.unwrap();
    assert!(status.into_inner().image.unwrap().size > 0);
    let info = images.image_fs_info(cri::ImageFsInfoRequest::default());
    let info = info.await.unwrap().into_inner().image_filesystems;
    assert!(info[0].used_bytes.unwrap().value > 0);
    // There is no registry at this address: what counts is that the call arrives.
    let request_pull = cri::PullImageRequest {
        image: Some(cri::ImageSpec {
            image: "127.0.0.1:1/none:latest".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let error = images.pull_image(request_pull).await.unwrap_err();
    assert_ne!(error.code(), Code::Unimplemented, "{error}");
    assert!(error.message().contains("127.0.0.1:1"), "{error}");
    let remove = cri::RemoveImageRequest { image: Some(image) };
    images.remove_image(remove).await.unwrap();
    let status = images.image_status(request).await.unwrap();
    assert!(status.into_inner().image.is_none());
}
