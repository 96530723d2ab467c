//! The host cgroup of a pod process, under the parent that the kubelet names, so that the pod's memory and CPU
//! are accounted where the kubelet looks.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::MicroVmConfig;
use super::dir::PodDir;

const ROOT: &str = "/sys/fs/cgroup";

/// Makes the pod's cgroup and moves the pod process there. On a host without cgroup v2 the process stays where
/// the daemon is.
pub fn place(dir: &PodDir, config: &MicroVmConfig, parent: &str, pid: u32) -> io::Result<()> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        tracing::debug!("no cgroup v2 on this host: the pod process stays in the daemon's cgroup");
        return Ok(());
    }
    let parent = if parent.is_empty() {
        &config.cgroup_parent
    } else {
        parent
    };
    let name = dir
        .share()
        .parent()
        .and_then(Path::file_name)
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let path = resolve(parent)?.join(format!("caisson-{name}"));
    // Noted before it is made: what is noted is removed with the pod.
    fs::write(dir.cgroup(), path.as_os_str().as_encoded_bytes())?;
    fs::create_dir_all(&path)
        .and_then(|()| fs::write(path.join("cgroup.procs"), pid.to_string()))
        .map_err(|e| io::Error::other(format!("cgroup {}: {e}", path.display())))
}

/// Removes the pod's cgroup, if it has one. Idempotent.
pub async fn remove(dir: &PodDir) -> io::Result<()> {
    let Ok(path) = fs::read_to_string(dir.cgroup()) else {
        return Ok(());
    };
    for _ in 0..100 {
        match fs::remove_dir(&path) {
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
}
