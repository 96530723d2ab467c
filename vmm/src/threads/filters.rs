//! Which system calls each kind of thread may make. What is not listed ends the process.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// What a thread does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Starts the others. Its filter is the sum of all, since they inherit it, and what making a thread needs.
    Starter,
    /// Waits for the end and tells it.
    Main,
    /// Runs a vCPU and emulates the registers that it touches.
    Vcpu,
    /// Serves a disk.
    Block,
    /// Serves a network device.
    Net,
    /// Serves the entropy device.
    Rng,
    /// Serves the balloon device.
    Balloon,
    /// Serves the memory device.
    Mem,
    /// Carries streams between the guest and the host.
    Vsock,
    /// Serves the share.
    Fs,
    /// Writes the serial console's output.
    Console,
    /// Copies a container's output to its log.
    Log,
    /// Answers the daemon, or asks the agent.
    Control,
    /// Writes down a machine that is parked.
    Save,
    /// Waits for a signal or for the end of another process.
    Watch,
}

/// Every kind but the starter, whose filter is made of theirs.
pub const KINDS: [Kind; 14] = [
    Kind::Main,
    Kind::Vcpu,
    Kind::Block,
    Kind::Net,
    Kind::Rng,
    Kind::Balloon,
    Kind::Mem,
    Kind::Vsock,
    Kind::Fs,
    Kind::Console,
    Kind::Log,
    Kind::Control,
    Kind::Save,
    Kind::Watch,
];

/// Memory, locks, the clock, and how a thread or the process ends. `mmap` and `mprotect` are apart: see [`rules`].
const ALL: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];
/// A device's event loop.
const EVENTS: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
];
/// A new thread, before its own filter is there.
const STARTER: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
];
/// The exit file, and the ends of streams.
const MAIN: &[c_long] = &[libc::SYS_ftruncate, libc::SYS_recvfrom, libc::SYS_shutdown];
/// It puts a device's event loop together when the guest activates the device.
const VCPU: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
];
const BLOCK: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
];
const NET: &[c_long] = &[libc::SYS_readv];
/// When it stops, it gives the last bytes to those who still read.
const VSOCK: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_timerfd_settime,
];
/// A file server's, and those by which it acts as the guest's users.
const FS: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getuid,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];
const LOG: &[c_long] = &[
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_poll,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
];
const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_statx,
];
const WATCH: &[c_long] = &[
    libc::SYS_connect,
    libc::SYS_poll,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_setsockopt,
];

/// Commands of `fcntl(2)`: flags and copies of a descriptor. No locks, no signals, no leases.
const FCNTL: [libc::c_int; 5] = [
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
];
/// Requests of `ioctl(2)`, by number (KVM API; tun; `FIONBIO`, by which the standard library makes a socket non-blocking).
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const FIONBIO: u64 = 0x5421;
/// What tells all of a machine, and changes nothing but that a vCPU finishes its last access.
const KVM_SAVE: [u64; 12] = [
    KVM_RUN,
    KVM_GET_REGS,
    0x8004_ae98, // a vCPU's state,
    0x8138_ae83, // special registers,
    0x9000_aea4, // extended state
    0x8188_aea6, // and what turns it on,
    0x8080_aea1, // debug registers,
    0x8400_ae8e, // local APIC,
    0xc008_ae88, // model-specific registers
    0x8040_ae9f, // and pending events;
    0xc208_ae62, // the interrupt controllers
    0x8030_ae7c, // and the clock
];
/// Those of vhost-net: what hands rings to the kernel and takes them back. It cannot be made to log, to share a device with
/// another process, or to translate addresses.
const VHOST: [u64; 10] = [
    0x4008_af00, // features
    0x0000_af01, // owner
    0x4008_af03, // memory
    0x4008_af10, // a ring's size,
    0x4028_af11, // place,
    0x4008_af12, // index
    0x4008_af20, // and events
    0x4008_af21,
    0x4008_af22,
    0x4008_af30, // tap
];

impl Kind {
    /// The calls that it may make with any arguments.
    fn calls(self) -> Vec<c_long> {
        let lists: &[&[c_long]] = match self {
            Self::Starter => {
                let own = ALL.iter().chain(STARTER).copied();
                return own
                    .chain(KINDS.iter().flat_map(|kind| kind.calls()))
                    .collect();
            }
            Self::Main => &[ALL, MAIN],
            Self::Vcpu => &[ALL, VCPU],
            Self::Block => &[ALL, EVENTS, BLOCK],
            Self::Net => &[ALL, EVENTS, NET],
            Self::Rng | Self::Balloon | Self::Mem => &[ALL, EVENTS],
            Self::Vsock => &[ALL, EVENTS, VSOCK],
            Self::Fs => &[ALL, EVENTS, FS],
            Self::Console | Self::Save => &[ALL],
            Self::Log => &[ALL, LOG],
            Self::Control => &[ALL, CONTROL],
            Self::Watch => &[ALL, WATCH],
        };
        lists.concat()
    }

    /// The requests that it may make of `ioctl(2)`.
    fn ioctls(self) -> Vec<u64> {
        match self {
            Self::Starter => KINDS.iter().flat_map(|kind| kind.ioctls()).collect(),
            Self::Vcpu => vec![KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, TUNSETOFFLOAD],
            Self::Net => VHOST.to_vec(),
            Self::Save => KVM_SAVE.to_vec(),
            Self::Vsock | Self::Control | Self::Log => vec![FIONBIO],
            _ => Vec::new(),
        }
    }

    /// Whether it may make sockets, which are unix sockets then.
    fn sockets(self) -> bool {
        matches!(self, Self::Starter | Self::Control | Self::Watch)
    }
}

/// The rules of a kind: a call without a rule of its own is allowed whatever its arguments are.
fn rules(kind: Kind) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, seccompiler::BackendError> {
    let argument = |index, operation, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut rules: BTreeMap<_, Vec<_>> = kind
        .calls()
        .into_iter()
        .map(|call| (call, Vec::new()))
        .collect();
    // What a guest wrote must never become code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = libc::PROT_EXEC as u64;
        rules.insert(
            call,
            vec![argument(2, SeccompCmpOp::MaskedEq(executable), 0)?],
        );
    }
    // What a guest gives back is thrown away; nothing else is done to its memory.
    if matches!(kind, Kind::Balloon | Kind::Mem) {
        let throw_away = argument(2, SeccompCmpOp::Eq, libc::MADV_DONTNEED as u64)?;
        rules.insert(libc::SYS_madvise, vec![throw_away]);
    }
    let commands: Result<Vec<_>, _> = FCNTL
        .into_iter()
        .map(|command| argument(1, SeccompCmpOp::Eq, command as u64))
        .collect();
    rules.insert(libc::SYS_fcntl, commands?);
    let ioctls: Result<Vec<_>, _> = kind
        .ioctls()
        .into_iter()
        .map(|request| argument(1, SeccompCmpOp::Eq, request))
        .collect();
    let ioctls = ioctls?;
    // An empty list of rules would allow all.
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, ioctls);
    }
    if kind.sockets() {
        let unix = argument(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
        rules.insert(libc::SYS_socket, vec![unix]);
    }
    Ok(rules)
}

/// The filter of a kind.
pub fn program(kind: Kind) -> Result<BpfProgram, seccompiler::Error> {
    let filter = SeccompFilter::new(
        rules(kind)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// Installs the filter of a kind in this thread.
pub fn install(kind: Kind) -> Result<(), seccompiler::Error> {
    apply_filter(&program(kind)?)
}

/// The numbers of the calls that a kind may make in some form.
#[cfg(test)]
pub fn allowed(kind: Kind) -> Vec<c_long> {
    rules(kind).unwrap().into_keys().collect()
}
