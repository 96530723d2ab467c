//! What monitoring asks beyond [`Stats`](super::Stats): it costs a walk over the container's processes.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::stats::keyed;
use super::{Cgroup, read_bounded};
use crate::engine::error::EngineError;

/// Most processes that are looked at; a container can have more than can be counted in a request.
const MAX_PROCESSES: usize = 4096;
/// Most devices and page sizes that are told.
const MAX_ENTRIES: usize = 64;

/// More about a container's use. Times in nanoseconds, sizes in bytes; a missing controller gives 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Detail {
    /// Enforcement periods of the CPU quota.
    pub cpu_periods: u64,
    /// Periods in which the quota was used up.
    pub cpu_throttled_periods: u64,
    /// Time during which the container was throttled.
    pub cpu_throttled_ns: u64,
    /// Page cache.
    pub memory_cache: u64,
    /// Memory of the kernel.
    pub memory_kernel: u64,
    /// Mapped files.
    pub memory_mapped: u64,
    /// The most memory ever in use.
    pub memory_peak: u64,
    /// How often the limit was hit.
    pub memory_limit_hits: u64,
    /// Processes.
    pub processes: u64,
    /// Threads.
    pub threads: u64,
    /// Limit of threads; 0: none.
    pub threads_max: u64,
    /// Open file descriptors.
    pub file_descriptors: u64,
    /// Those of them that are sockets.
    pub sockets: u64,
    /// The soft limit of open files of the first process.
    pub open_files_soft_limit: u64,
    /// Size of the file system of the writable layers.
    pub fs_total: u64,
    /// Its inodes.
    pub fs_inodes: u64,
    /// Its free inodes.
    pub fs_free_inodes: u64,
    /// I/O of each block device.
    pub devices: Vec<DeviceIo>,
    /// Huge pages of each size.
    pub huge_pages: Vec<HugePages>,
}

/// I/O on a block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Device numbers.
    pub device: (u32, u32),
    /// Bytes read and written.
    pub bytes: (u64, u64),
    /// Requests read and written.
    pub requests: (u64, u64),
}

/// Huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugePages {
    /// Such as `2MB`.
    pub size: String,
    /// Bytes in use.
    pub used: u64,
    /// How often the limit was hit.
    pub limit_hits: u64,
}

impl Cgroup {
    /// Reads the detail of a group whose first process is `pid` and whose writable layer is at `upper`.
    ///
    /// # Errors
    /// If the group cannot be read.
    pub fn detail(&self, pid: i32, upper: &Path) -> Result<Detail, EngineError> {
        let cpu = self.text("cpu.stat")?;
        let memory = self.text("memory.stat")?;
        let pids = self.processes()?;
        let (mut descriptors, mut sockets, mut threads) = (0, 0, 0);
        for pid in pids.iter().take(MAX_PROCESSES) {
            let (all, of_them) = open_files(*pid);
            descriptors += all;
            sockets += of_them;
            threads += entries(&format!("/proc/{pid}/task"));
        }
        let fs = statvfs(upper).ok();
        let limits = read_bounded(Path::new(&format!("/proc/{pid}/limits"))).unwrap_or_default();
        Ok(Detail {
            cpu_periods: keyed(&cpu, "nr_periods"),
            cpu_throttled_periods: keyed(&cpu, "nr_throttled"),
            cpu_throttled_ns: keyed(&cpu, "throttled_usec").saturating_mul(1000),
            memory_cache: keyed(&memory, "file"),
            memory_kernel: keyed(&memory, "kernel"),
            memory_mapped: keyed(&memory, "file_mapped"),
            memory_peak: self.number("memory.peak")?,
            memory_limit_hits: keyed(&self.text("memory.events")?, "max"),
            processes: pids.len() as u64,
            threads,
            threads_max: self.number("pids.max")?,
            file_descriptors: descriptors,
            sockets,
            open_files_soft_limit: open_files_limit(&limits),
            fs_total: fs.map_or(0, |fs| fs.blocks().saturating_mul(fs.fragment_size())),
            fs_inodes: fs.map_or(0, |fs| fs.files()),
            fs_free_inodes: fs.map_or(0, |fs| fs.files_free()),
            devices: devices(&self.text("io.stat")?),
            huge_pages: self.huge_pages()?,
        })
    }

    fn huge_pages(&self) -> Result<Vec<HugePages>, EngineError> {
        let Ok(files) = fs::read_dir(self.directory()) else {
            return Ok(Vec::new());
        };
        files
            .filter_map(|file| file.ok()?.file_name().into_string().ok())
            .filter_map(|name| {
                let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
                (!size.contains('.')).then(|| size.to_owned())
            })
            .take(MAX_ENTRIES)
            .map(|size| {
                Ok(HugePages {
                    used: self.number(&format!("hugetlb.{size}.current"))?,
                    limit_hits: keyed(&self.text(&format!("hugetlb.{size}.events"))?, "max"),
                    size,
                })
            })
            .collect()
    }
}

/// How many entries a directory has; none if the process has ended.
fn entries(directory: &str) -> u64 {
    fs::read_dir(directory).map_or(0, |entries| entries.count() as u64)
}

/// How many files a process has open, and how many of them are sockets.
fn open_files(pid: i32) -> (u64, u64) {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return (0, 0);
    };
    files.flatten().fold((0, 0), |(all, sockets), file| {
        let socket = fs::read_link(file.path()).is_ok_and(|target| {
            target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
        });
        (all + 1, sockets + u64::from(socket))
    })
}

/// The soft limit of open files in `/proc/PID/limits`; 0 if it has none or the process has ended.
fn open_files_limit(limits: &str) -> u64 {
    limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// The lines of `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn devices(text: &str) -> Vec<DeviceIo> {
    let parse = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let of = |key: &str| {
            rest.split(' ')
                .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
                .unwrap_or(0)
        };
        Some(DeviceIo {
            device: (major.parse().ok()?, minor.parse().ok()?),
            bytes: (of("rbytes"), of("wbytes")),
            requests: (of("rios"), of("wios")),
        })
    };
    text.lines().filter_map(parse).take(MAX_ENTRIES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_tables() {
        let io = "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nodd\n7:1 \n";
        assert_eq!(
            devices(io),
            [
                DeviceIo {
                    device: (254, 0),
                    bytes: (10, 20),
                    requests: (1, 2)
                },
                DeviceIo {
                    device: (7, 1),
                    ..DeviceIo::default()
                }
            ]
        );
        let limits = "Max cpu time  unlimited unlimited seconds\nMax open files            1024                 4096                 files\n";
        assert_eq!(open_files_limit(limits), 1024);
        assert_eq!(open_files_limit(""), 0);
    }

    #[test]
    fn a_processs_files_are_counted() {
        let before = open_files(std::process::id() as i32);
        let pair = std::os::unix::net::UnixStream::pair().unwrap();
        let after = open_files(std::process::id() as i32);
        drop(pair);
        // Other tests run beside this one.
        assert!(after.0 > 2 && after.1 > 0, "{before:?} {after:?}");
        assert_eq!(open_files(i32::MAX), (0, 0));
    }
}
