//! One pod's life: made, its container run to the end, its output and exit code checked, removed. The client does what a
//! kubelet does when an answer does not come: it looks what there is, and goes on from there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use caisson_tests::{IMAGE, read_log};
use cri::{ContainerState, PodSandboxState};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::chaos::{Chaos, bounded, is_cut};

/// Lines of output, which take about two seconds to be written.
const LINES: usize = 400;
/// How long a container may take, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(300);

/// How a life went.
#[derive(Debug)]
pub enum Ending {
    /// To its end, with everything as it should be.
    Whole,
    /// The pod was killed, and all that is left of it was right.
    Killed,
    /// The guest reset itself.
    Reset,
    /// Something was not as it should be.
    Wrong {
        /// In words.
        what: String,
        /// Bytes that are not in the log.
        lost: u64,
    },
}

/// Ends a life early.
enum Stop {
    /// With this.
    As(Ending),
    /// As the daemon says.
    Said(&'static str, Status),
}

/// One life.
pub struct Life<'a> {
    number: u64,
    chaos: &'a Chaos,
    config: cri::PodSandboxConfig,
    logs: PathBuf,
    handler: String,
}

impl<'a> Life<'a> {
    pub fn new(number: u64, chaos: &'a Chaos, logs: &Path) -> Self {
        let name = format!("life-{number}");
        let logs = logs.join(&name);
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "soak".into(),
                attempt: 0,
                name: name.clone(),
            }),
            hostname: name.clone(),
            log_directory: logs.display().to_string(),
            labels: HashMap::from([("life".into(), name)]),
            linux: Some(cri::LinuxPodSandboxConfig::default()),
            ..cri::PodSandboxConfig::default()
        };
        // Every third is on the host, whose agent is killed then.
        let handler = if number % 3 == 2 { "host" } else { "microvm" };
        Self {
            number,
            chaos,
            config,
            logs,
            handler: handler.into(),
        }
    }

    /// The whole life.
    pub async fn live(mut self) -> Ending {
        let ending = match self.go_on().await {
            Ok(()) => Ending::Whole,
            Err(Stop::As(ending)) => ending,
            Err(Stop::Said(call, status)) => wrong(format!("{call}: {status}")),
        };
        // Whatever came before, it is to be gone.
        match self.clear().await {
            Ok(()) => ending,
            Err(Stop::Said(call, status)) => wrong(format!("{call}: {status}, after {ending:?}")),
            Err(Stop::As(other)) => other,
        }
    }

    async fn go_on(&mut self) -> Result<(), Stop> {
        let pod = self.pod().await?;
        let result = self.container(&pod).await;
        let Err(stop) = result else { return Ok(()) };
        // An answer that says no is right if something of the pod was killed, or if its guest reset itself.
        if self.chaos.has_killed(&pod) {
            return match stop {
                Stop::As(wrong) => Err(Stop::As(wrong)),
                Stop::Said(..) => Err(Stop::As(Ending::Killed)),
            };
        }
        let why = self.reason(&pod).await?;
        match stop {
            Stop::Said(..) if why.contains("reset itself") => Err(Stop::As(Ending::Reset)),
            Stop::Said(call, status) if !why.is_empty() => {
                Err(Stop::As(wrong(format!("{call}: {status}; the pod: {why}"))))
            }
            other => Err(other),
        }
    }

    /// A pod that is ready, by its ID.
    async fn pod(&mut self) -> Result<String, Stop> {
        loop {
            let before = self.chaos.kills();
            let request = cri::RunPodSandboxRequest {
                config: Some(self.config.clone()),
                runtime_handler: self.handler.clone(),
            };
            let status = match bounded(self.chaos.client().run_pod_sandbox(request)).await {
                Ok(answer) => return Ok(answer.pod_sandbox_id),
                Err(status) => status,
            };
            // Of a call that was cut it is not known what it did; the next may find the name taken.
            if status.message().contains("reset itself") {
                return Err(Stop::As(Ending::Reset));
            }
            if !is_cut(&status)
                && status.code() != Code::AlreadyExists
                && self.chaos.kills() == before
            {
                return Err(Stop::Said("RunPodSandbox", status));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            for pod in self.pods().await? {
                if pod.state() == PodSandboxState::SandboxReady {
                    return Ok(pod.id);
                }
            }
            self.clear().await?;
            if let Some(metadata) = &mut self.config.metadata {
                metadata.attempt += 1;
            }
        }
    }

    /// The answer of whatever daemon gives one; the name of the call is for people.
    async fn asked<T>(
        &self,
        call: &'static str,
        make: impl AsyncFn(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Stop> {
        let answer = self.chaos.call(make).await;
        answer.map_err(|status| Stop::Said(call, status))
    }

    async fn pods(&self) -> Result<Vec<cri::PodSandbox>, Stop> {
        let filter = cri::PodSandboxFilter {
            label_selector: self.config.labels.clone(),
            ..cri::PodSandboxFilter::default()
        };
        let request = cri::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let listed = self
            .asked("ListPodSandbox", async |mut client| {
                client.list_pod_sandbox(request.clone()).await
            })
            .await?;
        Ok(listed.items)
    }

    /// Why the pod is not ready.
    async fn reason(&self, pod: &str) -> Result<String, Stop> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: true,
        };
        let status = self
            .asked("PodSandboxStatus", async |mut client| {
                client.pod_sandbox_status(request.clone()).await
            })
            .await?;
        let info = status.info.get("info").map_or("{}", String::as_str);
        let info: serde_json::Value = serde_json::from_str(info).unwrap_or_default();
        Ok(info["reason"].as_str().unwrap_or_default().to_owned())
    }

    /// A container from its making to its end.
    async fn container(&self, pod: &str) -> Result<(), Stop> {
        let id = self.created(pod).await?;
        self.started(&id).await?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            let status = self.status(&id).await?;
            if status.state() == ContainerState::ContainerExited {
                break status;
            }
            if Instant::now() > deadline {
                return Err(Stop::As(wrong(format!("it does not end: {status:?}"))));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        self.judge(pod, &status).await
    }

    async fn created(&self, pod: &str) -> Result<String, Stop> {
        let script = format!(
            "i=0; while [ $i -lt {LINES} ]; do echo {}; i=$((i+1)); [ $((i % 20)) -gt 0 ] || sleep 0.1; done; exit {}",
            self.line("$i"),
            self.code()
        );
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: IMAGE.into(),
                ..cri::ImageSpec::default()
            }),
            command: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            log_path: "c.log".into(),
            linux: Some(cri::LinuxContainerConfig::default()),
            ..cri::ContainerConfig::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        loop {
            let status = match bounded(self.chaos.client().create_container(request.clone())).await
            {
                Ok(answer) => return Ok(answer.container_id),
                Err(status) => status,
            };
            if !is_cut(&status) && status.code() != Code::AlreadyExists {
                return Err(Stop::Said("CreateContainer", status));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            let filter = cri::ContainerFilter {
                pod_sandbox_id: pod.to_owned(),
                ..cri::ContainerFilter::default()
            };
            let list = cri::ListContainersRequest {
                filter: Some(filter),
            };
            let listed = self
                .asked("ListContainers", async |mut client| {
                    client.list_containers(list.clone()).await
                })
                .await?;
            if let Some(one) = listed.containers.into_iter().next() {
                return Ok(one.id);
            }
        }
    }

    async fn started(&self, id: &str) -> Result<(), Stop> {
        loop {
            let request = cri::StartContainerRequest {
                container_id: id.to_owned(),
            };
            let status = match bounded(self.chaos.client().start_container(request)).await {
                Ok(_) => return Ok(()),
                Err(status) if is_cut(&status) => status,
                Err(status) => return Err(Stop::Said("StartContainer", status)),
            };
            if self.status(id).await?.state() != ContainerState::ContainerCreated {
                return Ok(());
            }
            eprintln!("life {}: StartContainer again: {status}", self.number);
        }
    }

    async fn status(&self, id: &str) -> Result<cri::ContainerStatus, Stop> {
        let request = cri::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self
            .asked("ContainerStatus", async |mut client| {
                client.container_status(request.clone()).await
            })
            .await?;
        answer
            .status
            .ok_or_else(|| Stop::As(wrong("no status".into())))
    }

    /// Whether the log and the exit code are right.
    async fn judge(&self, pod: &str, status: &cri::ContainerStatus) -> Result<(), Stop> {
        let mut written = Vec::new();
        for line in read_log(&self.logs.join("c.log")) {
            written.extend(&line.content);
            if !line.partial {
                written.push(b'\n');
            }
        }
        let all: String = (0..LINES)
            .map(|i| self.line(&i.to_string()) + "\n")
            .collect();
        if written == all.as_bytes() && status.exit_code == self.code() {
            return Ok(());
        }
        // A pod that was killed has what it had written until then, and says what befell it.
        let said = format!(
            "{} {} {:?}",
            status.exit_code, status.reason, status.message
        );
        let cut_short = all.as_bytes().starts_with(&written)
            && status.exit_code == 137
            && !status.message.is_empty();
        if cut_short && self.chaos.has_killed(pod) {
            return Err(Stop::As(Ending::Killed));
        }
        if cut_short && status.message.contains("reset itself") {
            return Err(Stop::As(Ending::Reset));
        }
        Err(Stop::As(Ending::Wrong {
            what: format!(
                "ended with {said}, not {}; {} of {} bytes are in its log",
                self.code(),
                written.len(),
                all.len()
            ),
            lost: (all.len() as u64).saturating_sub(written.len() as u64),
        }))
    }

    /// Stops and removes what there is of this life.
    async fn clear(&self) -> Result<(), Stop> {
        for pod in self.pods().await? {
            let stop = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            self.asked("StopPodSandbox", async |mut client| {
                client.stop_pod_sandbox(stop.clone()).await
            })
            .await?;
            let remove = cri::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            self.asked("RemovePodSandbox", async |mut client| {
                client.remove_pod_sandbox(remove.clone()).await
            })
            .await?;
        }
        Ok(())
    }

    /// A line of output; `which` is its number.
    fn line(&self, which: &str) -> String {
        format!(
            "life {} line {which} of what must be in the log whatever happens to the daemon",
            self.number
        )
    }

    /// The exit code that belongs to this life.
    fn code(&self) -> i32 {
        1 + (self.number % 100) as i32
    }
}

fn wrong(what: String) -> Ending {
    Ending::Wrong { what, lost: 0 }
}
