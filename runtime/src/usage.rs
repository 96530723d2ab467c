//! What files take of the disk, as `du` counts it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The most files that are counted: what containers on the host write is theirs to decide.
const MAX_FILES: u64 = 4_000_000;

/// A sum.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Bytes on the disk: holes take none.
    pub bytes: u64,
    /// Files of all kinds.
    pub inodes: u64,
}

/// All files at and below `roots`; what goes away meanwhile is left out.
pub fn below(roots: &[&Path]) -> Usage {
    let mut usage = Usage::default();
    let mut pending: Vec<PathBuf> = roots.iter().map(|root| root.to_path_buf()).collect();
    let mut linked = std::collections::HashSet::new();
    while let Some(path) = pending.pop() {
        let Ok(file) = fs::symlink_metadata(&path) else {
            continue;
        };
        if !file.is_dir() && file.nlink() > 1 && !linked.insert((file.dev(), file.ino())) {
            continue;
        }
        usage.bytes += file.blocks() * 512;
        usage.inodes += 1;
        if usage.inodes >= MAX_FILES {
            break;
        }
        if file.is_dir() {
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            pending.extend(entries.map(|entry| entry.path()));
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn as_du_counts() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        fs::write(root.path().join("a/b/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(root.path().join("a/b/file"), root.path().join("again")).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("link")).unwrap();
        let sparse = fs::File::create(root.path().join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let du = |option: &[&str]| -> u64 {
            let output = Command::new("du")
                .args(option)
                .arg("-s")
                .arg(root.path())
                .output();
            let text = String::from_utf8(output.unwrap().stdout).unwrap();
            text.split_whitespace().next().unwrap().parse().unwrap()
        };
        let found = below(&[root.path(), Path::new("/nonexistent")]);
        assert_eq!(found.bytes, du(&["-B1"]));
        assert_eq!(found.inodes, du(&["--inodes"]));
    }
}
