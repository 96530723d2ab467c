//! What pods leave on a machine: processes, network devices and namespaces, mounts, cgroups, loop devices.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// All that could be left, at one moment, a line each.
#[derive(Clone, Debug, Default)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// What there is now.
    pub fn now() -> Self {
        let mut traces = BTreeSet::new();
        traces.extend(processes());
        traces.extend(mounts().into_iter().map(|m| format!("mount {m}")));
        traces.extend(network());
        traces.extend(names("/run/netns", "netns"));
        traces.extend(cgroups(Path::new("/sys/fs/cgroup")));
        traces.extend(loop_devices());
        Self(traces)
    }

    /// What is there that was not before, but for the daemon's own mount: templates are for the next daemon, too.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let new = self.0.difference(&before.0);
        let of_daemon = |trace: &str| trace.starts_with("mount ") && trace.ends_with("/templates");
        new.filter(|trace| !of_daemon(trace)).cloned().collect()
    }

    /// Mount points below a path.
    pub fn mounts_below(&self, path: &Path) -> Vec<String> {
        let prefix = format!("mount {}", path.display());
        self.0
            .iter()
            .filter(|t| t.starts_with(&prefix))
            .filter_map(|t| t.strip_prefix("mount "))
            .map(str::to_owned)
            .collect()
    }

    /// Kills pod processes that were not there before.
    pub fn kill_new_processes(&self, before: &Self) {
        for trace in self.since(before) {
            let pid = trace
                .strip_prefix("process ")
                .and_then(|t| t.split(' ').next())
                .and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// Pod processes. The daemon's own and the tests' are no trace of a pod.
fn processes() -> Vec<String> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let zombie = stat.rsplit_once(") ")?.1.starts_with('Z');
            let ours = name.starts_with("caisson-vmm") || name.starts_with("caisson-agent");
            (ours && !zombie).then(|| format!("process {pid} {}", name.trim()))
        })
        .collect()
}

fn mounts() -> Vec<String> {
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect()
}

fn network() -> Vec<String> {
    let output = Command::new("ip").args(["-brief", "link"]).output();
    let text = output.map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| line.split([' ', '@']).next())
        .map(|name| format!("device {name}"))
        .collect()
}

fn names(dir: &str, kind: &str) -> Vec<String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(format!("{kind} {}", e.ok()?.file_name().to_string_lossy())))
        .collect()
}

/// Loop devices with a file, by its name.
fn loop_devices() -> Vec<String> {
    fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let file = fs::read_to_string(path.join("loop/backing_file")).ok()?;
            Some(format!("loop device of {}", file.trim()))
        })
        .collect()
}

fn cgroups(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            let path = entry.path();
            // The parent that all pods share stays.
            if entry.file_name().to_string_lossy().starts_with("caisson-") {
                found.push(format!("cgroup {}", path.display()));
            }
            found.extend(cgroups(&path));
        }
    }
    found
}
