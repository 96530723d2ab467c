//! The start of a pod on the host, from an empty directory to an agent that takes containers.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use caisson_proto::agent as proto;
use caisson_vmm_protocol::{JailConfig, JoinConfig, PROTOCOL_VERSION, Reply, Request};
use nix::unistd::setsid;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Host, HostConfig};
use crate::network::{Coming, PodNetwork};
use crate::sandbox::pod::cgroup::{self, Groups};
use crate::sandbox::pod::control::{self, Control};
use crate::sandbox::pod::dir::{PodDir, listen};
use crate::sandbox::pod::{Fds, process, scratch};
use crate::sandbox::{Sandbox, SandboxError, SandboxPlan, Scratch, agent, take_back};
use crate::steps::{self, Step};
use crate::timings::Timings;

/// How long the agent and the pod process may take until they are at work, on a node that does too much at a time.
const AGENT_TIMEOUT: Duration = Duration::from_secs(120);

impl Host {
    /// Makes the pod's directories and cgroup, starts its agent and its pod process, and lets the agent set up the
    /// sandbox. The agent comes before the pod process, which is told whom to watch. The network comes before both.
    ///
    /// If a step fails everything is taken back, the network excepted, which is the caller's.
    ///
    /// # Errors
    /// [`SandboxError::Start`] with the step that failed and why.
    pub async fn start(
        plan: &SandboxPlan,
        config: &HostConfig,
        network: Coming,
        timings: Timings,
    ) -> Result<Self, SandboxError> {
        let error = |step| SandboxError::at(&plan.id, step);
        let network = network.await.map_err(SandboxError::Network)?;
        let dir = PodDir::new(&plan.id, &config.pod)?;
        let result = async {
            timings
                .step("start agent and caisson-vmm", spawn(plan, config, &dir))
                .await
                .map_err(error("start the agent on the host"))?;
            let host = Self::with(&plan.id, dir.clone(), config, timings.clone()).await;
            timings
                .step("wait for agent", wait_for_agent(&host.pod.control, &dir))
                .await
                .map_err(error("reach the agent on the host"))?;
            timings
                .step("set up sandbox", set_up(&host, plan, network.as_ref()))
                .await
                .map_err(error("set up the sandbox on the host"))?;
            steps::done(Step::AgentReady);
            Ok(host)
        }
        .await;
        if result.is_err() {
            take_back(&plan.id, Self::recover(&plan.id, config)).await;
        }
        result
    }
}

/// Starts both processes.
async fn spawn(plan: &SandboxPlan, config: &HostConfig, dir: &PodDir) -> io::Result<()> {
    let arguments = arguments(plan, config, dir);
    let (config, dir) = (config.clone(), dir.clone());
    dir.create()?;
    let Scratch::Disk { bytes, usual } = plan.scratch else {
        return Err(io::Error::other(
            "a pod on the host has its writable layers on disk",
        ));
    };
    let template = usual.then(|| config.pod.data_dir.clone());
    scratch::create(template, dir.scratch(), bytes).await?;
    steps::done(Step::ScratchMade);
    let plan = plan.clone();
    tokio::task::spawn_blocking(move || {
        for path in [dir.agent(), dir.agent_root()] {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        let groups = cgroup::create(&dir, &config.pod, &plan.cgroup_parent)?;
        steps::done(Step::GroupsMade);
        let agent = start_agent(&config, &dir, &groups, arguments)?;
        steps::done(Step::AgentStarted);
        join(&plan, &config, &dir, &groups, agent)
    })
    .await?
}

/// The agent's command line.
fn arguments(plan: &SandboxPlan, config: &HostConfig, dir: &PodDir) -> Vec<OsString> {
    let unix = |path: std::path::PathBuf| {
        let mut text = OsString::from("unix:");
        text.push(path);
        text
    };
    let mut all: Vec<OsString> = vec![
        "--listen".into(),
        unix(dir.agent_socket()),
        "--stream-listen".into(),
        unix(dir.agent_streams()),
        "--host".into(),
        dir.agent_root().into(),
        "--scratch".into(),
        dir.scratch().into(),
        "--images".into(),
        config.layers.clone().into(),
    ];
    match &plan.port {
        Some(port) => all.extend(["--netns".into(), port.netns.clone().into()]),
        None if plan.host.network => {}
        None => all.push("--new-net".into()),
    }
    // Who shares the host's network shares its name.
    if !plan.host.network {
        all.push("--new-uts".into());
    }
    if !plan.host.ipc {
        all.push("--new-ipc".into());
    }
    all
}

/// Starts the agent in the group of what ends with the pod, in a session of its own: it outlives the daemon. Returns its
/// pidfd.
fn start_agent(
    config: &HostConfig,
    dir: &PodDir,
    groups: &Groups,
    arguments: Vec<OsString>,
) -> io::Result<OwnedFd> {
    let log = private(&dir.console(), true)?;
    let group = OpenOptions::new()
        .write(true)
        .open(groups.sandbox.join("cgroup.procs"))?;
    let mut command = Command::new(&config.agent);
    command
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: between fork and exec only async-signal-safe system calls are made, on a descriptor that the closure owns.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            // 0 stands for the process that writes.
            nix::unistd::write(&group, b"0")?;
            Ok(())
        });
    }
    let child = command
        .spawn()
        .map_err(|e| io::Error::other(format!("{} cannot be run: {e}", config.agent.display())))?;
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    process::reap(child)?;
    Ok(pidfd?)
}

/// Starts the pod process and hands it what it watches.
fn join(
    plan: &SandboxPlan,
    config: &HostConfig,
    dir: &PodDir,
    groups: &Groups,
    agent: OwnedFd,
) -> io::Result<()> {
    let directory = File::open(dir.agent())?;
    let kill = OpenOptions::new()
        .write(true)
        .open(groups.sandbox.join("cgroup.kill"))
        .map_err(|e| {
            io::Error::other(format!(
                "{}/cgroup.kill: {e}; pods on the host need a kernel of version 5.14 or newer",
                groups.sandbox.display()
            ))
        })?;
    let exit_file = private(&dir.exit(), false)?;
    let listener = listen(&dir.control())?;
    let mut fds = Fds::default();
    let request = JoinConfig {
        version: PROTOCOL_VERSION,
        id: plan.id.clone(),
        agent_directory: fds.push(&directory),
        agent: fds.push(&agent),
        cgroup_kill: fds.push(&kill),
        control_listener: Some(fds.push(&listener)),
        exit_file: Some(fds.push(&exit_file)),
        jail: Some(JailConfig {
            uid: plan.user,
            gid: plan.user,
        }),
    };
    let netns = plan.port.as_ref().map(|port| port.netns.as_path());
    let socket = process::start(&config.pod.vmm, dir, netns, |pid| {
        cgroup::join(&groups.process, pid)
    })?;
    match control::exchange(
        socket,
        &Request::Join(Box::new(request)),
        &fds.0,
        (),
        AGENT_TIMEOUT,
    ) {
        Ok(Reply::Done) => {
            steps::done(Step::ProcessAtWork);
            Ok(())
        }
        Ok(Reply::Error { message }) => Err(io::Error::other(message)),
        Ok(_) => Err(io::Error::other(control::ControlError::Confused)),
        Err(error) => Err(io::Error::other(format!(
            "{error}; caisson-vmm said: {}",
            dir.vmm_tail().trim()
        ))),
    }
}

async fn wait_for_agent(control: &Control, dir: &PodDir) -> io::Result<()> {
    if control.agent_ready(AGENT_TIMEOUT).await {
        return Ok(());
    }
    let console = dir.console_tail();
    let last = console.trim().lines().next_back().unwrap_or_default();
    Err(io::Error::other(if last.is_empty() {
        format!("it did not answer within {} s", AGENT_TIMEOUT.as_secs())
    } else {
        format!("it did not answer; it said: {last}")
    }))
}

async fn set_up(host: &Host, plan: &SandboxPlan, network: Option<&PodNetwork>) -> io::Result<()> {
    let request = proto::SetupSandboxRequest {
        hostname: plan.hostname.clone(),
        dns_servers: plan.dns.servers.clone(),
        dns_searches: plan.dns.searches.clone(),
        dns_options: plan.dns.options.clone(),
        // Configured already; for the hosts file.
        interfaces: agent::interfaces(network, ""),
        sysctls: plan.sysctls.iter().cloned().collect(),
        shared_pid_namespace: plan.shared_pid_namespace,
        user_namespace: agent::user_namespace(plan.ids.as_ref()),
        ..Default::default()
    };
    agent::set_up(host.agent(), request).await
}

/// A new file for root only.
fn private(path: &std::path::Path, append: bool) -> io::Result<File> {
    let _ = fs::remove_file(path);
    OpenOptions::new()
        .create_new(true)
        .append(append)
        .write(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::HostNamespaces;
    use crate::sandbox::pod::PodConfig;

    fn config() -> HostConfig {
        HostConfig {
            pod: PodConfig {
                vmm: "/x".into(),
                state_dir: "/s".into(),
                data_dir: "/d".into(),
                cgroup_parent: String::new(),
            },
            agent: "/x".into(),
            layers: "/d/layers".into(),
        }
    }

    #[test]
    fn the_agent_leaves_only_what_the_pod_does_not_share() {
        let words = |host: HostNamespaces| {
            let plan = SandboxPlan {
                id: "a1".repeat(32),
                host,
                ..SandboxPlan::default()
            };
            let dir = PodDir::new(&plan.id, &config().pod).unwrap();
            let all = arguments(&plan, &config(), &dir);
            let all: Vec<_> = all.iter().map(|word| word.to_string_lossy()).collect();
            all[10..].join(" ")
        };
        let none = HostNamespaces::default();
        assert_eq!(words(none), "--new-net --new-uts --new-ipc");
        let network = HostNamespaces {
            network: true,
            ..none
        };
        assert_eq!(words(network), "--new-ipc");
        let all = HostNamespaces {
            network: true,
            ipc: true,
        };
        assert_eq!(words(all), "");
    }
}
