//! What a container uses.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Cgroup;
use crate::engine::error::EngineError;

/// How long the writable layer is walked; a container can make more files than can be counted in a request.
const WALK_TIME: Duration = Duration::from_millis(500);

/// Resource use of a container.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// When, Unix time in nanoseconds of the guest.
    pub timestamp_ns: u64,
    /// Processor time.
    pub cpu_usage_ns: u64,
    /// Processor time in user mode.
    pub cpu_user_ns: u64,
    /// Processor time in the kernel.
    pub cpu_system_ns: u64,
    /// Memory, page cache included.
    pub memory_usage_bytes: u64,
    /// Memory limit; 0: none.
    pub memory_limit_bytes: u64,
    /// Memory less inactive file pages.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory.
    pub memory_rss_bytes: u64,
    /// Page faults.
    pub memory_page_faults: u64,
    /// Page faults that had to read.
    pub memory_major_page_faults: u64,
    /// Swap.
    pub swap_usage_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes of the writable layer.
    pub rootfs_used_bytes: u64,
    /// Files of the writable layer.
    pub rootfs_used_inodes: u64,
    /// Processes ended for lack of memory.
    pub oom_kills: u64,
    /// Pressure on processors, memory and I/O; `None` where the kernel does not measure it.
    pub pressure: [Option<Pressure>; 3],
}

/// Pressure stall information (Documentation/accounting/psi.rst of the kernel).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// While some task waited.
    pub some: PressureLine,
    /// While all tasks waited.
    pub full: PressureLine,
}

/// One line of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PressureLine {
    /// Microseconds since the group was made.
    pub total_us: u64,
    /// Percent of the last 10, 60 and 300 seconds.
    pub averages: [f64; 3],
}

impl Pressure {
    fn parse(text: &str) -> Option<Self> {
        let line = |name: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            let word = |key: &str| rest.split(' ').find_map(|word| word.strip_prefix(key));
            Some(PressureLine {
                total_us: word("total=")?.parse().ok()?,
                averages: [
                    word("avg10=")?.parse().ok()?,
                    word("avg60=")?.parse().ok()?,
                    word("avg300=")?.parse().ok()?,
                ],
            })
        };
        Some(Self {
            some: line("some ")?,
            full: line("full ").unwrap_or_default(),
        })
    }
}

/// The value of a key in a flat keyed file.
pub(super) fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

impl Cgroup {
    /// A file with one number; `max` and a missing controller are 0.
    pub(super) fn number(&self, file: &str) -> Result<u64, EngineError> {
        match self.read(file) {
            Ok(text) => Ok(text.trim().parse().unwrap_or(0)),
            Err(error) if error.is_not_found() => Ok(0),
            Err(error) => Err(error),
        }
    }

    pub(super) fn text(&self, file: &str) -> Result<String, EngineError> {
        match self.read(file) {
            Err(error) if error.is_not_found() => Ok(String::new()),
            other => other,
        }
    }

    /// Processes that the kernel ended for lack of memory, in this group and below.
    pub fn oom_kills(&self) -> Result<u64, EngineError> {
        Ok(keyed(&self.text("memory.events")?, "oom_kill"))
    }

    /// Reads the group's use and walks the writable layer at `upper`.
    pub fn stats(&self, upper: &Path) -> Result<Stats, EngineError> {
        let cpu = self.text("cpu.stat")?;
        let memory = self.text("memory.stat")?;
        let micros = |key| keyed(&cpu, key).saturating_mul(1000);
        let usage = self.number("memory.current")?;
        let (bytes, inodes) = walk(upper);
        Ok(Stats {
            timestamp_ns: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64),
            cpu_usage_ns: micros("usage_usec"),
            cpu_user_ns: micros("user_usec"),
            cpu_system_ns: micros("system_usec"),
            memory_usage_bytes: usage,
            memory_limit_bytes: self.number("memory.max")?,
            memory_working_set_bytes: usage.saturating_sub(keyed(&memory, "inactive_file")),
            memory_rss_bytes: keyed(&memory, "anon"),
            memory_page_faults: keyed(&memory, "pgfault"),
            memory_major_page_faults: keyed(&memory, "pgmajfault"),
            swap_usage_bytes: self.number("memory.swap.current")?,
            pids: self.number("pids.current")?,
            rootfs_used_bytes: bytes,
            rootfs_used_inodes: inodes,
            oom_kills: self.oom_kills()?,
            // A kernel without it has the files all the same, and refuses to read them.
            pressure: ["cpu.pressure", "memory.pressure", "io.pressure"]
                .map(|file| Pressure::parse(&self.read(file).ok()?)),
        })
    }
}

/// Bytes and files below a directory, as far as the time allows. Never follows a link or leaves the file system.
fn walk(root: &Path) -> (u64, u64) {
    let end = Instant::now() + WALK_TIME;
    let (mut bytes, mut inodes) = (0u64, 0u64);
    let Ok(device) = fs::symlink_metadata(root).map(|root| root.dev()) else {
        return (0, 0);
    };
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.filter_map(Result::ok) {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
            inodes += 1;
            if metadata.is_dir() && metadata.dev() == device {
                open.push(entry.path());
            }
            if Instant::now() > end {
                return (bytes, inodes);
            }
        }
    }
    (bytes, inodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_values() {
        let text = "usage_usec 12\nuser_usec 7\nodd\noom_kill x\n";
        assert_eq!(keyed(text, "usage_usec"), 12);
        assert_eq!(keyed(text, "user_usec"), 7);
        assert_eq!(keyed(text, "oom_kill"), 0);
        assert_eq!(keyed(text, "missing"), 0);
    }

    #[test]
    fn pressure() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.25 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = Pressure::parse(text).unwrap();
        assert_eq!(pressure.some.averages, [1.5, 0.0, 0.25]);
        assert_eq!((pressure.some.total_us, pressure.full.total_us), (99, 7));
        assert_eq!(Pressure::parse("some avg10=x"), None);
        assert_eq!(Pressure::parse(""), None);
    }

    #[test]
    fn the_walk_counts_and_does_not_follow_links() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("a")).unwrap();
        fs::write(directory.path().join("a/file"), vec![7; 10_000]).unwrap();
        std::os::unix::fs::symlink("/usr", directory.path().join("link")).unwrap();
        let (bytes, inodes) = walk(directory.path());
        assert_eq!(inodes, 3);
        assert!((10_000..1 << 20).contains(&bytes), "{bytes}");
    }
}
