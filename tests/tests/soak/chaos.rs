//! What is killed, and who has to know of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fmt, fs};

use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use caisson_tests::{Node, Random, dial, pod_process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Longer than the daemon gives anything it waits for.
const PATIENCE: Duration = Duration::from_secs(300);

const AGENT: &str = "agent";
const POD_PROCESS: &str = "pod process";

/// What was killed so far.
pub struct Chaos {
    channel: Channel,
    pods: PathBuf,
    /// The beginnings of pods' IDs, with what of them was killed.
    victims: Mutex<BTreeMap<String, &'static str>>,
    daemons: Mutex<u64>,
}

impl Chaos {
    pub fn new(socket: PathBuf, state: &Path) -> Self {
        Self {
            // It dials again by itself, as a kubelet's does.
            channel: dial(&socket, None),
            pods: state.join("pods"),
            victims: Mutex::default(),
            daemons: Mutex::default(),
        }
    }

    /// How many pods were killed.
    pub fn kills(&self) -> usize {
        self.victims.lock().unwrap().len()
    }

    /// Whether something of this pod was killed.
    pub fn has_killed(&self, pod: &str) -> bool {
        let victims = self.victims.lock().unwrap();
        victims.keys().any(|victim| pod.starts_with(victim))
    }

    /// Makes a call until a daemon has answered it. One that is dead meanwhile has a successor soon.
    pub async fn call<T>(
        &self,
        make: impl AsyncFn(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match bounded(make(self.client())).await {
                Ok(answer) => return Ok(answer),
                Err(status) if !is_cut(&status) || Instant::now() > deadline => return Err(status),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// A client, for calls that are not to be made twice; each is to be [`bounded`].
    pub fn client(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// Kills, in turn, the daemon (if it may), a pod process, and the agent of a pod on the host. A daemon has a successor
    /// when this is done.
    pub async fn kill(&self, node: &mut Node, random: &mut Random, daemon_too: bool) {
        tokio::time::sleep(random.below(Duration::from_secs(2))).await;
        let turn = *self.daemons.lock().unwrap() as usize + self.kills();
        if daemon_too && turn.is_multiple_of(3) {
            *self.daemons.lock().unwrap() += 1;
            node.restart().await;
            return;
        }
        let wanted = if turn.is_multiple_of(2) {
            AGENT
        } else {
            POD_PROCESS
        };
        let mut there: Vec<_> = fs::read_dir(&self.pods)
            .into_iter()
            .flatten()
            .filter_map(|entry| process_of(&entry.ok()?.path()))
            .collect();
        if there.iter().any(|(kind, ..)| *kind == wanted) {
            there.retain(|(kind, ..)| *kind == wanted);
        }
        if there.is_empty() {
            return;
        }
        let (kind, process, pod) = there.swap_remove(random.index(there.len()));
        self.victims.lock().unwrap().insert(pod, kind);
        let _ = kill(process, Signal::SIGKILL);
    }
}

impl fmt::Display for Chaos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let victims = self.victims.lock().unwrap();
        let count = |kind| victims.values().filter(|one| **one == kind).count();
        write!(
            f,
            "killed: {} daemons, {} pod processes, {} agents",
            self.daemons.lock().unwrap(),
            count(POD_PROCESS),
            count(AGENT)
        )
    }
}

/// The answer of a call, or DEADLINE_EXCEEDED where none comes in all the time that anything may take.
pub async fn bounded<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    let answer = tokio::time::timeout(PATIENCE, call).await;
    let none = |_| Status::deadline_exceeded(format!("no answer in {} s", PATIENCE.as_secs()));
    answer.map_err(none)?.map(Response::into_inner)
}

/// Whether the connection ended before there was an answer: what a server says has no source.
pub fn is_cut(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
        && matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled
        )
}

/// What there is to be killed of a pod, by its directory: its agent if it is on the host; and the beginning of its ID.
fn process_of(pod: &Path) -> Option<(&'static str, Pid, String)> {
    let group = fs::read_to_string(pod.join("cgroup")).unwrap_or_default();
    let agents = fs::read_to_string(Path::new(&group).join("sandbox/agent/cgroup.procs"));
    let agent = agents.ok().and_then(|all| all.lines().next()?.parse().ok());
    let (kind, process) = match agent {
        Some(agent) => (AGENT, Pid::from_raw(agent)),
        None => (POD_PROCESS, pod_process(pod)?),
    };
    // Not a process that has its number since.
    let name = fs::read_to_string(format!("/proc/{process}/comm")).ok()?;
    name.starts_with("caisson-").then(|| {
        let id = pod.file_name().unwrap_or_default().to_string_lossy();
        (kind, process, id.into_owned())
    })
}
