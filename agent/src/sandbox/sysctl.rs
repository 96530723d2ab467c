//! Kernel parameters of the pod.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{Context, SandboxError};

/// The path below `/proc/sys` of a sysctl's name, written with dots (`net.ipv4.ip_forward`) or, when a part has
/// a dot itself, with slashes (`net/ipv4/conf/eth0.1/forwarding`).
pub fn path(key: &str) -> Option<PathBuf> {
    let separator = if key.contains('/') { '/' } else { '.' };
    let mut path = PathBuf::new();
    for part in key.split(separator) {
        let allowed =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'@');
        if part.is_empty() || matches!(part, "." | "..") || !part.bytes().all(allowed) {
            return None;
        }
        path.push(part);
    }
    (key.len() <= 256 && path.components().count() > 1).then_some(path)
}

/// Writes them all, in the namespaces of the calling thread.
pub fn apply(sysctls: &[(PathBuf, String)]) -> Result<(), SandboxError> {
    for (path, value) in sysctls {
        let file = Path::new("/proc/sys").join(path);
        write(&file, value).context(|| format!("set sysctl {} to {value:?}", path.display()))?;
    }
    Ok(())
}

/// Writes as root, or as the file's owner: the parameters of an IPC namespace belong to the root of its user namespace, and
/// nobody else may change them.
fn write(file: &Path, value: &str) -> io::Result<()> {
    match fs::write(file, value) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            act_as(fs::metadata(file)?.uid())?;
            let written = fs::write(file, value);
            act_as(0)?;
            written
        }
        other => other,
    }
}

/// Changes the effective user of this thread alone; the C library's own call would change that of all.
fn act_as(user: u32) -> io::Result<()> {
    const SAME: libc::c_long = -1;
    // SAFETY: takes numbers only, and changes nothing but the credentials of this thread.
    let result =
        unsafe { libc::syscall(libc::SYS_setresuid, SAME, libc::c_long::from(user), SAME) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let ok = |key: &str| path(key).map(|path| path.display().to_string());
        assert_eq!(
            ok("kernel.shm_rmid_forced").unwrap(),
            "kernel/shm_rmid_forced"
        );
        assert_eq!(
            ok("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        for bad in [
            "",
            "kernel",
            ".",
            "..",
            "a..b",
            "/etc/x",
            "a/../b",
            "a/./b",
            "kernel.a b",
            "kernel.a\0",
        ] {
            assert_eq!(ok(bad), None, "{bad:?}");
        }
    }
}
