//! One runtime, as a kubelet uses it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_proto::cri::image_service_client::ImageServiceClient;
use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// What can go wrong is told and ends the benchmark.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A runtime behind its socket.
pub struct Runtime {
    /// Its name in the table.
    pub name: &'static str,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    logs: PathBuf,
    pods: usize,
}

/// A pod.
pub struct Pod {
    id: String,
    config: cri::PodSandboxConfig,
    containers: usize,
}

impl Runtime {
    /// The runtime that listens there; containers log below `logs`.
    pub fn new(name: &'static str, socket: &Path, logs: &Path) -> Self {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel =
            Endpoint::from_static("http://runtime").connect_with_connector_lazy(connector);
        Self {
            name,
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            logs: logs.join(name),
            pods: 0,
        }
    }

    /// Pulls an image; how long it took.
    pub async fn pull(&mut self, image: &str) -> Result<Duration> {
        let request = cri::PullImageRequest {
            image: Some(spec(image)),
            ..Default::default()
        };
        let begun = Instant::now();
        self.images.pull_image(request).await?;
        Ok(begun.elapsed())
    }

    /// Removes an image, and with it what no other image needs.
    pub async fn remove_image(&mut self, image: &str) -> Result<()> {
        let request = cri::RemoveImageRequest {
            image: Some(spec(image)),
        };
        self.images.remove_image(request).await?;
        Ok(())
    }

    /// Runs a pod with so many bytes of memory.
    pub async fn pod(&mut self, memory: u64) -> Result<Pod> {
        self.pods += 1;
        let name = format!("bench-{}", self.pods);
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "bench".into(),
                name: name.clone(),
                attempt: 0,
            }),
            log_directory: self.logs.join(name).display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: i64::try_from(memory)?,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let made = self.runtime.run_pod_sandbox(request).await?.into_inner();
        Ok(Pod {
            id: made.pod_sandbox_id,
            config,
            containers: 0,
        })
    }

    /// Creates a container that sleeps; its ID, and how long it took.
    pub async fn create(&mut self, pod: &mut Pod, image: &str) -> Result<(String, Duration)> {
        pod.containers += 1;
        let name = format!("c{}", pod.containers);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata {
                    name: name.clone(),
                    attempt: 0,
                }),
                image: Some(spec(image)),
                log_path: format!("{name}.log"),
                linux: Some(cri::LinuxContainerConfig::default()),
                ..Default::default()
            }),
            sandbox_config: Some(pod.config.clone()),
        };
        let begun = Instant::now();
        let made = self.runtime.create_container(request).await?.into_inner();
        Ok((made.container_id, begun.elapsed()))
    }

    /// Creates and starts a container that sleeps.
    pub async fn run(&mut self, pod: &mut Pod, image: &str) -> Result<String> {
        let (container_id, _) = self.create(pod, image).await?;
        let request = cri::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.runtime.start_container(request).await?;
        Ok(container_id)
    }

    /// Removes a container.
    pub async fn remove_container(&mut self, container_id: String) -> Result<()> {
        let request = cri::RemoveContainerRequest { container_id };
        self.runtime.remove_container(request).await?;
        Ok(())
    }

    /// Runs a script in a container; what it says.
    pub async fn exec(&mut self, container_id: &str, script: &str) -> Result<String> {
        let request = cri::ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout: 1800,
        };
        let done = self.runtime.exec_sync(request).await?.into_inner();
        if done.exit_code != 0 {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            return Err(format!("{}: {script}: {said}", self.name).into());
        }
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// How long a script takes, by the clock in the container: the way there and back does not count.
    pub async fn time(&mut self, container_id: &str, script: &str) -> Result<Duration> {
        let up = "$(cut -d' ' -f1 /proc/uptime)";
        let script = format!("a={up}; {{ {script}; }} >/dev/null; echo $a {up}");
        let said = self.exec(container_id, &script).await?;
        let times: Vec<f64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?;
        match times[..] {
            // The clock has steps of 10 ms; nothing takes no time at all.
            [begin, end] => Ok(Duration::from_secs_f64((end - begin).max(0.01))),
            _ => Err(format!("{}: the container said {said:?}", self.name).into()),
        }
    }

    /// Stops and removes a pod.
    pub async fn remove(&mut self, pod: Pod) -> Result<()> {
        let pod_sandbox_id = pod.id;
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.runtime.stop_pod_sandbox(request).await?;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await?;
        Ok(())
    }
}

fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}
