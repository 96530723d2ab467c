//! The mounts that the daemon sees: `/proc/self/mountinfo`, read in one place (proc(5)).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How a mount passes on what is mounted below it (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Propagation {
    /// To its peers and from them, and to those that follow it.
    Shared,
    /// From those it follows only.
    Slave,
    /// Not at all.
    Private,
}

/// A mount.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mount {
    /// The device's number, `MAJOR:MINOR`: the same for all mounts of one file system.
    pub device: String,
    /// What of the file system is mounted: a path in it.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// How it passes on mounts.
    pub propagation: Propagation,
    /// The file system's type.
    pub kind: String,
}

/// All mounts, in the order of the kernel: the last one on a path covers the others.
///
/// # Errors
/// What the system says when the list cannot be read.
pub fn table() -> io::Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(|error| {
        io::Error::other(format!("/proc/self/mountinfo cannot be read: {error}"))
    })?;
    Ok(parse(&text))
}

/// The mounts of a text like that of `/proc/self/mountinfo`. A line that is none is passed over.
pub fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(parse_line).collect()
}

/// The mount on which `path` is: the last one on the longest mount point.
pub fn around<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let on = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    on.max_by_key(|mount| mount.point.as_os_str().len())
}

/// The mounts at or below `path`.
///
/// # Errors
/// As [`table`].
pub fn below(path: &Path) -> io::Result<impl Iterator<Item = Mount>> {
    let mounts = table()?.into_iter();
    Ok(mounts.filter(move |mount| mount.point.starts_with(path)))
}

fn parse_line(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ').skip(2);
    let (device, root, point) = (fields.next()?, fields.next()?, fields.next()?);
    let mut propagation = Propagation::Private;
    // After the options, any number of tags, which a dash ends.
    for tag in fields.by_ref().skip(1).take_while(|field| *field != "-") {
        if tag.starts_with("shared:") {
            propagation = Propagation::Shared;
        } else if tag.starts_with("master:") && propagation == Propagation::Private {
            propagation = Propagation::Slave;
        }
    }
    Some(Mount {
        device: device.to_owned(),
        root: unescape(root).into(),
        point: unescape(point).into(),
        propagation,
        kind: fields.next()?.to_owned(),
    })
}

/// Undoes the octal escapes.
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut i = 0;
    while let Some(&byte) = bytes.get(i) {
        let code = (byte == b'\\')
            .then(|| field.get(i + 1..i + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(byte));
        i += if code.is_some() { 4 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let mounts = parse(
            "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
             23 22 0:5 /x /a\\040b rw,nosuid shared:2 master:1 - tmpfs tmpfs rw\n\
             24 22 0:6 / /c rw master:3 - tmpfs tmpfs rw\n\
             25 22 0:7 / /d rw - hugetlbfs nodev rw\n\
             not a mount\n",
        );
        let told: Vec<_> = mounts
            .iter()
            .map(|mount| {
                let (root, point) = (mount.root.to_str().unwrap(), mount.point.to_str().unwrap());
                let (device, kind) = (mount.device.as_str(), mount.kind.as_str());
                (device, root, point, mount.propagation, kind)
            })
            .collect();
        use Propagation::{Private, Shared, Slave};
        assert_eq!(
            told,
            [
                ("8:1", "/", "/", Shared, "ext4"),
                ("0:5", "/x", "/a b", Shared, "tmpfs"),
                ("0:6", "/", "/c", Slave, "tmpfs"),
                ("0:7", "/", "/d", Private, "hugetlbfs"),
            ]
        );
    }

    #[test]
    fn the_last_mount_on_the_longest_point_is_the_one_around() {
        let mounts = parse(
            "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
             23 22 0:5 / /a rw - tmpfs tmpfs rw\n\
             24 22 0:6 / /a rw master:3 - tmpfs tmpfs rw\n\
             25 22 0:7 / /abc rw - tmpfs tmpfs rw\n",
        );
        let device = |path: &str| around(&mounts, Path::new(path)).map(|mount| &*mount.device);
        assert_eq!(device("/a/b"), Some("0:6"));
        assert_eq!(device("/ab"), Some("8:1"));
        assert_eq!(device("/abc"), Some("0:7"));
        assert_eq!(device("relative"), None);
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/a\9"), r"/a\9");
    }
}
