//! A daemon that is killed at every step of every call that changes something: the next one brings the node to order, and
//! the call can be made again.

use std::fs;
use std::time::{Duration, Instant};

use caisson::steps::{self, Step};
use caisson_proto::{cli, cri};
use caisson_tests::{
    Container, ContainerOptions, Node, NodeOptions, Pod, PodOptions, of_host, read_log,
};
use cri::ContainerState;

/// Says that it began, and ends as it is asked to, with a code of its own.
const SCRIPT: &str = "echo begun; trap 'exit 7' TERM; sleep 100000 & wait";

// must-test: a non-idempotent create leaks VMs; crash-looping containers leak resource accounting
#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_survives_or_vanishes_whole() {
    let Some(mut walk) = Walk::begin("microvm").await else {
        return;
    };
    let pod = walk.run(&[steps::RUN_MICROVM, steps::RUN]).await;
    walk.create(&pod).await;
    walk.start(&pod).await;
    walk.stop(&pod).await;
    walk.remove(&pod).await;
    walk.take_apart(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_host_survives_or_vanishes_whole() {
    let Some(mut walk) = Walk::begin("host").await else {
        return;
    };
    let pod = walk.run(&[steps::RUN_HOST, steps::RUN]).await;
    walk.take_apart(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_written_or_restored_is_there_once_and_moves() {
    let Some(mut walk) = Walk::begin("microvm").await else {
        return;
    };
    walk.node.restart().await;
    let pod = walk.node.pod("written").await;
    let written = walk.snapshot(&pod).await;
    walk.restore(&pod, &written).await;
}

/// A node whose daemon dies at one step after another.
struct Walk {
    node: Node,
    handler: &'static str,
}

impl Walk {
    async fn begin(handler: &'static str) -> Option<Self> {
        let options = NodeOptions {
            allow_host: true,
            ..NodeOptions::default()
        };
        let node = Node::start_with(options).await?;
        Some(Self { node, handler })
    }

    /// A new daemon, which dies at this step.
    async fn armed(&mut self, step: Step) {
        self.node.kill_daemon();
        self.node.start_again(Some(&format!("{step:?}")));
        self.node.wait_until_serving().await;
    }

    /// The call that was made has not lived to its answer.
    async fn is_cut<T>(&mut self, answer: Result<T, tonic::Status>, step: Step) {
        assert!(
            answer.is_err(),
            "the daemon lived through {step:?}; is it a build with debug assertions (scripts/build --quick)?"
        );
        self.node.wait_for_death().await;
    }

    /// RunPodSandbox with the same name again and again. The pod of the last step is there in the end.
    async fn run(&mut self, steps: &[&[Step]]) -> Pod {
        let options = PodOptions {
            handler: self.handler.into(),
            ..PodOptions::default()
        };
        for step in steps.iter().copied().flatten() {
            self.armed(*step).await;
            assert!(self.pods().await.is_empty(), "before {step:?}");
            self.node.assert_nothing_left().await;
            let answer = self.node.pod_with("crash", options.clone()).await;
            self.is_cut(answer, *step).await;
        }
        self.node.restart().await;
        let pods = self.pods().await;
        assert_eq!(pods.len(), 1, "{pods:?}");
        assert_eq!(pods[0].state(), cri::PodSandboxState::SandboxReady);
        // What another client asks for meanwhile is refused, with the ID that has the name.
        let twice = self.node.pod_with("crash", options).await.unwrap_err();
        assert_eq!(twice.code(), tonic::Code::AlreadyExists, "{twice}");
        assert!(twice.message().contains(&pods[0].id), "{twice}");
        Pod {
            id: pods[0].id.clone(),
            config: cri::PodSandboxConfig {
                log_directory: self.node.dir().join("logs/crash").display().to_string(),
                ..cri::PodSandboxConfig::default()
            },
        }
    }

    /// CreateContainer with the same name and a volume again and again.
    async fn create(&mut self, pod: &Pod) {
        let volume = self.node.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        let options = ContainerOptions {
            mounts: vec![of_host(&volume, "/volume")],
            ..ContainerOptions::default()
        };
        for step in steps::CREATE {
            self.armed(*step).await;
            assert!(self.containers().await.is_empty(), "before {step:?}");
            assert_eq!(self.volumes(), 0, "before {step:?}");
            let answer = self
                .node
                .create(pod, "created", SCRIPT, options.clone())
                .await;
            self.is_cut(answer, *step).await;
        }
        self.node.restart().await;
        let all = self.containers().await;
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].state(), ContainerState::ContainerCreated);
        assert_eq!(self.volumes(), 1);
        self.node.remove_container(&all[0].id).await;
        assert_eq!(self.volumes(), 0);
    }

    /// StartContainer: until the process runs it can be called again, and then it is not needed any more.
    async fn start(&mut self, pod: &Pod) {
        for step in steps::START {
            let name = format!("{step:?}");
            let container = self.made(pod, &name).await;
            self.armed(*step).await;
            let answer = self.node.start_container(&container).await;
            self.is_cut(answer, *step).await;
            self.node.restart().await;
            if self.node.status(&container).await.state() == ContainerState::ContainerCreated {
                self.node.start_container(&container).await.unwrap();
            }
            let state = self.node.status(&container).await.state();
            assert_eq!(state, ContainerState::ContainerRunning, "{step:?}");
            self.begun_once(&container).await;
            self.node.remove_container(&container.id).await;
        }
    }

    /// StopContainer: how the container ended is known afterwards.
    async fn stop(&mut self, pod: &Pod) {
        for step in steps::STOP {
            let container = self.node.run(pod, &format!("{step:?}"), SCRIPT).await;
            self.begun_once(&container).await;
            self.armed(*step).await;
            let request = cri::StopContainerRequest {
                container_id: container.id.clone(),
                timeout: 60,
            };
            let answer = self.node.runtime.stop_container(request).await;
            self.is_cut(answer, *step).await;
            self.node.restart().await;
            let status = self.node.ended(&container).await;
            assert_eq!((status.exit_code, &status.reason[..]), (7, "Error"));
            self.node.remove_container(&container.id).await;
        }
    }

    /// RemoveContainer: what was begun is brought to an end without being asked for again.
    async fn remove(&mut self, pod: &Pod) {
        for step in steps::REMOVE {
            let container = self.made(pod, &format!("{step:?}")).await;
            self.armed(*step).await;
            let request = cri::RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            let answer = self.node.runtime.remove_container(request).await;
            self.is_cut(answer, *step).await;
            self.node.restart().await;
            let deadline = Instant::now() + Duration::from_secs(30);
            while !self.containers().await.is_empty() {
                assert!(Instant::now() < deadline, "it is still there: {step:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// StopPodSandbox and RemovePodSandbox: each daemon goes on from where the last one died, asked or not.
    async fn take_apart(&mut self, pod: &Pod) {
        self.node.run(pod, "last", SCRIPT).await;
        for step in steps::STOP_POD.iter().chain(steps::REMOVE_POD) {
            self.node.kill_daemon();
            self.node.start_again(Some(&format!("{step:?}")));
            let stop = steps::STOP_POD.contains(step);
            let deadline = Instant::now() + Duration::from_secs(60);
            while !self.node.is_dead() {
                assert!(Instant::now() < deadline, "{step:?} is not reached");
                let answer = if stop {
                    let pod_sandbox_id = pod.id.clone();
                    let request = cri::StopPodSandboxRequest { pod_sandbox_id };
                    let answer = self.node.runtime.stop_pod_sandbox(request).await;
                    answer.map(drop)
                } else {
                    let pod_sandbox_id = pod.id.clone();
                    let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
                    let answer = self.node.runtime.remove_pod_sandbox(request).await;
                    answer.map(drop)
                };
                assert!(
                    answer.is_err(),
                    "the daemon lived through {step:?}; is it a build with debug assertions (scripts/build --quick)?"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            self.node.wait_for_death().await;
        }
        self.node.restart().await;
        assert!(self.pods().await.is_empty() && self.containers().await.is_empty());
        self.node.assert_nothing_left().await;
    }

    /// Snapshot: the pod goes on with the next daemon, but for the last step, after which it is all in the directory. Tells
    /// where that is.
    async fn snapshot(&mut self, pod: &Pod) -> cli::RestoreRequest {
        let container = self
            .node
            .run(pod, "c", "while :; do echo tick; sleep 0.2; done")
            .await;
        let mut written = cli::RestoreRequest::default();
        for step in steps::SNAPSHOT {
            self.armed(*step).await;
            let dir = self.node.root().join(format!("{step:?}"));
            let path = dir.display().to_string();
            let request = cli::SnapshotRequest {
                pod_sandbox_id: pod.id.clone(),
                path: path.clone(),
                leave_running: false,
            };
            let answer = self.node.cli.snapshot(request).await;
            self.is_cut(answer, *step).await;
            let before = log_length(&container);
            self.node.restart().await;
            written = cli::RestoreRequest { path };
            if *step == Step::SnapshotPodEnds {
                break;
            }
            grows(&container, before, *step).await;
            self.node.says(&container, "true").await;
            // What is there of the snapshot is not taken for a whole one, and a whole one not for another pod.
            let refused = self.node.cli.restore(written.clone()).await.unwrap_err();
            let whole = *step == Step::SnapshotWritten;
            let reason = ["not a whole snapshot", "is here already"][usize::from(whole)];
            assert!(refused.message().contains(reason), "{step:?}: {refused}");
            fs::remove_dir_all(dir).unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.pods().await.is_empty() {
            assert!(Instant::now() < deadline, "the pod is not removed");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.node.assert_nothing_left().await;
        written
    }

    /// Restore: half of it is taken back, and it can be asked for again. Once the records say so, the pod is there.
    async fn restore(&mut self, pod: &Pod, written: &cli::RestoreRequest) {
        for step in steps::RESTORE {
            self.armed(*step).await;
            assert!(self.pods().await.is_empty() && self.containers().await.is_empty());
            self.node.assert_nothing_left().await;
            let answer = self.node.cli.restore(written.clone()).await;
            self.is_cut(answer, *step).await;
        }
        self.node.restart().await;
        let pods = self.pods().await;
        assert_eq!(pods.len(), 1, "{pods:?}");
        assert_eq!(pods[0].id, pod.id);
        let all = self.containers().await;
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].state(), ContainerState::ContainerRunning);
        let container = Container {
            id: all[0].id.clone(),
            log: self.node.dir().join("logs/written/c.log"),
        };
        grows(&container, log_length(&container), Step::RestoreSaved).await;
        self.node.remove(pod).await;
        self.node.assert_nothing_left().await;
    }

    async fn made(&self, pod: &Pod, name: &str) -> Container {
        let options = ContainerOptions::default();
        let made = self.node.create(pod, name, SCRIPT, options).await;
        made.unwrap_or_else(|status| panic!("CreateContainer {name}: {status}"))
    }

    /// The container's process was started once.
    async fn begun_once(&self, container: &Container) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while log_length(container) == 0 {
            assert!(Instant::now() < deadline, "the container says nothing");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let log = read_log(&container.log);
        let lines: Vec<_> = log.iter().map(|line| line.content.as_slice()).collect();
        assert_eq!(lines, [b"begun"]);
    }

    async fn pods(&self) -> Vec<cri::PodSandbox> {
        let request = cri::ListPodSandboxRequest { filter: None };
        let pods = self.node.runtime.clone().list_pod_sandbox(request).await;
        pods.unwrap().into_inner().items
    }

    async fn containers(&self) -> Vec<cri::Container> {
        let request = cri::ListContainersRequest { filter: None };
        let all = self.node.runtime.clone().list_containers(request).await;
        all.unwrap().into_inner().containers
    }

    /// How many containers have volumes in the pod's share.
    fn volumes(&self) -> usize {
        let pods = fs::read_dir(self.node.state().join("pods")).unwrap();
        pods.map(|pod| fs::read_dir(pod.unwrap().path().join("share.host/c")))
            .map(|containers| containers.unwrap().count())
            .sum()
    }
}

fn log_length(container: &Container) -> u64 {
    fs::metadata(&container.log).map_or(0, |log| log.len())
}

/// A container goes on saying something after the daemon died at this step.
async fn grows(container: &Container, from: u64, step: Step) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while log_length(container) <= from {
        assert!(Instant::now() < deadline, "it stands still after {step:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
