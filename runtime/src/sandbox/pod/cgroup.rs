//! The host cgroup of a pod, under the parent that the kubelet names, so that the pod's memory and CPU are accounted
//! where the kubelet looks. A microVM's has the pod process in it. That of a pod on the host is a small tree:
//!
//! * `process/`: the pod process;
//! * `sandbox/`: all that ends with the pod: `agent/`, and the containers' groups, which the agent makes.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::PodConfig;
use super::dir::PodDir;

const ROOT: &str = "/sys/fs/cgroup";
/// The group of the pod process of a pod on the host.
const PROCESS: &str = "process";
/// The group of what ends with a pod on the host.
const SANDBOX: &str = "sandbox";
/// Controllers without which a pod on the host has no limits and no figures.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// Controllers that its containers can use where the host has them.
const WANTED: [&str; 3] = ["cpuset", "io", "hugetlb"];
/// What a pod process may have in the host's page cache, in bytes, and a part of its machine's memory for page tables.
const CACHE_BYTES: u64 = 256 << 20;
const TABLES: u64 = 64;
/// What the pod process of a pod on the host may have: logs on their way, and what of them is in the page cache.
const WATCHER_BYTES: u64 = 256 << 20;
/// The most threads of a pod process; it limits itself to as many, too.
const MAX_THREADS: u32 = 1024;
/// CPUs that devices may keep busy beside those of the machine.
const DEVICE_CPUS: u64 = 2;
/// Microseconds over which CPU time is counted.
const PERIOD: u64 = 100_000;

/// What a microVM needs.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Memory of the machine and of its process.
    pub bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
}

impl Needs {
    /// The limits that a pod process gets which has gone astray, whatever its pod was promised: file and content.
    fn limits(self) -> [(&'static str, String); 3] {
        let bytes = self.bytes + self.bytes / TABLES + CACHE_BYTES;
        let cpu = (u64::from(self.vcpus) + DEVICE_CPUS) * PERIOD;
        [
            ("memory.max", bytes.to_string()),
            ("pids.max", MAX_THREADS.to_string()),
            ("cpu.max", format!("{cpu} {PERIOD}")),
        ]
    }
}

/// Makes the cgroup of a microVM with these needs, limits it to them, and moves the pod process there; what it was in before, if
/// its machine was started before its pod was known, is removed. On a host without cgroup v2 the process stays where the
/// daemon is.
///
/// A parent whose limit has no room for the machine is not used: the kernel would end the whole pod as soon as its guest
/// fills its page cache. The kubelet sets such a limit where the pod's runtime class names no overhead.
// must-test: the VMM killed by its own memory limit, because overhead was not accounted for
pub fn place(
    dir: &PodDir,
    config: &PodConfig,
    parent: &str,
    pid: u32,
    needs: Needs,
) -> io::Result<()> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        tracing::debug!("no cgroup v2 on this host: the pod process stays in the daemon's cgroup");
        return Ok(());
    }
    let limit = memory_limit(&resolve(parent)?);
    let parent = match limit.filter(|limit| *limit < needs.bytes) {
        Some(limit) => {
            tracing::warn!(
                pod = dir.name(),
                "the cgroup {parent} is limited to {limit} bytes and the pod's machine needs {}: the pod is \
                 accounted for in {}; name the overhead in the pod's RuntimeClass",
                needs.bytes,
                config.cgroup_parent
            );
            ""
        }
        None => parent,
    };
    // Noted until it is gone, as is the new one.
    let before = fs::read_to_string(dir.cgroup()).ok();
    if let Some(before) = &before {
        fs::write(dir.cgroup_before(), before)?;
    }
    let path = note(dir, config, parent)?;
    fs::create_dir_all(&path).map_err(|e| about(&path, &e))?;
    // Groups above that have processes cannot have limits below; then those above must do.
    let limited = path.parent().map_or(Ok(()), |above| enable(above, &[]));
    if let Err(error) = limited.and_then(|()| set_limits(&path, &needs.limits())) {
        tracing::debug!(pod = dir.name(), %error, "the pod process has no limits of its own");
    }
    join(&path, pid).map_err(|e| about(&path, &e))?;
    let Some(before) = before.map(PathBuf::from) else {
        return Ok(());
    };
    if before != path {
        remove_tree(&before).map_err(|e| about(&before, &e))?;
    }
    fs::remove_file(dir.cgroup_before())
}

/// Writes a group's limits.
fn set_limits(group: &Path, limits: &[(&str, String)]) -> io::Result<()> {
    limits.iter().try_for_each(|(file, limit)| {
        fs::write(group.join(file), limit).map_err(|e| about(&group.join(file), &e))
    })
}

/// The limit in force for a group: the lowest of its own and those above.
fn memory_limit(group: &Path) -> Option<u64> {
    group
        .ancestors()
        .take_while(|path| path.starts_with(ROOT))
        .filter_map(|path| fs::read_to_string(path.join("memory.max")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

/// The groups of a pod on the host.
#[derive(Clone, Debug)]
pub struct Groups {
    /// For the pod process.
    pub process: PathBuf,
    /// For the agent, which makes those of the containers below.
    pub sandbox: PathBuf,
}

/// Makes the groups of a pod on the host, with the controllers of the host enabled on the way to them.
///
/// # Errors
/// The host has no cgroup v2 with all that a pod needs.
pub fn create(dir: &PodDir, config: &PodConfig, parent: &str) -> io::Result<Groups> {
    let available =
        fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    let has = |controller: &&str| available.split_whitespace().any(|one| one == *controller);
    if let Some(missing) = NEEDED.iter().find(|one| !has(one)) {
        return Err(io::Error::other(format!(
            "this host has no cgroup v2 with the controller {missing} at {ROOT}, which pods on the host need; boot it with systemd.unified_cgroup_hierarchy=1"
        )));
    }
    let path = note(dir, config, parent)?;
    let groups = Groups {
        process: path.join(PROCESS),
        sandbox: path.join(SANDBOX),
    };
    for group in [&groups.process, &groups.sandbox] {
        fs::create_dir_all(group).map_err(|e| about(group, &e))?;
    }
    let wanted: Vec<_> = WANTED.into_iter().filter(|one| has(one)).collect();
    enable(&path, &wanted)?;
    let limits = [
        ("memory.max", WATCHER_BYTES.to_string()),
        ("pids.max", MAX_THREADS.to_string()),
    ];
    set_limits(&groups.process, &limits)?;
    Ok(groups)
}

/// Lets the groups below this one have the needed controllers, and as far as possible the wanted ones.
fn enable(group: &Path, wanted: &[&str]) -> io::Result<()> {
    let above: Vec<_> = group
        .ancestors()
        .take_while(|p| p.starts_with(ROOT))
        .collect();
    for group in above.into_iter().rev() {
        let file = group.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).map_err(|e| about(group, &e))?;
        let missing = |one: &&&str| !enabled.split_whitespace().any(|has| has == **one);
        for controller in NEEDED.iter().filter(missing) {
            fs::write(&file, format!("+{controller}")).map_err(|e| about(group, &e))?;
        }
        for controller in wanted.iter().filter(missing) {
            let _ = fs::write(&file, format!("+{controller}"));
        }
    }
    Ok(())
}

/// Moves a process to a group.
pub fn join(group: &Path, pid: u32) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), pid.to_string())
}

/// Kills what runs of a pod on the host. Idempotent; nothing happens to a microVM's.
pub fn kill(dir: &PodDir) -> io::Result<()> {
    let Ok(path) = fs::read_to_string(dir.cgroup()) else {
        return Ok(());
    };
    let file = Path::new(&path).join(SANDBOX).join("cgroup.kill");
    match fs::OpenOptions::new().write(true).open(&file) {
        Ok(mut file) => io::Write::write_all(&mut file, b"1"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(about(&file, &e)),
    }
}

/// Whether the kernel has killed the pod process for want of memory.
pub fn ran_out_of_memory(dir: &PodDir) -> bool {
    let Ok(path) = fs::read_to_string(dir.cgroup()) else {
        return false;
    };
    // A pod on the host has its containers in groups beside that of its pod process.
    let group = Path::new(&path);
    let events = fs::read_to_string(group.join(PROCESS).join("memory.events"))
        .or_else(|_| fs::read_to_string(group.join("memory.events")))
        .unwrap_or_default();
    let mut kills = events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "));
    kills.any(|count| count != "0")
}

/// Kills what is left in the pod's cgroup and removes it, if it has one. Idempotent.
pub async fn remove(dir: &PodDir) -> io::Result<()> {
    for noted in [dir.cgroup_before(), dir.cgroup()] {
        if let Ok(path) = fs::read_to_string(noted) {
            remove_group(dir, &path).await?;
        }
    }
    Ok(())
}

async fn remove_group(dir: &PodDir, path: &str) -> io::Result<()> {
    for _ in 0..250 {
        // Again each time: a process may have been on its way into a group.
        kill(dir)?;
        match remove_tree(Path::new(path)) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Its last process is still on its way out.
            Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other(format!("cgroup {path} is still in use")))
}

/// Removes a group with those below it, all without processes.
fn remove_tree(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match remove_tree(&entry.path()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    fs::remove_dir(group)
}

/// The path of the pod's cgroup, noted before it is made: what is noted is removed with the pod.
fn note(dir: &PodDir, config: &PodConfig, parent: &str) -> io::Result<PathBuf> {
    let parent = if parent.is_empty() {
        &config.cgroup_parent
    } else {
        parent
    };
    let path = resolve(parent)?.join(format!("caisson-{}", dir.name()));
    fs::write(dir.cgroup(), path.as_os_str().as_encoded_bytes())?;
    Ok(path)
}

fn about(group: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("cgroup {}: {error}", group.display()))
}

/// The directory of a cgroup as the kubelet names it: a path, or a systemd slice such as
/// `kubepods-besteffort.slice`, which stands for `kubepods.slice/kubepods-besteffort.slice`.
fn resolve(parent: &str) -> io::Result<PathBuf> {
    let mut path = PathBuf::from(ROOT);
    let relative = Path::new(parent.trim_start_matches('/'));
    let slice = parent
        .strip_suffix(".slice")
        .filter(|s| !s.contains('/') && !s.is_empty());
    if let Some(slice) = slice {
        let mut prefix = String::new();
        for part in slice.split('-') {
            if !prefix.is_empty() {
                prefix.push('-');
            }
            prefix.push_str(part);
            path.push(format!("{prefix}.slice"));
        }
        return Ok(path);
    }
    for component in relative.components() {
        match component {
            Component::Normal(part) => path.push(part),
            _ => {
                return Err(io::Error::other(format!(
                    "cgroup_parent {parent:?} is not a plain path"
                )));
            }
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_paths_or_slices() {
        let is = |parent: &str, path: &str| {
            assert_eq!(resolve(parent).unwrap(), Path::new(ROOT).join(path));
        };
        is("/kubepods/besteffort/pod1", "kubepods/besteffort/pod1");
        is(
            "kubepods-besteffort.slice",
            "kubepods.slice/kubepods-besteffort.slice",
        );
        is("", "");
        assert!(resolve("/a/../../b").is_err());
    }

    // must-test: the VMM killed by its own memory limit, because overhead was not accounted for
    #[test]
    fn a_pods_own_limits_leave_room_for_all_that_it_needs() {
        let needs = Needs {
            bytes: 544 << 20,
            vcpus: 2,
        };
        let [memory, threads, cpu] = needs.limits();
        let bytes: u64 = memory.1.parse().unwrap();
        assert!(bytes >= needs.bytes + CACHE_BYTES, "{bytes}");
        assert_eq!(threads, ("pids.max", "1024".into()));
        assert_eq!(cpu, ("cpu.max", "400000 100000".into()));
    }
}
