//! The messages themselves.

use serde::{Deserialize, Serialize};

/// The place of a descriptor in the list that came with the message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct FdIndex(pub u16);

/// What the daemon asks of a VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Build the machine and run it. Once per process; answered when the vCPUs run.
    Boot(Box<VmConfig>),
    /// In place of [`Request::Boot`], for a pod that runs on the host: watch its agent, which runs already, and write
    /// its containers' logs. Answered when that is under way.
    Join(Box<JoinConfig>),
    /// Say who you are and how you do.
    Status {
        /// The [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the asker.
        version: u32,
    },
    /// Stop the vCPUs and device workers at a point from which [`Request::Resume`] goes on.
    Pause,
    /// Go on after a pause.
    Resume,
    /// Ask the guest to power off. Answered at once; the end is an [`Event::Exited`].
    Shutdown,
    /// End the machine now.
    Kill,
    /// Connect to a container's output streams in the agent and write them to a log in the CRI format.
    AddLog(LogConfig),
    /// Go on in another log file, after a rotation. Answered when the next byte goes there.
    ReopenLog {
        /// The container whose log it is.
        container_id: String,
        /// The new file, open for appending.
        file: FdIndex,
    },
    /// Forget a container's log, once the container is removed. Output that cannot be written any more is
    /// dropped. An unknown container is no error.
    RemoveLog {
        /// The container.
        container_id: String,
    },
    /// Copy a container's output to more descriptors (pipes or sockets), from now on. A copy whose reader
    /// is gone is dropped; one whose reader is slow slows that stream alone.
    Attach {
        /// The container, which has a log.
        container_id: String,
        /// Where standard output (or the terminal's output) goes too.
        stdout: Option<FdIndex>,
        /// Where standard error goes too.
        stderr: Option<FdIndex>,
    },
    /// Put an image layer on the machine's disk of layers, at a place of its own. Answered with
    /// [`Reply::LayerPlace`]; a layer that is there already has the place it had.
    AddLayer {
        /// The layer's name; its content never changes.
        name: String,
        /// Its EROFS image: a regular file, open for reading.
        file: FdIndex,
    },
    /// From now on the end of a container's output stream is no end: the agent is about to let go of all streams
    /// (`Quiesce`), to have what it has read of them in the logs. Until [`Request::ReleaseLogs`].
    HoldLogs,
    /// Take up again the streams that have been let go of, or are at their end. Nothing happens to others.
    ReleaseLogs,
    /// Wait until all held streams are in their logs, stop the machine as [`Request::Pause`] does, and write it down.
    /// Answered with [`Reply::Saved`] when all is written; the machine then stays as it is until [`Request::Resume`].
    /// Where it fails, the machine goes on.
    Save {
        /// A socket or pipe. What goes there is described at [`Part`](crate::Part).
        to: FdIndex,
    },
    /// Turn this connection into a stream of [`Event`]s. Past facts that still hold (agent ready, exited,
    /// logs drained) come first, so that a watcher that comes late misses none.
    Watch,
}

/// The machine to build. Sizes and counts are checked by the VMM, whoever sends them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The sender's [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION).
    pub version: u32,
    /// A name for thread names and messages: the pod sandbox's ID.
    pub id: String,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, 64 to 1048576.
    pub memory_mib: u32,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// The guest kernel: a 64-bit ELF `vmlinux` or a `bzImage`.
    pub kernel: FdIndex,
    /// The initramfs.
    pub initramfs: Option<FdIndex>,
    /// The kernel command line. The VMM adds only what its own devices need.
    pub cmdline: String,
    /// Where the serial console's bytes go, open for appending. At most `console_limit` bytes are written.
    pub console: FdIndex,
    /// The most bytes of console output that are kept.
    pub console_limit: u64,
    /// A listening unix stream socket for later control connections.
    pub control_listener: Option<FdIndex>,
    /// A regular file, open for writing, that gets the [`ExitReason`] as JSON when the machine ends.
    pub exit_file: Option<FdIndex>,
    /// Block devices, in the order in which the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// The serial of a read-only disk, after the others, that has the layers of [`Request::AddLayer`]; none: no such
    /// disk.
    pub layers: Option<String>,
    /// Layers that are on that disk from the start, by ascending offsets: those of the machine that is restored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placed_layers: Vec<PlacedLayer>,
    /// Network devices.
    pub nets: Vec<NetConfig>,
    /// The most that each disk does, reading and writing together.
    #[serde(default)]
    pub disk_rate: RateLimit,
    /// The most that each network device does in each direction.
    #[serde(default)]
    pub net_rate: RateLimit,
    /// The virtio-fs share.
    pub share: Option<ShareConfig>,
    /// The vsock device.
    pub vsock: Option<VsockConfig>,
    /// The unprivileged identity that the process takes once everything is in hand.
    pub jail: Option<JailConfig>,
    /// What the machine has to do with a template; none: it boots, and is one by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateConfig>,
}

impl VmConfig {
    /// A machine with one vCPU, 256 MiB, this kernel and a console of at most 1 MiB, and nothing to go with it.
    pub fn bare(id: &str, kvm: FdIndex, kernel: FdIndex, console: FdIndex) -> Self {
        Self {
            version: crate::PROTOCOL_VERSION,
            id: id.to_owned(),
            vcpus: 1,
            memory_mib: 256,
            kvm,
            kernel,
            initramfs: None,
            cmdline: String::new(),
            console,
            console_limit: 1 << 20,
            control_listener: None,
            exit_file: None,
            disks: Vec::new(),
            layers: None,
            placed_layers: Vec::new(),
            nets: Vec::new(),
            disk_rate: RateLimit::default(),
            net_rate: RateLimit::default(),
            share: None,
            vsock: None,
            jail: None,
            template: None,
        }
    }
}

/// A layer with its place on the disk of layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedLayer {
    /// As in [`Request::AddLayer`].
    pub name: String,
    /// As in [`Request::AddLayer`].
    pub file: FdIndex,
    /// The first byte of its place.
    pub offset: u64,
}

/// A machine that is, or begins as, a template: one that was booted once, of which pods are clones. A clone has the
/// vCPUs, memory, devices, kernel and command line of its template, or more vCPUs and memory of one that grows. So has one that
/// is restored, of the machine that was saved ([`Request::Save`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateConfig {
    /// Which of both.
    pub role: TemplateRole,
    /// The file with the memory, on a file system in memory. Empty and open for writing where the template is to be
    /// made; open for reading where it is there.
    pub memory: FdIndex,
    /// The file with everything else, likewise.
    pub state: FdIndex,
    /// That it grows; none: a clone is as large as its template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthConfig>,
}

/// What a machine was when its kernel booted that can grow beyond it: the guest brings the other vCPUs into use when it is told
/// to, and takes the other memory by a memory device (virtio 1.2 §5.15).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrowthConfig {
    /// The vCPUs that it had, 1 to those that it has now.
    pub vcpus: u8,
    /// The memory that it had in MiB, 64 to 3072, and no more than it has now. The rest comes in whole
    /// blocks.
    pub memory_mib: u32,
    /// The most vCPUs that its kernel knows of, at least those that it has now.
    pub most_vcpus: u8,
}

impl GrowthConfig {
    /// Memory is added in blocks of so many MiB, the least that Linux takes at a time.
    pub const BLOCK_MIB: u32 = 4;
    /// The most that is added, in MiB: a guest is told so when it boots, and all processors can address as much.
    pub const MOST_MIB: u32 = 256 << 10;

    /// The memory of a machine that grows to hold so many MiB: what is added comes in whole blocks.
    pub fn rounded(&self, memory_mib: u32) -> u32 {
        let added = memory_mib.saturating_sub(self.memory_mib);
        let blocks = added.div_ceil(Self::BLOCK_MIB);
        self.memory_mib
            .saturating_add(blocks.saturating_mul(Self::BLOCK_MIB))
    }
}

/// Whether a template, or a saved machine, is made or used.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateRole {
    /// Boot, wait until the agent has told that it is settled, write both files, and end ([`ExitReason::PoweredOff`]).
    /// In place of taps there are sockets, which carry nothing.
    Make,
    /// Begin where the template ended. Kernel and initramfs are not read.
    Clone,
    /// Begin where the machine was saved. The memory's file is read, and not needed any more when that is done. The guest
    /// hears that its vsock connections are gone.
    Restore,
}

/// The most that a device does in a second. 0: as much as it can.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of data.
    pub bytes: u64,
    /// Requests or frames.
    pub operations: u64,
}

/// A virtio block device (virtio 1.2 §5.2) on a raw image. The format is never guessed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What `VIRTIO_BLK_T_GET_ID` answers; 1 to 20 ASCII bytes.
    pub serial: String,
    /// A regular file or block device; its size in whole 512-byte sectors is the disk's.
    pub file: FdIndex,
    /// Refuse writes, by feature bit and in the device.
    pub read_only: bool,
}

/// A virtio network device (virtio 1.2 §5.1) on a tap.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap's descriptor, attached, with `IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: FdIndex,
    /// `/dev/vhost-net`, open for reading and writing, where the host's kernel is to carry the frames; it keeps to no
    /// [`RateLimit`], so there must be none. Not in a machine that becomes a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<FdIndex>,
    /// The guest's MAC address, "aa:bb:cc:dd:ee:ff".
    pub mac: String,
    /// The MTU that the guest is told (`VIRTIO_NET_F_MTU`), 68 to 65535.
    pub mtu: u16,
}

/// A virtio-fs device (virtio 1.2 §5.11).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag by which the guest mounts it; 1 to 36 bytes.
    pub tag: String,
    /// The directory that is the share's root. The process pivots into it: it sees nothing else.
    /// What the daemon shows later it mounts below it in the process's mount namespace.
    pub root: FdIndex,
}

/// A virtio vsock device (virtio 1.2 §5.10).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, 3 or more.
    pub cid: u32,
    /// A listening unix stream socket. A client that connects sends `CONNECT <port>\n` and gets
    /// `OK <host port>\n`, as with Firecracker, then talks to that port of the guest.
    pub listener: Option<FdIndex>,
}

/// A pod of the host to join: its agent is a process beside this one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinConfig {
    /// The sender's [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION).
    pub version: u32,
    /// A name for messages: the pod sandbox's ID.
    pub id: String,
    /// The directory in which the agent has its stream socket, [`STREAM_SOCKET`]. The process pivots into it.
    pub agent_directory: FdIndex,
    /// A pidfd of the agent: the pod ends with it.
    pub agent: FdIndex,
    /// The `cgroup.kill` file, open for writing, of the cgroup with the agent and all containers. "1" goes there when
    /// the pod ends, however it does.
    pub cgroup_kill: FdIndex,
    /// As in [`VmConfig`].
    pub control_listener: Option<FdIndex>,
    /// As in [`VmConfig`].
    pub exit_file: Option<FdIndex>,
    /// As in [`VmConfig`].
    pub jail: Option<JailConfig>,
}

/// The identity the process gives itself after it holds everything it needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// The host user ID to run as; not 0.
    pub uid: u32,
    /// The host group ID to run as; not 0.
    pub gid: u32,
}

/// A container's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// The container, already created in the agent.
    pub container_id: String,
    /// One terminal stream instead of standard output and standard error.
    pub terminal: bool,
    /// The log file, open for appending; without one the output is read and only goes to attached clients.
    pub file: Option<FdIndex>,
    /// Attach these before the first byte is read, as [`Request::Attach`] does.
    pub stdout: Option<FdIndex>,
    /// As `stdout`, for standard error.
    pub stderr: Option<FdIndex>,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// The answer to [`Request::Status`].
    Status(VmStatus),
    /// The answer to [`Request::AddLayer`]: where on the disk of layers it is.
    LayerPlace {
        /// The first byte.
        offset: u64,
        /// The number of bytes, a multiple of 512.
        bytes: u64,
    },
    /// The answer to [`Request::Save`].
    Saved(SavedMachine),
    /// Not done, and why, in one sentence.
    Error {
        /// The sentence.
        message: String,
    },
}

/// What one has to know of a saved machine besides what it wrote.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SavedMachine {
    /// Its virtual CPUs.
    pub vcpus: u8,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// What it has grown from, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthConfig>,
    /// Its layers, by ascending offsets.
    pub layers: Vec<LayerPlace>,
}

/// Where a layer is on the disk of layers.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPlace {
    /// Its name.
    pub name: String,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes, a multiple of 512.
    pub bytes: u64,
}

/// How a VMM does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStatus {
    /// The VMM's [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION).
    pub version: u32,
    /// The VMM's build version.
    pub build: String,
    /// Its process ID in its own PID namespace.
    pub pid: u32,
    /// What the machine is doing.
    pub state: VmState,
    /// Whether the agent has said that it listens.
    pub agent_ready: bool,
    /// Between [`Request::HoldLogs`] and [`Request::ReleaseLogs`].
    #[serde(default)]
    pub logs_held: bool,
    /// The version of Landlock that confines it, which the kernel tells nobody else; 0: none.
    #[serde(default)]
    pub landlock: u32,
    /// Spans of the start, microseconds since the process began.
    pub timings: Vec<Span>,
}

/// A step of the start and when it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Span {
    /// The step's name.
    pub step: String,
    /// Microseconds since the process began.
    pub start_us: u64,
    /// Its length in microseconds.
    pub duration_us: u64,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// No [`Request::Boot`] yet.
    New,
    /// The vCPUs run.
    Running,
    /// Paused.
    Paused,
    /// Ended; the process is about to.
    Exited,
}

/// Why a machine ended.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason", content = "detail")]
pub enum ExitReason {
    /// The guest powered itself off, or the agent of a pod of the host ended as it was asked to.
    PoweredOff,
    /// The guest asked for a reset, which ends a pod's machine.
    Reset,
    /// The guest kernel panicked (pvpanic).
    Panicked,
    /// [`Request::Kill`] or a termination signal.
    Killed,
    /// The guest broke a device's rules so that the machine could not go on; which and how.
    GuestError(String),
    /// The VMM itself failed; how.
    InternalError(String),
}

/// What a watcher hears.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The agent listens: the guest connected to host vsock port [`READY_PORT`], or a host pod's agent took a
    /// connection.
    AgentReady,
    /// All output of this container is in its log, to the last byte.
    LogDrained {
        /// The container.
        container_id: String,
    },
    /// A container's log could not be written; output of that container is held back until there is room,
    /// [`Request::ReopenLog`], or removal.
    LogFailed {
        /// The container.
        container_id: String,
        /// What failed, in one sentence.
        message: String,
    },
    /// A log that could not be written is written again: there is room, or another file.
    LogRecovered {
        /// The container.
        container_id: String,
    },
    /// The machine ended. The last event.
    Exited(ExitReason),
}

/// Guest port on which the agent serves gRPC.
pub const AGENT_PORT: u32 = 1024;
/// Guest port on which the agent serves raw standard streams; see `agent.proto` for its header line.
pub const STREAM_PORT: u32 = 1025;
/// Host port (CID 2) to which the agent connects once, to say that it listens. The connection is refused;
/// its arrival is the message. No connection from the guest is accepted.
pub const READY_PORT: u32 = 1026;
/// Host port to which the agent connects once, likewise, to say that the guest is settled: nothing of its start is under
/// way any more.
pub const SETTLED_PORT: u32 = 1027;
/// The unix socket of a host pod's agent in place of [`AGENT_PORT`]; a name in the agent's directory.
pub const AGENT_SOCKET: &str = "agent.sock";
/// The unix socket of a host pod's agent in place of [`STREAM_PORT`].
pub const STREAM_SOCKET: &str = "streams.sock";
