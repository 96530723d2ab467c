//! A runtime with its pods and containers.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::runtime::Result;
use cri::runtime_service_client::RuntimeServiceClient;
use futures::{StreamExt, TryStreamExt};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tonic::Status;
use tonic::transport::Channel;

/// How many calls make pods and containers at the same time.
const WORKERS: usize = 4;
/// How many ticks /proc counts in a second (USER_HZ, which is the same on every x86-64).
const TICKS: u64 = 100;
/// Memory of a pod in a microVM.
const POD_MEMORY: i64 = 384 << 20;

/// What there is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image of each container.
    pub image: String,
    /// How many pods.
    pub pods: usize,
    /// How many containers in all of them.
    pub containers: usize,
    /// How many pods have the handler `microvm`, the others then having `host`; `None`: no handler is named.
    pub microvms: Option<usize>,
}

/// A runtime.
pub struct Peer {
    /// What it is called.
    pub name: &'static str,
    /// A client of it.
    pub client: RuntimeServiceClient<Channel>,
    /// The pods.
    pub pods: Vec<(String, cri::PodSandboxConfig)>,
    /// The containers.
    pub containers: Vec<String>,
    plan: Plan,
    /// The process behind the socket.
    pid: i32,
}

impl Peer {
    /// The runtime at a socket.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn new(name: &'static str, socket: &Path, plan: Plan) -> Result<Self> {
        let channel = caisson_tests::dial(socket, None);
        let server = UnixStream::connect(socket)
            .and_then(|stream| getsockopt(&stream, PeerCredentials).map_err(std::io::Error::from));
        let server = server.map_err(|error| format!("{name} at {}: {error}", socket.display()))?;
        Ok(Self {
            name,
            client: RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20),
            pods: Vec::new(),
            containers: Vec::new(),
            plan,
            pid: server.pid(),
        })
    }

    /// The processor time that the runtime's process has taken since its start.
    ///
    /// # Errors
    /// It has ended.
    pub fn processor_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        // The program's name is in brackets and may have spaces; utime and stime are fields 14 and 15 (proc(5)).
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 1000 / TICKS))
    }

    /// What failed, on which runtime.
    fn failed(&self, call: &'static str) -> impl Fn(Status) -> String {
        let name = self.name;
        move |status| format!("{name}: {call}: {status}")
    }

    /// Makes all pods and containers, and starts them.
    ///
    /// # Errors
    /// The call that failed, as of every function here.
    pub async fn fill(&mut self) -> Result<()> {
        let began = Instant::now();
        let pods = futures::stream::iter(0..self.plan.pods)
            .map(|number| self.pod(number))
            .buffer_unordered(WORKERS);
        let pods: Vec<_> = pods.try_collect().await?;
        self.pods = pods;
        let made = began.elapsed();
        let (this, done) = (&*self, &AtomicUsize::new(0));
        // One after another goes to another pod, as on a node where many pods start.
        let containers = futures::stream::iter(0..self.plan.containers)
            .map(|number| async move {
                let (pod, config) = &this.pods[number % this.pods.len()];
                let id = this.create(pod, config, &format!("c{number}")).await?;
                this.start(&id).await?;
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                if done.is_multiple_of(100) {
                    eprintln!("{}: {done} containers run", this.name);
                }
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(id)
            })
            .buffer_unordered(WORKERS);
        let containers: Vec<_> = containers.try_collect().await?;
        self.containers = containers;
        println!(
            "{}: {} pods in {:.0} s, {} containers made and started in {:.0} s more",
            self.name,
            self.pods.len(),
            made.as_secs_f64(),
            self.containers.len(),
            (began.elapsed() - made).as_secs_f64()
        );
        Ok(())
    }

    async fn pod(&self, number: usize) -> Result<(String, cri::PodSandboxConfig)> {
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: format!("pod{number}"),
                uid: format!("5f0e7d3c-0000-4000-8000-{number:012}"),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: format!("pod{number}"),
            labels: labels(&format!("pod{number}")),
            annotations: annotations(),
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: POD_MEMORY,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let handler = match self.plan.microvms {
            None => "",
            Some(microvms) if number < microvms => "microvm",
            Some(_) => "host",
        };
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let made = self.client.clone().run_pod_sandbox(request).await;
        let made = made.map_err(self.failed("RunPodSandbox"))?;
        Ok((made.into_inner().pod_sandbox_id, config))
    }

    /// Makes a container that sleeps; its ID.
    pub async fn create(
        &self,
        pod: &str,
        sandbox: &cri::PodSandboxConfig,
        name: &str,
    ) -> Result<String> {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: self.plan.image.clone(),
                ..Default::default()
            }),
            command: ["sleep", "1000000"].map(str::to_owned).to_vec(),
            labels: labels(name),
            annotations: annotations(),
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources {
                    cpu_shares: 102,
                    oom_score_adj: 999,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        let made = self.client.clone().create_container(request).await;
        let made = made.map_err(self.failed("CreateContainer"))?;
        Ok(made.into_inner().container_id)
    }

    /// Starts a container.
    pub async fn start(&self, id: &str) -> Result<()> {
        let container_id = id.to_owned();
        let request = cri::StartContainerRequest { container_id };
        let started = self.client.clone().start_container(request).await;
        started.map_err(self.failed("StartContainer"))?;
        Ok(())
    }

    /// Stops a container at once, and removes it.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let container_id = id.to_owned();
        let mut client = self.client.clone();
        let request = cri::StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 0,
        };
        let stopped = client.stop_container(request).await;
        stopped.map_err(self.failed("StopContainer"))?;
        let request = cri::RemoveContainerRequest { container_id };
        let removed = client.remove_container(request).await;
        removed.map_err(self.failed("RemoveContainer"))?;
        Ok(())
    }

    /// Removes all pods with their containers.
    pub async fn empty(&self) {
        let removed = futures::stream::iter(&self.pods).map(|(id, _)| async {
            let pod_sandbox_id = id.clone();
            let mut client = self.client.clone();
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
            };
            let stopped = client.stop_pod_sandbox(request).await;
            let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
            let removed = client.remove_pod_sandbox(request).await;
            for status in [stopped.err(), removed.err()].into_iter().flatten() {
                eprintln!("{}: a pod is left: {status}", self.name);
            }
        });
        removed.buffer_unordered(WORKERS).collect::<()>().await;
    }
}

/// As many labels and annotations as a kubelet gives.
fn labels(name: &str) -> std::collections::HashMap<String, String> {
    [
        ("io.kubernetes.pod.name", "some-deployment-7d9c5b8f6d-x2x4z"),
        ("io.kubernetes.pod.namespace", "bench"),
        (
            "io.kubernetes.pod.uid",
            "5f0e7d3c-0000-4000-8000-000000000000",
        ),
        ("io.kubernetes.container.name", name),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn annotations() -> std::collections::HashMap<String, String> {
    [
        ("io.kubernetes.container.hash", "8a7c3b1f"),
        ("io.kubernetes.container.restartCount", "0"),
        (
            "io.kubernetes.container.terminationMessagePath",
            "/dev/termination-log",
        ),
        ("io.kubernetes.container.terminationMessagePolicy", "File"),
        ("io.kubernetes.pod.terminationGracePeriod", "30"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}
