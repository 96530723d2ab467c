//! One runtime of containers, whichever it is, as a kubelet uses it: what benchmarks measure Caisson and its peers by.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_proto::cri::image_service_client::ImageServiceClient;
use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;

use crate::dial;

/// What can go wrong is told, and ends what was measured.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How often a log is looked at for its first byte.
const LOOK: Duration = Duration::from_millis(1);
/// How long the first byte may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A runtime behind its socket.
pub struct Runtime {
    /// Its name in tables.
    pub name: &'static str,
    /// The handler of its pods; empty: the runtime's default.
    pub handler: String,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    logs: PathBuf,
    pods: AtomicUsize,
}

/// A pod.
pub struct Pod {
    /// The pod sandbox's ID.
    pub id: String,
    config: cri::PodSandboxConfig,
    containers: AtomicUsize,
}

/// A container, and where its output goes.
pub struct Container {
    /// The container's ID.
    pub id: String,
    log: PathBuf,
}

/// What a container is to do.
#[derive(Clone, Copy, Default)]
pub struct Task<'a> {
    /// The image.
    pub image: &'a str,
    /// A script in place of the image's command.
    pub script: Option<&'a str>,
    /// A directory of the host's, and where the container has it, to read.
    pub volume: Option<(&'a Path, &'a str)>,
}

impl Runtime {
    /// The runtime that listens there; containers log below `logs`.
    pub fn new(name: &'static str, socket: &Path, logs: &Path) -> Self {
        let channel = dial(socket, None);
        Self {
            name,
            handler: String::new(),
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            logs: logs.join(name),
            pods: AtomicUsize::new(0),
        }
    }

    /// Pulls an image; how long it took.
    ///
    /// # Errors
    /// What the runtime says, as of every call here.
    pub async fn pull(&self, image: &str) -> Result<Duration> {
        let request = cri::PullImageRequest {
            image: Some(spec(image)),
            ..Default::default()
        };
        let begun = Instant::now();
        self.images.clone().pull_image(request).await?;
        Ok(begun.elapsed())
    }

    /// Removes an image, and with it what no other image needs.
    pub async fn remove_image(&self, image: &str) -> Result<()> {
        let request = cri::RemoveImageRequest {
            image: Some(spec(image)),
        };
        self.images.clone().remove_image(request).await?;
        Ok(())
    }

    /// Runs a pod with so many bytes of memory; 0: no limit.
    pub async fn pod(&self, memory: u64) -> Result<Pod> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("bench-{number}");
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                uid: format!("uid-{}-{name}", self.name),
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
            runtime_handler: self.handler.clone(),
        };
        let made = self.runtime.clone().run_pod_sandbox(request).await?;
        Ok(Pod {
            id: made.into_inner().pod_sandbox_id,
            config,
            containers: AtomicUsize::new(0),
        })
    }

    /// What the runtime tells of a pod beyond CRI's fields: JSON.
    pub async fn details(&self, pod: &Pod) -> Result<serde_json::Value> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let status = self.runtime.clone().pod_sandbox_status(request).await?;
        let info = status.into_inner().info.remove("info");
        Ok(serde_json::from_str(&info.unwrap_or_default())?)
    }

    /// Creates a container; how long it took.
    pub async fn create(&self, pod: &Pod, task: Task<'_>) -> Result<(Container, Duration)> {
        let number = pod.containers.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("c{number}");
        let script = task.script.map(|script| ["sh", "-c", script]);
        let volume = task.volume.map(|(host, container)| cri::Mount {
            host_path: host.display().to_string(),
            container_path: container.to_owned(),
            readonly: true,
            ..Default::default()
        });
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata {
                    name: name.clone(),
                    attempt: 0,
                }),
                image: Some(spec(task.image)),
                command: script.into_iter().flatten().map(str::to_owned).collect(),
                mounts: volume.into_iter().collect(),
                log_path: format!("{name}.log"),
                linux: Some(cri::LinuxContainerConfig::default()),
                ..Default::default()
            }),
            sandbox_config: Some(pod.config.clone()),
        };
        let begun = Instant::now();
        let made = self.runtime.clone().create_container(request).await?;
        let took = begun.elapsed();
        let container = Container {
            id: made.into_inner().container_id,
            log: Path::new(&pod.config.log_directory).join(format!("{name}.log")),
        };
        Ok((container, took))
    }

    /// Creates and starts a container.
    pub async fn run(&self, pod: &Pod, task: Task<'_>) -> Result<Container> {
        let (container, _) = self.create(pod, task).await?;
        let request = cri::StartContainerRequest {
            container_id: container.id.clone(),
        };
        self.runtime.clone().start_container(request).await?;
        Ok(container)
    }

    /// Waits for a container's first output in its log.
    pub async fn first_output(&self, container: &Container) -> Result<()> {
        let begun = Instant::now();
        while std::fs::metadata(&container.log).map_or(0, |log| log.len()) == 0 {
            if begun.elapsed() > PATIENCE {
                let log = container.log.display();
                return Err(format!("{}: nothing in {log} for {PATIENCE:?}", self.name).into());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Stops a container at once.
    pub async fn stop_container(&self, container: &Container) -> Result<()> {
        let request = cri::StopContainerRequest {
            container_id: container.id.clone(),
            timeout: 0,
        };
        self.runtime.clone().stop_container(request).await?;
        Ok(())
    }

    /// Removes a container.
    pub async fn remove_container(&self, container: Container) -> Result<()> {
        let request = cri::RemoveContainerRequest {
            container_id: container.id,
        };
        self.runtime.clone().remove_container(request).await?;
        Ok(())
    }

    /// Runs a script in a container; what it says.
    pub async fn exec(&self, container: &Container, script: &str) -> Result<String> {
        let command = ["sh", "-c", script];
        self.exec_command(container, &command).await
    }

    /// Runs a command in a container; what it says.
    pub async fn exec_command(&self, container: &Container, command: &[&str]) -> Result<String> {
        let request = cri::ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 1800,
        };
        let done = self.runtime.clone().exec_sync(request).await?.into_inner();
        if done.exit_code != 0 {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            return Err(format!("{}: {}: {said}", self.name, command.join(" ")).into());
        }
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// How long a script takes, by the clock in the container: the way there and back does not count.
    pub async fn time(&self, container: &Container, script: &str) -> Result<Duration> {
        let up = "$(cut -d' ' -f1 /proc/uptime)";
        let script = format!("a={up}; {{ {script}; }} >/dev/null; echo $a {up}");
        let said = self.exec(container, &script).await?;
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

    /// Stops and removes a pod, with its containers.
    pub async fn remove(&self, pod: Pod) -> Result<()> {
        let pod_sandbox_id = pod.id;
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.runtime.clone().stop_pod_sandbox(request).await?;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.clone().remove_pod_sandbox(request).await?;
        Ok(())
    }
}

fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}
