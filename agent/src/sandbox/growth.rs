//! A clone that is larger than its template: the guest takes the CPUs and the memory into use that its kernel did not boot with.
//!
//! The memory comes by itself: the kernel's driver of the memory device (virtio 1.2 §5.15) takes it as soon as the machine goes
//! on. What is left to do is to wait for it, since a container must find what its pod was promised, and to raise what the
//! kernel has derived from its memory when it booted. The kernel's own formulas are linear below their limits, so
//! each value grows by what the added memory would have given it.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::sysinfo::sysinfo;

use super::plan::Growth;
use super::{Context, SandboxError};

/// How long the kernel may take for the memory. It takes a few milliseconds for each 128 MiB.
const LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(1);
const PAGE: u64 = 4096;
/// One thread for so many bytes of memory: eight kernel stacks of 16 KiB (Linux, kernel/fork.c).
const THREAD: u64 = 128 << 10;
/// One open file for so many bytes (Linux, fs/file_table.c).
const FILE: u64 = 10 << 10;
/// Connections that are tracked: one for so many bytes, and the most below 4 GiB (Linux, nf_conntrack_core.c).
const CONNECTION: u64 = 128 << 10;
const CONNECTIONS: u64 = 65_536;
/// The limits of a socket's buffers (Linux, net/ipv4/tcp.c): the most to send and to receive, and how much of it the memory gives.
const SEND: u64 = 4 << 20;
const RECEIVE: u64 = 6 << 20;
const BUFFER_OF_MEMORY: u64 = 128;
/// Limits that are half as many as there may be threads (user_namespaces(7)).
const NAMESPACES: [&str; 8] = ["user", "pid", "uts", "ipc", "net", "mnt", "cgroup", "time"];
/// File systems in memory that the agent has mounted, each half as large as the memory.
const MOUNTS: [&str; 2] = ["/run", "/dev/shm"];

/// Bytes of memory that the kernel had when it booted.
static BOOTED_WITH: OnceLock<u64> = OnceLock::new();

/// Notes how much memory there is, before the machine can be written down as a template.
pub fn remember() {
    if let Ok(bytes) = memory() {
        let _ = BOOTED_WITH.set(bytes);
    }
}

/// Takes into use what there is. Blocks.
///
/// # Errors
/// A CPU does not come up, or the memory does not come.
pub fn take(growth: &Growth) -> Result<(), SandboxError> {
    for cpu in 1..growth.vcpus {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        fs::write(&online, "1").context(|| format!("bring CPU {cpu} up"))?;
    }
    if growth.added_bytes == 0 {
        return Ok(());
    }
    wait_for_memory(growth.added_bytes)
        .context(|| format!("take {} MiB of memory into use", growth.added_bytes >> 20))?;
    raise_limits(growth.added_bytes);
    Ok(())
}

fn memory() -> io::Result<u64> {
    Ok(sysinfo()?.ram_total())
}

fn wait_for_memory(added: u64) -> io::Result<()> {
    let before = BOOTED_WITH
        .get()
        .ok_or_else(|| io::Error::other("it is not known what the guest booted with"))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let more = memory()?.saturating_sub(*before);
        if more >= added {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let seconds = LIMIT.as_secs();
            return Err(io::Error::other(format!(
                "{} MiB came within {seconds} s",
                more >> 20
            )));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Raises what depends on the size of the memory. A limit that is not there is not raised.
fn raise_limits(added: u64) {
    let threads = added / THREAD;
    raise("kernel/threads-max", |old| grown(old, 0, threads, u64::MAX));
    for kind in NAMESPACES {
        let name = format!("user/max_{kind}_namespaces");
        raise(&name, |old| grown(old, 0, threads / 2, u64::MAX));
    }
    for resource in [Resource::RLIMIT_NPROC, Resource::RLIMIT_SIGPENDING] {
        if let Ok((soft, hard)) = getrlimit(resource) {
            let more = |limit: u64| limit.saturating_add(threads / 2);
            let _ = setrlimit(resource, more(soft), more(hard));
        }
    }
    raise("fs/file-max", |old| grown(old, 0, added / FILE, u64::MAX));
    let pages = added / PAGE;
    raise("net/ipv4/tcp_mem", |old| thresholds(old, pages / 16));
    raise("net/ipv4/udp_mem", |old| thresholds(old, pages / 8));
    let buffer = added / BUFFER_OF_MEMORY;
    raise("net/ipv4/tcp_wmem", |old| grown(old, 2, buffer, SEND));
    raise("net/ipv4/tcp_rmem", |old| grown(old, 2, buffer, RECEIVE));
    // The table first, or its entries would be longer lists.
    let tracked = added / CONNECTION;
    let more = |old: &[u64]| grown(old, 0, tracked, CONNECTIONS);
    raise_file("/sys/module/nf_conntrack/parameters/hashsize", more);
    raise("net/netfilter/nf_conntrack_max", more);
    for path in MOUNTS {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let _ = mount(None::<&str>, path, None::<&str>, flags, Some("size=50%"));
    }
}

fn raise(sysctl: &str, new: impl FnOnce(&[u64]) -> Vec<u64>) {
    raise_file(Path::new("/proc/sys").join(sysctl), new);
}

fn raise_file(path: impl AsRef<Path>, new: impl FnOnce(&[u64]) -> Vec<u64>) {
    let old = fs::read_to_string(&path).unwrap_or_default();
    let old: Option<Vec<u64>> = old
        .split_ascii_whitespace()
        .map(|number| number.parse().ok())
        .collect();
    if let Some(old) = old.filter(|old| !old.is_empty()) {
        let words: Vec<String> = new(&old).iter().map(u64::to_string).collect();
        let _ = fs::write(path, words.join(" "));
    }
}

/// The numbers with the one at `index` larger by `more`, up to `most`. One that is larger already stays.
fn grown(old: &[u64], index: usize, more: u64, most: u64) -> Vec<u64> {
    let mut new = old.to_vec();
    if let Some(number) = new.get_mut(index) {
        *number = number.saturating_add(more).min(most.max(*number));
    }
    new
}

/// Three thresholds of which the second is given by the memory, the first is three quarters of it, and the third twice the
/// first.
fn thresholds(old: &[u64], more: u64) -> Vec<u64> {
    let &[_, middle, _] = old else {
        return old.to_vec();
    };
    let middle = middle.saturating_add(more);
    let first = middle / 4 * 3;
    vec![first, middle, first.saturating_mul(2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_grow_up_to_what_the_kernel_gives_at_most() {
        assert_eq!(grown(&[900], 0, 100, u64::MAX), [1000]);
        assert_eq!(grown(&[4, 8, 900], 2, 200, 1000), [4, 8, 1000]);
        assert_eq!(grown(&[2000], 0, 200, 1000), [2000]);
        assert_eq!(grown(&[u64::MAX], 0, 200, u64::MAX), [u64::MAX]);
        assert_eq!(grown(&[1], 2, 200, 1000), [1]);
        assert_eq!(thresholds(&[1, 1000, 3], 600), [1200, 1600, 2400]);
        assert_eq!(thresholds(&[1, 2], 600), [1, 2]);
    }

    #[test]
    fn what_is_no_list_of_numbers_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("limit");
        for text in ["", "max\n", "1 x\n"] {
            fs::write(&file, text).unwrap();
            raise_file(&file, |_| vec![7]);
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        fs::write(&file, "1\t2\t3\n").unwrap();
        raise_file(&file, |old| grown(old, 1, 5, 100));
        assert_eq!(fs::read_to_string(&file).unwrap(), "1 7 3");
        raise_file(dir.path().join("none"), |_| vec![7]);
        assert!(!dir.path().join("none").exists());
    }
}
