//! PID 1's first steps: from the kernel's hand-over in the initramfs to a system that containers can run on.
//!
//! Each millisecond here is one of every pod's start, so that nothing is done twice or in case.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};
use thiserror::Error;

use crate::log::{self, Level, Timing};
use crate::sandbox::growth;
use crate::{loopback, paths, warn};

/// Why the guest could not be brought up.
#[derive(Debug, Error)]
#[error("{step}: {error}")]
pub struct BootError {
    step: String,
    error: io::Error,
}

pub(crate) fn step<T, E: Into<io::Error>>(
    result: Result<T, E>,
    step: impl FnOnce() -> String,
) -> Result<T, BootError> {
    result.map_err(|error| BootError {
        step: step(),
        error: error.into(),
    })
}

/// The root directory moves to this bind mount of itself.
const NEW_ROOT: &str = "/.root";

/// Files per process: the kernel's own limit for what PID 1 starts would be 4096.
const FILES_MAX: u64 = 1 << 20;

/// Everybody may ping, in a network namespace that this was set in.
pub(crate) const PING_GROUPS: (&str, &str) = ("net/ipv4/ping_group_range", "0 2147483647");

/// Kernel parameters that differ from the kernel's defaults. One that is not there is no error: the kernel
/// decides what it has.
const SYSCTLS: [(&str, &str); 8] = [
    // PIDs are not used again soon.
    ("kernel/pid_max", "4194304"),
    // As on any Kubernetes node: an allocation fails by the cgroup's limit and not by a guess.
    ("vm/overcommit_memory", "1"),
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "8192"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    // Each wakes a guest that does nothing, twice and once a second: that is time of the node's. Memory is compacted when a large
    // block is asked for, and the numbers in /proc/vmstat are up to 10 seconds old.
    ("vm/compaction_proactiveness", "0"),
    ("vm/stat_interval", "10"),
];

/// The smallest block of free memory that the kernel reports to the host, which then takes it back, and its size: 2 to the
/// power of this in pages, 64 KiB. By itself the kernel reports blocks of 2 MiB, and none where fewer than 32 of them are free,
/// which is half of a small guest. What is free in larger blocks is reported in these all the same, so that little comes
/// piecemeal; reports are made 2 seconds after memory was freed, 32 blocks at a time.
/// (Linux 6.1 takes it while it runs, not from its command line: the balloon's driver overwrites that.)
const REPORTED: (&str, &str) = (
    "/sys/module/page_reporting/parameters/page_reporting_order",
    "4",
);

/// Brings the guest up as far as the agent itself needs it: files, devices and cgroups are there.
/// [`settle`] does the rest.
///
/// # Errors
/// The first step that failed. There is nothing to fall back to.
pub fn boot() -> Result<(), BootError> {
    let mut timing = Timing::start();
    movable_root()?;
    timing.lap("root");
    for directory in ["/dev", "/proc", "/sys", "/run", "/tmp"] {
        make_directory(directory)?;
    }
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    attach("proc", "/proc", hardened, None)?;
    set_log_level();
    attach("sysfs", "/sys", hardened, None)?;
    attach("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755"))?;
    attach("tmpfs", "/run", strict, Some("mode=0755"))?;
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue", "/tmp", paths::BASE] {
        make_directory(directory)?;
    }
    attach(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("ptmxmode=0666,mode=0620,gid=5"),
    )?;
    attach("tmpfs", "/dev/shm", strict, Some("mode=1777"))?;
    attach("mqueue", "/dev/mqueue", hardened, None)?;
    attach(
        "cgroup2",
        paths::CGROUP,
        hardened,
        Some("nsdelegate,memory_recursiveprot"),
    )?;
    timing.lap("mounts");
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        match symlink(target, Path::new("/dev").join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return step(Err(error), || format!("link /dev/{name}"));
            }
            _ => {}
        }
    }
    timing.lap("links");
    timing.tell("boot");
    Ok(())
}

/// What containers need but serving does not: it waits for the kernel's grace periods most of the time, and runs
/// while the host connects.
///
/// # Errors
/// The first step that failed. No container can run then.
pub fn settle() -> Result<(), BootError> {
    let mut timing = Timing::start();
    growth::remember();
    enable_controllers()?;
    timing.lap("controllers");
    for (name, value) in SYSCTLS.into_iter().chain([PING_GROUPS]) {
        let _ = fs::write(Path::new("/proc/sys").join(name), value);
    }
    // Where the kernel does not report, there is nothing to say.
    let _ = fs::write(REPORTED.0, REPORTED.1);
    step(
        setrlimit(Resource::RLIMIT_NOFILE, FILES_MAX, FILES_MAX),
        || format!("set the limit of open files to {FILES_MAX}"),
    )?;
    timing.lap("parameters");
    step(loopback::up(), || "bring lo up".into())?;
    timing.lap("lo");
    timing.tell("settle");
    Ok(())
}

/// Makes the root a mount that `pivot_root` can replace: the initial one, where the kernel unpacks the
/// initramfs, cannot be (pivot_root(2)). A bind mount of it on top of itself can, and costs no copy.
fn movable_root() -> Result<(), BootError> {
    make_directory(NEW_ROOT)?;
    step(
        mount(
            Some("/"),
            NEW_ROOT,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        ),
        || format!("bind / on {NEW_ROOT}"),
    )?;
    step(chdir(NEW_ROOT), || format!("enter {NEW_ROOT}"))?;
    step(
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>),
        || "move the new root to /".into(),
    )?;
    step(chroot("."), || "change the root".into())?;
    step(chdir("/"), || "enter the root".into())
}

fn make_directory(path: &str) -> Result<(), BootError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            step(Err(error), || format!("create directory {path}"))
        }
        _ => Ok(()),
    }
}

fn attach(kind: &str, path: &str, flags: MsFlags, options: Option<&str>) -> Result<(), BootError> {
    step(mount(Some(kind), path, Some(kind), flags, options), || {
        format!("mount {kind} on {path}")
    })
}

/// Reads `caisson.log=` from the kernel's command line. The kernel's own messages are kept to warnings, unless
/// somebody is looking for something.
fn set_log_level() {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let value = line
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("caisson.log="));
    if let Some(value) = value {
        match Level::parse(value) {
            Some(level) => log::set_level(level),
            None => warn!("caisson.log={value} is not error, warn, info or debug"),
        }
    }
    if value != Some("debug") {
        // syslog(2): SYSLOG_ACTION_CONSOLE_LEVEL
        // SAFETY: this action takes a level in place of a length and no buffer.
        unsafe { libc::klogctl(8, std::ptr::null_mut(), 5) };
    }
}

/// Gives every controller to the root's children, so that containers' cgroups can have limits.
///
/// # Errors
/// If the cgroup file system does not take it.
pub fn enable_controllers() -> Result<(), BootError> {
    let root = Path::new(paths::CGROUP);
    let list = step(fs::read_to_string(root.join("cgroup.controllers")), || {
        "read cgroup.controllers".into()
    })?;
    let wanted: Vec<String> = list
        .split_ascii_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let control = root.join("cgroup.subtree_control");
    step(fs::write(&control, wanted.join(" ")), || {
        format!("enable {} in {}", wanted.join(" "), control.display())
    })
}
