//! Paths of the container's file system, resolved so that no link of an image leads out of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// The root directory of a container, as seen from outside of it.
pub(crate) struct Tree(OwnedFd);

/// The parts of an absolute path, with `.` and `..` taken literally, as the specification has them.
fn parts(path: &str) -> Vec<&str> {
    let mut out = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(out.pop()),
            name => out.push(name),
        }
    }
    out
}

impl Tree {
    /// The tree below an open directory.
    pub fn new(root: OwnedFd) -> Self {
        Self(root)
    }

    /// Opens what is at a path, links followed inside of the tree.
    pub fn open(&self, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
        self.open_with(path, flags, ResolveFlag::empty())
    }

    /// As [`Self::open`], for a path that must not have a link in it.
    pub fn open_without_links(&self, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
        self.open_with(path, flags, ResolveFlag::RESOLVE_NO_SYMLINKS)
    }

    fn open_with(&self, path: &str, flags: OFlag, resolve: ResolveFlag) -> io::Result<OwnedFd> {
        let relative = match parts(path) {
            parts if parts.is_empty() => ".".to_owned(),
            parts => parts.join("/"),
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(resolve | ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match openat2(&self.0, relative.as_str(), how) {
                // A rename elsewhere made the kernel unsure of a "..".
                Err(Errno::EAGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Opens a directory, making what is missing of it.
    pub fn directory(&self, path: &str) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        match self.open(path, flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut parent = self.open("/", flags)?;
        let mut so_far = String::new();
        for part in parts(path) {
            so_far.push('/');
            so_far.push_str(part);
            parent = match self.open(&so_far, flags) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    match mkdirat(&parent, part, Mode::from_bits_truncate(0o755)) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    // Still missing: the name is a link to nowhere.
                    self.open(&so_far, flags)?
                }
                other => other?,
            };
        }
        Ok(parent)
    }

    /// Opens whatever is at a path, or makes an empty file there, with the directories on the way.
    pub fn file(&self, path: &str) -> io::Result<OwnedFd> {
        match self.open(path, OFlag::O_PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent, name) = self.parent(path)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        nix::fcntl::openat(&parent, name, flags, Mode::from_bits_truncate(0o644))?;
        self.open(path, OFlag::O_PATH)
    }

    /// The directory of a path, made if it is missing, and the last name.
    pub fn parent<'a>(&self, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
        let parts = parts(path);
        let Some((name, above)) = parts.split_last() else {
            return Err(Errno::EISDIR.into());
        };
        Ok((self.directory(&above.join("/"))?, name))
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn tree(directory: &std::path::Path) -> Tree {
        Tree::new(fs::File::open(directory).unwrap().into())
    }

    #[test]
    fn parts_are_lexical() {
        assert_eq!(parts("/a/./b/../c"), ["a", "c"]);
        assert_eq!(parts("/../../x"), ["x"]);
        assert!(parts("/").is_empty());
    }

    // must-test: symbolic links of an image that lead outside
    #[test]
    fn links_stay_inside() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        symlink(outside.path(), inside.path().join("absolute")).unwrap();
        symlink("../../../../../../tmp", inside.path().join("relative")).unwrap();
        symlink("/nowhere", inside.path().join("dangling")).unwrap();
        let tree = tree(inside.path());
        // The link's target is looked up, and not found, below the container's own root.
        assert!(tree.directory("/absolute/made").is_err());
        assert!(tree.directory("/dangling").is_err());
        assert!(tree.file("/dangling").is_err());
        assert!(tree.directory("/relative/made").is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        fs::create_dir(inside.path().join("tmp")).unwrap();
        tree.directory("/relative/made").unwrap();
        assert!(inside.path().join("tmp/made").is_dir());
    }

    #[test]
    fn what_is_missing_is_made() {
        let inside = tempfile::tempdir().unwrap();
        let tree = tree(inside.path());
        tree.directory("/a/b/c").unwrap();
        tree.file("/x/y/file").unwrap();
        tree.file("/x/y/file").unwrap();
        assert!(inside.path().join("a/b/c").is_dir());
        assert!(inside.path().join("x/y/file").is_file());
        assert!(tree.directory("/x/y/file/z").is_err());
    }
}
