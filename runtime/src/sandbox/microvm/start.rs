//! The start of a microVM pod, from an empty directory to an agent that takes containers.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_proto::agent as proto;
use caisson_vmm_protocol::{
    DiskConfig, ExitReason, GrowthConfig, JailConfig, NetConfig, PROTOCOL_VERSION, PlacedLayer,
    Reply, Request, ShareConfig, TemplateConfig, VmConfig, VsockConfig,
};

use super::share::{GUEST_PATH, Share};
use super::template::{Shape, Template};
use super::vhost;
use super::{LAYERS_SERIAL, MicroVm, MicroVmConfig, PROCESS_MIB};
use crate::network::{Coming, PodNetwork};
use crate::sandbox::pod::control::{self, Control};
use crate::sandbox::pod::dir::{PodDir, listen};
use crate::sandbox::pod::{Fds, cgroup, process, scratch};
use crate::sandbox::{Sandbox, SandboxError, SandboxPlan, Scratch, agent, take_back};
use crate::steps::{self, Step};
use crate::timings::Timings;

/// The tag of the virtio-fs share.
const SHARE_TAG: &str = "caisson";
/// The serial of the scratch disk.
const SCRATCH_SERIAL: &str = "caisson-scratch";
/// The guest's vsock context ID: each machine has a vsock of its own, so all have the same.
const GUEST_CID: u32 = 3;
/// The most console output that is kept, in bytes.
const CONSOLE_LIMIT: u64 = 1 << 20;
/// The MAC of a network device until the agent gives it the pod's, before it is up: the pod's is not known when the
/// machine starts.
const MAC: &str = "02:00:00:00:00:01";
/// The MTU of a network device until the agent gives it the pod's: the most that one can have.
const MTU: u16 = u16::MAX;
/// How much entropy a guest is given at its start, in bytes.
const ENTROPY: usize = 64;
/// Says that a kernel brings one CPU up by itself, whichever there may be.
const ONE_CPU: &str = "maxcpus=1";
/// The kernel command line: serial console, no time spent on probing what a guest does not have, and a panic
/// ends the machine. What fails before there is a console is told all the same.
const CMDLINE: &str = "console=ttyS0 earlyprintk=ttyS0,115200 quiet panic=-1 reboot=t \
                       tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests pci=off";

/// Where a pod's machine comes from.
enum Origin<'a> {
    /// It was started before the pod was known.
    Ahead(Box<MicroVm>),
    /// It is a clone of this template.
    Clone(&'a Template),
    /// It boots its kernel.
    Boot,
}

impl MicroVm {
    /// Makes the pod's directory, share and disk, starts its pod process, boots the guest and lets the agent
    /// set up the sandbox. The steps depend on each other in this order: the machine is built from descriptors of
    /// what the first ones made, and the agent answers only in a running guest. The network comes meanwhile: the agent
    /// alone needs to know it.
    ///
    /// If a step fails everything is taken back, the network excepted, which is the caller's. A guest that
    /// resets itself before its agent has answered has done nothing yet, so it is booted once more, and the log says so.
    /// Where there is a template of its shape, or one that grows, the pod is a clone of that; or it gets the machine that was started `ahead`.
    ///
    /// # Errors
    /// [`SandboxError::Start`] with the step that failed and why; [`SandboxError::Reset`] for a guest that resets
    /// itself each time.
    pub async fn start(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        network: Coming,
        timings: Timings,
        ahead: Option<Self>,
    ) -> Result<Self, SandboxError> {
        let shape = Shape::of(plan);
        let templates = config.templates.as_ref();
        let once = async |origin: Origin| {
            let (network, timings) = (network.clone(), timings.clone());
            Self::start_once(plan, config, network, timings, origin).await
        };
        if let Some(vm) = ahead {
            match once(Origin::Ahead(Box::new(vm))).await {
                Err(error) if !matches!(error, SandboxError::Network(_)) => {
                    tracing::warn!(%error, "the machine that was ready is of no use; another one is started");
                }
                ended => return ended,
            }
        }
        if let Some((templates, template)) =
            templates.and_then(|templates| Some((templates, templates.find(&shape, config)?)))
        {
            match once(Origin::Clone(&template)).await {
                Err(error @ SandboxError::Network(_)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "the pod could not be a clone; it boots its kernel");
                    templates.discard(&template);
                }
                started => return started,
            }
        }
        match once(Origin::Boot).await {
            Err(error @ SandboxError::Reset { .. }) => {
                tracing::warn!(%error, "booting the guest once more");
                once(Origin::Boot).await
            }
            other => other,
        }
    }

    async fn start_once(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        network: Coming,
        timings: Timings,
        origin: Origin<'_>,
    ) -> Result<Self, SandboxError> {
        let growth = match &origin {
            Origin::Clone(template) => template.growth(),
            Origin::Ahead(_) | Origin::Boot => None,
        };
        let result = async {
            let machine = async {
                match origin {
                    Origin::Ahead(vm) => vm.take(plan, config, &timings).await,
                    Origin::Clone(template) => {
                        Self::start_machine(plan, config, &timings, Some(template)).await
                    }
                    Origin::Boot => Self::start_machine(plan, config, &timings, None).await,
                }
            };
            let (machine, network) = tokio::join!(machine, network);
            let vm = machine?;
            let network = network.map_err(SandboxError::Network)?;
            timings
                .step(
                    "set up sandbox in guest",
                    set_up(&vm, plan, network.as_ref(), growth),
                )
                .await
                .map_err(SandboxError::at(
                    &plan.id,
                    "set up the sandbox in the guest",
                ))?;
            steps::done(Step::AgentReady);
            Ok(vm)
        }
        .await;
        if result.is_err() {
            take_back(&plan.id, Self::recover(&plan.id, config)).await;
        }
        result
    }

    /// Starts a clone for a pod that is not known yet: of its plan there are the ID, the machine's size, the port and the
    /// user. What a failure leaves is the caller's to take back.
    ///
    /// # Errors
    /// [`SandboxError::Start`].
    pub async fn start_ahead(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        template: &Template,
    ) -> Result<Self, SandboxError> {
        Self::start_machine(plan, config, &Timings::begin(), Some(template)).await
    }

    /// Makes a machine that was started ahead this pod's.
    async fn take(
        self,
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        timings: &Timings,
    ) -> Result<Self, SandboxError> {
        let moved = async {
            if let Some(reason) = self.pod.ended().borrow().as_ref() {
                return Err(io::Error::other(control::sentence(reason)));
            }
            let pid = self.pod.pid();
            let pid = pid.ok_or_else(|| io::Error::other("its process is gone"))?;
            let (dir, config) = (self.pod.dir.clone(), config.pod.clone());
            let (parent, needs) = (
                plan.cgroup_parent.clone(),
                needs(plan.memory_mib, plan.vcpus),
            );
            tokio::task::spawn_blocking(move || cgroup::place(&dir, &config, &parent, pid, needs))
                .await?
        };
        timings
            .step("take ready machine", moved)
            .await
            .map_err(SandboxError::at(
                &plan.id,
                "take the machine that was ready",
            ))?;
        Ok(Self {
            timings: timings.clone(),
            ..self
        })
    }

    /// A machine whose agent answers.
    async fn start_machine(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        timings: &Timings,
        template: Option<&Template>,
    ) -> Result<Self, SandboxError> {
        let error = |step| SandboxError::at(&plan.id, step);
        let dir = PodDir::new(&plan.id, &config.pod)?;
        let share = Share::new(&plan.id, &dir);
        let parts = timings
            .step(
                "prepare share and disk",
                prepare(plan, config, &dir, &share),
            )
            .await
            .map_err(error("prepare the share and disk"))?;
        let boot_began = timings.elapsed();
        timings
            .step("start caisson-vmm", async {
                let mut fds = Fds::default();
                let vhost = match plan.port {
                    Some(_) => vhost::open(config.vhost_net, config.net_rate)?,
                    None => None,
                };
                let template = template.map(|template| template.lend(&mut fds));
                let machine = machine(plan, parts, template, vhost.as_ref(), &mut fds);
                let lent = (plan.port.clone(), vhost);
                boot(machine, config, &dir, fds, lent).await
            })
            .await
            .map_err(error("boot the virtual machine"))?;
        let vm = Self::with(&plan.id, dir.clone(), timings.clone()).await;
        let step = match template {
            Some(_) => "resume guest",
            None => "boot guest",
        };
        timings
            .step(
                step,
                wait_for_agent(&vm.pod.control, &dir, config.start_timeout),
            )
            .await
            .map_err(|cause| match cause.kind() {
                io::ErrorKind::ConnectionReset => SandboxError::Reset {
                    id: plan.id.clone(),
                    cause: cause.to_string(),
                },
                _ => error("boot the guest")(cause),
            })?;
        vm.note_spans(boot_began).await;
        Ok(vm)
    }

    /// Adds the pod process's own steps to the pod's.
    pub(super) async fn note_spans(&self, began: Duration) {
        let Ok(status) = self.pod.control.status().await else {
            return;
        };
        for span in status.timings.iter().take(64) {
            let name: String = span.step.chars().take(64).collect();
            self.timings.note(
                &format!("vmm: {name}"),
                began + Duration::from_micros(span.start_us),
                Duration::from_micros(span.duration_us),
            );
        }
    }
}

/// What the machine is built from.
pub struct Parts {
    /// The root of its share.
    pub share_root: OwnedFd,
    /// Its scratch disk.
    pub scratch: Option<File>,
}

async fn prepare(
    plan: &SandboxPlan,
    config: &MicroVmConfig,
    dir: &PodDir,
    share: &Share,
) -> io::Result<Parts> {
    dir.create()?;
    let share_root = share.create()?;
    steps::done(Step::ShareMade);
    let scratch = match plan.scratch {
        Scratch::Memory { .. } => None,
        Scratch::Disk { bytes, usual } => {
            let template = usual.then(|| config.pod.data_dir.clone());
            scratch::create(template, dir.scratch(), bytes).await?;
            Some(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(dir.scratch())?,
            )
        }
    };
    steps::done(Step::ScratchMade);
    Ok(Parts {
        share_root,
        scratch,
    })
}

/// A machine that is one pod's, or that becomes a template.
pub struct Machine {
    /// Its name.
    pub id: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The host user and group of its process.
    pub user: u32,
    /// Its network device.
    pub nets: Vec<NetConfig>,
    /// What it has to do with a template, or with a machine that was saved.
    pub template: Option<TemplateConfig>,
    /// The layers that are on its disk of layers from the start.
    pub placed_layers: Vec<PlacedLayer>,
    /// The network namespace of its process; `None`: an empty one.
    pub netns: Option<PathBuf>,
    /// The cgroup above its own; empty: the daemon's default.
    pub cgroup_parent: String,
    /// The root of its share.
    pub share_root: OwnedFd,
    /// Its scratch disk.
    pub scratch: Option<File>,
}

/// The machine of a pod; a clone of the template, or what was saved, if there is one.
pub fn machine(
    plan: &SandboxPlan,
    parts: Parts,
    template: Option<TemplateConfig>,
    vhost: Option<&OwnedFd>,
    fds: &mut Fds,
) -> Machine {
    let taps = plan.port.iter().filter_map(|port| port.tap.as_ref());
    let growth = template.as_ref().and_then(|template| template.growth);
    Machine {
        id: plan.id.clone(),
        vcpus: plan.vcpus,
        memory_mib: growth.map_or(plan.memory_mib, |it| it.rounded(plan.memory_mib)),
        user: plan.user,
        nets: taps.map(|tap| net(tap.as_ref(), vhost, fds)).collect(),
        template,
        placed_layers: Vec::new(),
        netns: plan.port.as_ref().map(|port| port.netns.clone()),
        cgroup_parent: plan.cgroup_parent.clone(),
        share_root: parts.share_root,
        scratch: parts.scratch,
    }
}

/// The words that a guest's kernel is started with.
pub fn command_line(config: &MicroVmConfig) -> String {
    format!("{CMDLINE} {}", config.cmdline_extra)
}

/// Starts the pod process, hands it all it needs and lets it run the machine. `fds` has what the machine names already;
/// `lent` owns some of it.
pub async fn boot(
    machine: Machine,
    config: &MicroVmConfig,
    dir: &PodDir,
    mut fds: Fds,
    lent: impl Send + 'static,
) -> io::Result<()> {
    let kvm = open_named(
        Path::new("/dev/kvm"),
        OpenOptions::new().read(true).write(true),
        "; this node cannot run microVMs: see `caisson doctor`",
    )?;
    let kernel = open_named(&config.kernel, OpenOptions::new().read(true), "")?;
    let initramfs = open_named(&config.initramfs, OpenOptions::new().read(true), "")?;
    let console = private(&dir.console(), true)?;
    let exit_file = private(&dir.exit(), false)?;
    let control_listener = listen(&dir.control())?;
    let vsock_listener = listen(&dir.vsock())?;

    let Machine {
        share_root,
        scratch,
        netns,
        cgroup_parent: parent,
        ..
    } = machine;
    let vm = VmConfig {
        version: PROTOCOL_VERSION,
        id: machine.id,
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        kvm: fds.push(&kvm),
        kernel: fds.push(&kernel),
        initramfs: Some(fds.push(&initramfs)),
        cmdline: match machine.template.as_ref().and_then(|it| it.growth) {
            Some(_) => format!("{} {ONE_CPU}", command_line(config)),
            None => command_line(config),
        },
        console: fds.push(&console),
        console_limit: CONSOLE_LIMIT,
        control_listener: Some(fds.push(&control_listener)),
        exit_file: Some(fds.push(&exit_file)),
        disks: scratch
            .iter()
            .map(|file| DiskConfig {
                serial: SCRATCH_SERIAL.into(),
                file: fds.push(file),
                read_only: false,
            })
            .collect(),
        layers: Some(LAYERS_SERIAL.into()),
        placed_layers: machine.placed_layers,
        nets: machine.nets,
        disk_rate: config.disk_rate,
        net_rate: config.net_rate,
        share: Some(ShareConfig {
            tag: SHARE_TAG.into(),
            root: fds.push(&share_root),
        }),
        vsock: Some(VsockConfig {
            cid: GUEST_CID,
            listener: Some(fds.push(&vsock_listener)),
        }),
        jail: Some(JailConfig {
            uid: machine.user,
            gid: machine.user,
        }),
        template: machine.template,
    };
    let needs = needs(vm.memory_mib, vm.vcpus);
    let limit = config.start_timeout;
    let (config, dir) = (config.pod.clone(), dir.clone());
    let reply = tokio::task::spawn_blocking(move || {
        let socket = process::start(&config.vmm, &dir, netns.as_deref(), |pid| {
            cgroup::place(&dir, &config, &parent, pid, needs)
        })?;
        let reply = control::exchange(socket, &Request::Boot(Box::new(vm)), &fds.0, (), limit);
        // The descriptors are lent until the pod process has its own.
        drop((
            kvm, kernel, initramfs, console, exit_file, share_root, scratch,
        ));
        drop((control_listener, vsock_listener, lent));
        reply.map_err(|e| died(&dir, &e))
    })
    .await??;
    match reply {
        Reply::Done => {
            steps::done(Step::ProcessAtWork);
            Ok(())
        }
        Reply::Error { message } => Err(io::Error::other(message)),
        _ => Err(io::Error::other(control::ControlError::Confused)),
    }
}

/// What the host gives for a machine.
fn needs(memory_mib: u32, vcpus: u8) -> cgroup::Needs {
    cgroup::Needs {
        bytes: (u64::from(memory_mib) + PROCESS_MIB) << 20,
        vcpus,
    }
}

/// A network device whose frames go through `tap`, carried by the node's kernel if there is `vhost`.
pub fn net(tap: &impl AsRawFd, vhost: Option<&OwnedFd>, fds: &mut Fds) -> NetConfig {
    NetConfig {
        tap: fds.push(tap),
        vhost: fds.add(vhost),
        mac: MAC.to_owned(),
        mtu: MTU,
    }
}

/// A pod process that did not answer has often said why.
fn died(dir: &PodDir, error: &control::ControlError) -> io::Error {
    let said = dir.vmm_tail();
    let said = said.trim();
    if said.is_empty() {
        io::Error::other(error.to_string())
    } else {
        io::Error::other(format!("{error}; caisson-vmm said: {said}"))
    }
}

pub async fn wait_for_agent(control: &Control, dir: &PodDir, limit: Duration) -> io::Result<()> {
    if control.agent_ready(limit).await {
        return Ok(());
    }
    let (kind, why) = match control.ended().borrow().as_ref() {
        Some(reason @ ExitReason::Reset) => {
            (io::ErrorKind::ConnectionReset, control::sentence(reason))
        }
        Some(reason) => (io::ErrorKind::Other, control::sentence(reason)),
        None => (
            io::ErrorKind::TimedOut,
            format!("its agent did not answer within {} s", limit.as_secs()),
        ),
    };
    let last = dir.last_words();
    let said = if last.is_empty() {
        format!("{why}, and its console is empty")
    } else {
        format!("{why}; its console ends with: {last}")
    };
    Err(io::Error::new(kind, said))
}

async fn set_up(
    vm: &MicroVm,
    plan: &SandboxPlan,
    network: Option<&PodNetwork>,
    growth: Option<GrowthConfig>,
) -> io::Result<()> {
    let growth = growth.map(|growth| {
        let added = growth.rounded(plan.memory_mib) - growth.memory_mib;
        proto::Growth {
            vcpus: plan.vcpus.into(),
            added_bytes: u64::from(added) << 20,
        }
    });
    let request = proto::SetupSandboxRequest {
        growth,
        ..request(plan, network, MAC)?
    };
    agent::set_up(vm.agent(), request).await
}

/// What the agent is told of the pod. `current_mac` is what its network device has until then.
pub fn request(
    plan: &SandboxPlan,
    network: Option<&PodNetwork>,
    current_mac: &str,
) -> io::Result<proto::SetupSandboxRequest> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    let mut entropy = vec![0; ENTROPY];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut entropy);
    Ok(proto::SetupSandboxRequest {
        hostname: plan.hostname.clone(),
        dns_servers: plan.dns.servers.clone(),
        dns_searches: plan.dns.searches.clone(),
        dns_options: plan.dns.options.clone(),
        interfaces: agent::interfaces(network, current_mac),
        routes: routes(network),
        shared_mounts: shared_mounts(),
        scratch: Some(match plan.scratch {
            Scratch::Disk { .. } => proto::Scratch {
                disk_serial: SCRATCH_SERIAL.into(),
                tmpfs_size_bytes: 0,
            },
            Scratch::Memory { bytes } => proto::Scratch {
                disk_serial: String::new(),
                tmpfs_size_bytes: bytes,
            },
        }),
        sysctls: plan.sysctls.iter().cloned().collect(),
        unix_time_ns: i64::try_from(now.as_nanos()).map_err(io::Error::other)?,
        entropy,
        shared_pid_namespace: plan.shared_pid_namespace,
        user_namespace: agent::user_namespace(plan.ids.as_ref()),
        growth: None,
    })
}

/// What the host shares with a guest.
pub fn shared_mounts() -> Vec<proto::SharedMount> {
    vec![proto::SharedMount {
        tag: SHARE_TAG.into(),
        path: GUEST_PATH.into(),
        read_only: false,
    }]
}

/// The routes as the agent is told them.
fn routes(network: Option<&PodNetwork>) -> Vec<proto::Route> {
    let Some(network) = network else {
        return Vec::new();
    };
    network
        .routes
        .iter()
        .map(|route| proto::Route {
            destination: format!("{}/{}", route.destination.0, route.destination.1),
            gateway: route.gateway.map(|g| g.to_string()).unwrap_or_default(),
            device: network.interface.name.clone(),
            priority: route.priority,
            mtu: 0,
        })
        .collect()
}

fn open_named(path: &Path, options: &OpenOptions, hint: &str) -> io::Result<File> {
    options
        .open(path)
        .map_err(|e| io::Error::other(format!("{} cannot be opened ({e}){hint}", path.display())))
}

/// A new file for root only.
fn private(path: &Path, append: bool) -> io::Result<File> {
    let _ = fs::remove_file(path);
    OpenOptions::new()
        .create_new(true)
        .append(append)
        .write(true)
        .mode(0o600)
        .open(path)
}
