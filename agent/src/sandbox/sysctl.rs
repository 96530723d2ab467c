//! Kernel parameters of the pod.

use std::path::{Path, PathBuf};

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

/// Writes them all.
pub fn apply(sysctls: &[(PathBuf, String)]) -> Result<(), SandboxError> {
    for (path, value) in sysctls {
        std::fs::write(Path::new("/proc/sys").join(path), value)
            .context(|| format!("set sysctl {} to {value:?}", path.display()))?;
    }
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
