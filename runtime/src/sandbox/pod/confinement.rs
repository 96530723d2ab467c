//! How a pod process is confined, as the kernel says it of the living process: what `caisson inspect` and `caisson doctor
//! --pod` show.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat;
use serde::{Deserialize, Serialize};

use crate::sandbox::microvm::vhost;

/// Namespaces, by their names in /proc.
pub const NAMESPACES: [&str; 6] = ["ipc", "mnt", "net", "pid", "user", "uts"];
/// Limits of setrlimit(2) that are shown, by their names in /proc.
const LIMITS: [&str; 5] = [
    "Max core file size",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max msgqueue size",
];
/// The group's files that are shown.
const GROUP_FILES: [&str; 3] = ["memory.max", "pids.max", "cpu.max"];

/// A pod process, from outside.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Confinement {
    /// Its process ID on the host.
    pub pid: u32,
    /// Whether its root directory is another than the daemon's.
    pub own_root: bool,
    /// Namespaces: whether it has others than the daemon.
    pub own_namespaces: BTreeMap<String, bool>,
    /// Its threads.
    pub threads: Vec<Thread>,
    /// The version of Landlock that confines it, by its own word, which is the only one; 0: none. Missing if it did not
    /// answer.
    pub landlock: Option<u32>,
    /// Whether the node's kernel carries its frames: it has a descriptor of vhost-net.
    #[serde(default)]
    pub vhost_net: bool,
    /// Limits of setrlimit(2).
    pub limits: BTreeMap<String, String>,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// That group's limits; those that the host does not have are missing.
    pub cgroup_limits: BTreeMap<String, String>,
}

/// A thread of it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Thread {
    /// Its name, by which its kind is known.
    pub name: String,
    /// The user on the host: real, effective, saved.
    pub users: [u32; 3],
    /// The group on the host: real, effective, saved.
    pub groups: [u32; 3],
    /// All capabilities that it has or could have, as a mask. They hold in its own user namespace.
    pub capabilities: u64,
    /// Whether it can get no more privileges by a program.
    pub no_new_privs: bool,
    /// The mode of seccomp(2); 2: filters.
    pub seccomp: u8,
    /// How many filters.
    pub seccomp_filters: u32,
}

impl Confinement {
    /// Looks at a process. What the process itself says is left open.
    ///
    /// # Errors
    /// It has ended, or this is not root.
    pub fn read(pid: u32) -> io::Result<Self> {
        let proc = Path::new("/proc").join(pid.to_string());
        let place = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
        let namespace = |proc: &Path, name| fs::read_link(proc.join("ns").join(name));
        let own_namespaces = NAMESPACES
            .iter()
            .map(|name| {
                let other = namespace(&proc, name)? != namespace(Path::new("/proc/self"), name)?;
                Ok(((*name).to_owned(), other))
            })
            .collect::<io::Result<_>>()?;
        let mut threads = Vec::new();
        for entry in fs::read_dir(proc.join("task"))? {
            // A thread may end meanwhile.
            if let Ok(status) = fs::read_to_string(entry?.path().join("status")) {
                threads.push(Thread::parse(&status).ok_or_else(|| {
                    io::Error::other(format!("/proc/{pid}/task has a status of an unknown form"))
                })?);
            }
        }
        let limits = fs::read_to_string(proc.join("limits"))?;
        let cgroup = fs::read_to_string(proc.join("cgroup"))?;
        let group = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
        let cgroup = Path::new("/sys/fs/cgroup").join(group.unwrap_or_default());
        let cgroup_limits = GROUP_FILES
            .iter()
            .filter_map(|file| {
                let limit = fs::read_to_string(cgroup.join(file)).ok()?;
                Some(((*file).to_owned(), limit.trim().to_owned()))
            })
            .collect();
        Ok(Self {
            pid,
            own_root: place(&proc.join("root"))? != place(Path::new("/"))?,
            own_namespaces,
            threads,
            landlock: None,
            vhost_net: has_device(&proc, vhost::NUMBER)?,
            limits: parse_limits(&limits),
            cgroup,
            cgroup_limits,
        })
    }
}

/// Whether a process has this character device open.
fn has_device(proc: &Path, (major, minor): (u64, u64)) -> io::Result<bool> {
    for entry in fs::read_dir(proc.join("fd"))? {
        // A descriptor may be closed meanwhile.
        let Ok(meta) = fs::metadata(entry?.path()) else {
            continue;
        };
        let device = meta.rdev();
        if meta.file_type().is_char_device()
            && (stat::major(device), stat::minor(device)) == (major, minor)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Thread {
    /// Takes what is wanted from `/proc/PID/task/TID/status` (proc(5)).
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let of_name = |line: &'_ str| -> Option<String> {
                Some(line.strip_prefix(name)?.strip_prefix(":\t")?.to_owned())
            };
            status.lines().find_map(of_name)
        };
        let ids = |name| -> Option<[u32; 3]> {
            let ids: Vec<_> = field(name)?
                .split_whitespace()
                .take(3)
                .filter_map(|id| id.parse().ok())
                .collect();
            ids.try_into().ok()
        };
        let mask = |name| u64::from_str_radix(&field(name)?, 16).ok();
        let masks = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
        Some(Self {
            name: field("Name")?,
            users: ids("Uid")?,
            groups: ids("Gid")?,
            capabilities: masks
                .into_iter()
                .try_fold(0, |all, name| Some(all | mask(name)?))?,
            no_new_privs: field("NoNewPrivs")? == "1",
            seccomp: field("Seccomp")?.parse().ok()?,
            // From Linux 5.9 on.
            seccomp_filters: field("Seccomp_filters")
                .and_then(|n| n.parse().ok())
                .unwrap_or_default(),
        })
    }
}

/// The soft limits of `/proc/PID/limits`, whose columns have fixed places.
fn parse_limits(limits: &str) -> BTreeMap<String, String> {
    LIMITS
        .iter()
        .filter_map(|name| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
            let soft = line.split_whitespace().next()?;
            Some(((*name).to_owned(), soft.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_not_confined() {
        let found = Confinement::read(std::process::id()).unwrap();
        assert!(!found.own_root);
        assert_eq!(found.own_namespaces.len(), NAMESPACES.len());
        assert!(found.own_namespaces.values().all(|own| !own));
        assert!(!found.threads.is_empty());
        assert_eq!(found.limits.len(), LIMITS.len(), "{:?}", found.limits);
        let user = nix::unistd::getuid().as_raw();
        assert!(found.threads.iter().all(|t| t.users == [user; 3]));
        assert!(Confinement::read(u32::MAX).is_err());
        assert!(!found.vhost_net);
        let itself = Path::new("/proc/self");
        assert!(!has_device(itself, (1, 7)).unwrap());
        let _full = fs::File::open("/dev/full").unwrap();
        assert!(has_device(itself, (1, 7)).unwrap());
    }

    #[test]
    fn a_status_is_taken_apart() {
        let status = "Name:\tvcpu0\nUid:\t7\t8\t9\t10\nGid:\t1\t1\t1\t1\nCapInh:\t0000000000000000\n\
                      CapPrm:\t00000000000000c0\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000001\n\
                      CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";
        let thread = Thread::parse(status).unwrap();
        assert_eq!((thread.users, thread.capabilities), ([7, 8, 9], 0xc1));
        assert!(thread.no_new_privs);
        assert_eq!((thread.seccomp, thread.seccomp_filters), (2, 2));
        assert!(Thread::parse("Name:\tx\n").is_none());
    }
}
