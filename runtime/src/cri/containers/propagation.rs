//! Whether mounts of the host can propagate as a container asks.

use std::path::{Path, PathBuf};

use caisson_proto::cri;
use cri::MountPropagation;

use super::super::CriError;
use crate::sandbox::pod::dir;

/// Checks that the mount on which `path` is passes on what happens to it.
///
/// # Errors
/// INVALID_ARGUMENT that names the mount point and what it would have to be.
pub async fn check(path: &Path, mount: &cri::Mount) -> Result<(), CriError> {
    let wanted = mount.propagation();
    if wanted == MountPropagation::PropagationPrivate {
        return Ok(());
    }
    let text = tokio::fs::read_to_string("/proc/self/mountinfo")
        .await
        .map_err(|e| CriError::internal(format!("/proc/self/mountinfo cannot be read: {e}")))?;
    let Some((point, kind)) = around(&text, path) else {
        return Err(CriError::internal(format!(
            "{} is on no mount of the host",
            path.display()
        )));
    };
    let enough = match kind {
        Kind::Shared => true,
        Kind::Slave => wanted == MountPropagation::PropagationHostToContainer,
        Kind::Private => false,
    };
    if enough {
        return Ok(());
    }
    Err(CriError::invalid(format!(
        "the mount at {} asks for {}, but {} is on the mount {}, which is not shared; make it shared (mount --make-rshared)",
        mount.container_path,
        wanted.as_str_name(),
        path.display(),
        point.display()
    )))
}

/// How a mount is connected to others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Shared,
    Slave,
    Private,
}

/// The mount on which a path is, by /proc/self/mountinfo (proc(5)): the last one on the longest mount point.
fn around(mountinfo: &str, path: &Path) -> Option<(PathBuf, Kind)> {
    let mut found: Option<(PathBuf, Kind)> = None;
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let Some(point) = fields.nth(4).map(|f| PathBuf::from(dir::unescape(f))) else {
            continue;
        };
        let longer = found
            .as_ref()
            .is_none_or(|(best, _)| point.as_os_str().len() >= best.as_os_str().len());
        if !path.starts_with(&point) || !longer {
            continue;
        }
        let optional: Vec<_> = fields.skip(1).take_while(|field| *field != "-").collect();
        let has = |tag: &str| optional.iter().any(|field| field.starts_with(tag));
        let kind = if has("shared:") {
            Kind::Shared
        } else if has("master:") {
            Kind::Slave
        } else {
            Kind::Private
        };
        found = Some((point, kind));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                    23 22 0:5 / /data rw master:7 - tmpfs a rw\n\
                    24 22 0:6 / /data/x\\040y rw - tmpfs b rw\n\
                    25 22 0:7 / /top rw - tmpfs c rw\n\
                    26 25 0:8 / /top rw shared:9 master:1 - tmpfs d rw\n";
        let of = |path: &str| {
            let (point, kind) = around(text, Path::new(path)).unwrap();
            (point.display().to_string(), kind)
        };
        assert_eq!(of("/srv"), ("/".into(), Kind::Shared));
        assert_eq!(of("/data/a"), ("/data".into(), Kind::Slave));
        assert_eq!(of("/data/x y/z"), ("/data/x y".into(), Kind::Private));
        assert_eq!(of("/database"), ("/".into(), Kind::Shared));
        assert_eq!(of("/top/z"), ("/top".into(), Kind::Shared));
    }
}
