//! Pods and containers as a kubelet makes them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use cri::ContainerState;
use nix::unistd::Pid;
use tonic::Status;

use crate::{IMAGE, Line, Node, read_log};

/// A pod, by its sandbox's ID.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The pod sandbox's ID.
    pub id: String,
    /// What it was made from.
    pub config: cri::PodSandboxConfig,
}

/// A container, by its ID.
#[derive(Clone, Debug)]
pub struct Container {
    /// The container's ID.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

/// The seconds that a script may take: in the lab of a busy machine little is done in one.
const PATIENCE: i64 = 300;

/// How a pod differs from the usual one.
#[derive(Clone, Debug, Default)]
pub struct PodOptions {
    /// Containers share one PID namespace.
    pub share_pids: bool,
    /// The runtime handler.
    pub handler: String,
    /// The pod's memory limit in bytes.
    pub memory: i64,
    /// The pod's CPU limit in thousandths.
    pub millicpus: i64,
    /// Name servers.
    pub dns: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options of the resolver.
    pub dns_options: Vec<String>,
    /// Ports mapped on the host.
    pub ports: Vec<cri::PortMapping>,
    /// Namespaces, in place of `share_pids`.
    pub namespaces: Option<cri::NamespaceOption>,
    /// Kernel parameters.
    pub sysctls: HashMap<String, String>,
    /// Annotations.
    pub annotations: HashMap<String, String>,
    /// The cgroup that the pod is accounted for in.
    pub cgroup_parent: String,
}

/// How a container differs from the usual one.
#[derive(Clone, Debug, Default)]
pub struct ContainerOptions {
    /// The memory limit in bytes.
    pub memory: i64,
    /// Mounts.
    pub mounts: Vec<cri::Mount>,
    /// Standard input is kept open.
    pub stdin: bool,
    /// Standard input ends with the first client that attaches to it.
    pub stdin_once: bool,
    /// A terminal.
    pub tty: bool,
    /// Containers of the pod share PIDs.
    pub share_pids: bool,
    /// Another image.
    pub image: Option<String>,
    /// Namespaces, in place of `share_pids`.
    pub namespaces: Option<cri::NamespaceOption>,
    /// All privileges.
    pub privileged: bool,
    /// Devices.
    pub devices: Vec<cri::Device>,
    /// An AppArmor profile of the node.
    pub apparmor: Option<String>,
}

/// A volume: a file or directory of the host, and where the container has it.
pub fn of_host(path: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: path.display().to_string(),
        container_path: container.to_owned(),
        ..cri::Mount::default()
    }
}

/// The pod process that is noted in a pod's directory. It may have ended since.
pub fn pod_process(directory: &Path) -> Option<Pid> {
    let noted = fs::read_to_string(directory.join("vmm.pid")).ok()?;
    let number = noted.split_once(' ')?.0.parse().ok()?;
    Some(Pid::from_raw(number))
}

impl Node {
    /// Runs a usual pod.
    pub async fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, PodOptions::default())
            .await
            .unwrap_or_else(|status| panic!("RunPodSandbox {name}: {status}"))
    }

    /// Runs a pod.
    pub async fn pod_with(&self, name: &str, options: PodOptions) -> Result<Pod, Status> {
        let pid = if options.share_pids {
            cri::NamespaceMode::Pod
        } else {
            cri::NamespaceMode::Container
        };
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "test".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.dir().join("logs").join(name).display().to_string(),
            dns_config: Some(cri::DnsConfig {
                servers: options.dns,
                searches: options.searches,
                options: options.dns_options,
            }),
            port_mappings: options.ports,
            labels: HashMap::from([("test".to_owned(), name.to_owned())]),
            annotations: options.annotations,
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options.namespaces.unwrap_or(cri::NamespaceOption {
                        pid: pid.into(),
                        ..cri::NamespaceOption::default()
                    })),
                    ..cri::LinuxSandboxSecurityContext::default()
                }),
                sysctls: options.sysctls,
                cgroup_parent: options.cgroup_parent,
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: options.memory,
                    cpu_quota: options.millicpus * 100,
                    cpu_period: if options.millicpus > 0 { 100_000 } else { 0 },
                    ..cri::LinuxContainerResources::default()
                }),
                ..cri::LinuxPodSandboxConfig::default()
            }),
            ..cri::PodSandboxConfig::default()
        };
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: options.handler,
        };
        let response = self.runtime.clone().run_pod_sandbox(request).await?;
        Ok(Pod {
            id: response.into_inner().pod_sandbox_id,
            config,
        })
    }

    /// Makes a container that runs a shell script.
    pub async fn create(
        &self,
        pod: &Pod,
        name: &str,
        script: &str,
        options: ContainerOptions,
    ) -> Result<Container, Status> {
        let pid = if options.share_pids {
            cri::NamespaceMode::Pod
        } else {
            cri::NamespaceMode::Container
        };
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: options.image.unwrap_or_else(|| IMAGE.to_owned()),
                ..cri::ImageSpec::default()
            }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            mounts: options.mounts,
            log_path: format!("{name}.log"),
            stdin: options.stdin,
            stdin_once: options.stdin_once,
            tty: options.tty,
            devices: options.devices,
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: options.memory,
                    ..cri::LinuxContainerResources::default()
                }),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(options.namespaces.unwrap_or(cri::NamespaceOption {
                        pid: pid.into(),
                        ..cri::NamespaceOption::default()
                    })),
                    privileged: options.privileged,
                    apparmor: options.apparmor.map(|name| cri::SecurityProfile {
                        profile_type: cri::security_profile::ProfileType::Localhost.into(),
                        localhost_ref: name,
                    }),
                    ..cri::LinuxContainerSecurityContext::default()
                }),
            }),
            ..cri::ContainerConfig::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let response = self.runtime.clone().create_container(request).await?;
        let mut log = PathBuf::from(&pod.config.log_directory);
        log.push(format!("{name}.log"));
        Ok(Container {
            id: response.into_inner().container_id,
            log,
        })
    }

    /// Starts a container.
    pub async fn start_container(&self, container: &Container) -> Result<(), Status> {
        let request = cri::StartContainerRequest {
            container_id: container.id.clone(),
        };
        self.runtime.clone().start_container(request).await?;
        Ok(())
    }

    /// Makes and starts a usual container.
    pub async fn run(&self, pod: &Pod, name: &str, script: &str) -> Container {
        self.run_with(pod, name, script, ContainerOptions::default())
            .await
    }

    /// Makes and starts a container.
    pub async fn run_with(
        &self,
        pod: &Pod,
        name: &str,
        script: &str,
        options: ContainerOptions,
    ) -> Container {
        let container = self
            .create(pod, name, script, options)
            .await
            .unwrap_or_else(|status| panic!("CreateContainer {name}: {status}"));
        self.start_container(&container)
            .await
            .unwrap_or_else(|status| panic!("StartContainer {name}: {status}"));
        container
    }

    /// The container's status.
    pub async fn status(&self, container: &Container) -> cri::ContainerStatus {
        let request = cri::ContainerStatusRequest {
            container_id: container.id.clone(),
            verbose: false,
        };
        let response = self.runtime.clone().container_status(request).await;
        response
            .expect("ContainerStatus")
            .into_inner()
            .status
            .expect("a status")
    }

    /// Waits until the container has ended; its status.
    pub async fn ended(&self, container: &Container) -> cri::ContainerStatus {
        let deadline = Instant::now() + Duration::from_secs(600);
        loop {
            let status = self.status(container).await;
            if status.state() == ContainerState::ContainerExited {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the container does not end: {status:?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Runs a script in a new container until it ends; its status and its log.
    pub async fn output(
        &self,
        pod: &Pod,
        name: &str,
        script: &str,
    ) -> (cri::ContainerStatus, Vec<Line>) {
        let container = self.run(pod, name, script).await;
        let status = self.ended(&container).await;
        (status, read_log(&container.log))
    }

    /// ExecSync of a shell script: exit code, standard output, standard error.
    pub async fn exec(
        &self,
        container: &Container,
        script: &str,
        timeout: i64,
    ) -> Result<(i32, String, String), Status> {
        let request = cri::ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout,
        };
        let response = self.runtime.clone().exec_sync(request).await?.into_inner();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((
            response.exit_code,
            text(response.stdout),
            text(response.stderr),
        ))
    }

    /// What a script writes that must succeed.
    pub async fn says(&self, container: &Container, script: &str) -> String {
        let (code, out, err) = self
            .exec(container, script, PATIENCE)
            .await
            .unwrap_or_else(|status| panic!("ExecSync {script:?}: {status}"));
        assert_eq!(code, 0, "{script:?} said {out:?} and {err:?}");
        out.trim().to_owned()
    }

    /// What `caisson inspect` says of a pod.
    pub fn inspect(&self, pod: &Pod) -> serde_json::Value {
        let output = self.caisson(&["inspect", &pod.id]);
        assert!(output.status.success(), "{output:?}");
        let mut all: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("a JSON list");
        all[0].take()
    }

    /// What `caisson stats` says of a pod.
    pub fn stats(&self, pod: &Pod) -> serde_json::Value {
        let output = self.caisson(&["stats", "--json", &pod.id]);
        assert!(output.status.success(), "{output:?}");
        let mut all: Vec<_> = serde_json::from_slice(&output.stdout).expect("a JSON list");
        assert_eq!(all.len(), 1, "{output:?}");
        all.remove(0)
    }

    /// Waits up to a minute until the pod holds less of the host's memory for itself than so many bytes; returns how much.
    pub async fn holds_less(&self, pod: &Pod, bytes: u64) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let stats = self.stats(pod);
            let private = stats["private_on_host"].as_u64().expect("a number");
            if private < bytes {
                return private;
            }
            assert!(Instant::now() < deadline, "not below {bytes}: {stats}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// The pod's status.
    pub async fn pod_status(&self, pod: &Pod) -> Result<cri::PodSandboxStatus, Status> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let response = self.runtime.clone().pod_sandbox_status(request).await?;
        Ok(response.into_inner().status.expect("a status"))
    }

    /// Stops a container.
    pub async fn stop_container(&self, container: &Container, timeout: i64) {
        let request = cri::StopContainerRequest {
            container_id: container.id.clone(),
            timeout,
        };
        let stopped = self.runtime.clone().stop_container(request).await;
        stopped.expect("StopContainer");
    }

    /// Removes a container.
    pub async fn remove_container(&self, container_id: &str) {
        let request = cri::RemoveContainerRequest {
            container_id: container_id.to_owned(),
        };
        let removed = self.runtime.clone().remove_container(request).await;
        removed.expect("RemoveContainer");
    }

    /// Stops and removes a pod.
    pub async fn remove(&self, pod: &Pod) {
        let mut runtime = self.runtime.clone();
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        runtime
            .stop_pod_sandbox(request)
            .await
            .expect("StopPodSandbox");
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        runtime
            .remove_pod_sandbox(request)
            .await
            .expect("RemovePodSandbox");
    }
}
