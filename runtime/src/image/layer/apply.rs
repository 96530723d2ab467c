//! A layer's entries, applied to a tree: the rules of OCI "layer.md".
//!
//! Paths are resolved inside the tree alone; the host's file system is never asked. `..` in an entry's path is an
//! error; a symbolic link among its parents is followed within the tree, as if the tree's root were `/`.

use std::collections::VecDeque;

use crate::image::digest::DiffId;
use crate::image::erofs::tree::{Attributes, FileData, NodeId, NodeKind, Tree};
use crate::image::error::ImageError;

use super::tar::{Entry, EntryKind};

/// Longest name of a file, in bytes.
const MAX_NAME: usize = 255;
/// Longest path, in bytes.
const MAX_PATH: usize = 4096;
/// Most components that are walked for one path, those of symbolic links included.
const MAX_STEPS: usize = 1024;
/// Most symbolic links that are followed for one path.
const MAX_LINKS: usize = 40;
/// Most entries of a layer, implied directories included.
pub(super) const MAX_NODES: usize = 4_000_000;
/// Most bytes of names, link targets and extended attributes in a layer: they are kept in memory.
const MAX_METADATA: u64 = 512 << 20;
/// Most bytes of extended attributes of one file.
const MAX_XATTRS: usize = 128 << 10;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// A layer that is being built.
pub(super) struct Applier {
    pub(super) tree: Tree,
    what: String,
    metadata: u64,
}

/// What [`Applier::prepare`] found an entry to be.
pub(super) enum Prepared {
    /// Everything is done.
    Done,
    /// A file whose data must be written; then [`Applier::file`] names it.
    File {
        parent: NodeId,
        name: Vec<u8>,
        size: u64,
    },
}

impl Applier {
    pub(super) fn new(layer: &DiffId) -> Self {
        Self {
            tree: Tree::new(),
            what: format!("layer {}", layer.short()),
            metadata: 0,
        }
    }

    /// Applies everything of an entry but a file's data.
    pub(super) fn prepare(&mut self, entry: &Entry) -> Result<Prepared, ImageError> {
        self.account(entry)?;
        let components = self.components(&entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            return match entry.kind {
                EntryKind::Directory => {
                    self.set(Tree::ROOT, entry)?;
                    Ok(Prepared::Done)
                }
                _ => Err(self.corrupt(entry, "it would replace the root directory")),
            };
        };
        // Bookkeeping of aufs, which is not content.
        let aufs = |part: &&[u8]| part.starts_with(b".wh..wh.");
        if parents.iter().any(aufs) || aufs(name) && *name != OPAQUE {
            return Ok(Prepared::Done);
        }
        if *name == OPAQUE {
            let directory = self.directory(entry, parents)?;
            self.opaque(directory);
            return Ok(Prepared::Done);
        }
        let parent = self.directory(entry, parents)?;
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(self.corrupt(entry, "it is a whiteout without a name"));
            }
            self.whiteout(parent, hidden);
            return Ok(Prepared::Done);
        }
        let kind = match &entry.kind {
            EntryKind::File { size } => {
                return Ok(Prepared::File {
                    parent,
                    name: name.to_vec(),
                    size: *size,
                });
            }
            EntryKind::Directory => {
                self.make_directory(entry, parent, name)?;
                return Ok(Prepared::Done);
            }
            EntryKind::HardLink(target) => {
                let target = self.link_target(entry, target)?;
                if self.tree.child(parent, name) != Some(target) {
                    self.tree.link(parent, name, target);
                }
                return Ok(Prepared::Done);
            }
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() >= MAX_PATH || target.contains(&0) {
                    return Err(
                        self.corrupt(entry, "it is a symbolic link whose target is not a path")
                    );
                }
                NodeKind::Symlink(target.as_slice().into())
            }
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::CharDevice(major, minor) => {
                let (major, minor) = self.device(entry, *major, *minor)?;
                NodeKind::CharDevice(major, minor)
            }
            EntryKind::BlockDevice(major, minor) => {
                let (major, minor) = self.device(entry, *major, *minor)?;
                NodeKind::BlockDevice(major, minor)
            }
        };
        self.add(entry, parent, name, kind)?;
        Ok(Prepared::Done)
    }

    /// Names a file whose data is written.
    pub(super) fn file(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        data: FileData,
    ) -> Result<(), ImageError> {
        self.add(entry, parent, name, NodeKind::File(data))
    }

    fn add(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        kind: NodeKind,
    ) -> Result<(), ImageError> {
        let attributes = self.attributes(entry)?;
        let node = self.tree.add(kind, attributes);
        self.set(node, entry)?;
        self.tree.link(parent, name, node);
        Ok(())
    }

    /// A directory stays what it is, with new attributes; anything else gives way to it. Where this layer had removed
    /// the name before, the directory hides what lower layers have in theirs.
    fn make_directory(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
    ) -> Result<(), ImageError> {
        let old = self.tree.child(parent, name);
        if let Some(old) = old
            && matches!(self.tree.node(old).kind, NodeKind::Directory { .. })
        {
            return self.set(old, entry);
        }
        let hides = old.is_some_and(|old| self.is_whiteout(old));
        let attributes = self.attributes(entry)?;
        let node = self.tree.add_directory(parent, attributes);
        self.set(node, entry)?;
        if hides {
            self.opaque(node);
        }
        self.tree.link(parent, name, node);
        Ok(())
    }

    /// Hides what lower layers have as `name`. What this layer has there stays: whiteouts are about lower layers.
    fn whiteout(&mut self, parent: NodeId, name: &[u8]) {
        match self.tree.child(parent, name) {
            None => {
                let attributes = Attributes {
                    permissions: 0,
                    ..Attributes::IMPLIED
                };
                let node = self.tree.add(NodeKind::CharDevice(0, 0), attributes);
                self.tree.link(parent, name, node);
            }
            Some(old) if matches!(self.tree.node(old).kind, NodeKind::Directory { .. }) => {
                self.opaque(old)
            }
            Some(_) => {}
        }
    }

    fn is_whiteout(&self, node: NodeId) -> bool {
        matches!(self.tree.node(node).kind, NodeKind::CharDevice(0, 0))
    }

    fn opaque(&mut self, directory: NodeId) {
        self.tree
            .node_mut(directory)
            .xattrs
            .insert(OPAQUE_XATTR.into(), b"y"[..].into());
    }

    /// The components of a path: a leading `/` and `.` mean nothing, `..` is an error.
    fn components<'a>(&self, path: &'a [u8]) -> Result<Vec<&'a [u8]>, ImageError> {
        let shown = || String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
        let wrong = |reason: &str| {
            ImageError::corrupt(&*self.what, format!("the path {:?} {reason}", shown()))
        };
        if path.len() > MAX_PATH {
            return Err(wrong("is longer than 4,096 bytes"));
        }
        if path.contains(&0) {
            return Err(wrong("has a NUL character"));
        }
        let components: Vec<&[u8]> = path
            .split(|byte| *byte == b'/')
            .filter(|part| !matches!(*part, b"" | b"."))
            .collect();
        for part in &components {
            if *part == b".." {
                return Err(wrong("leads upwards with \"..\""));
            }
            if part.len() > MAX_NAME {
                return Err(wrong("has a name of more than 255 bytes"));
            }
        }
        Ok(components)
    }

    /// The directory with this path; what is missing of it is made.
    fn directory(&mut self, entry: &Entry, path: &[&[u8]]) -> Result<NodeId, ImageError> {
        match self.walk(entry, path, true)? {
            Some(node) => Ok(node),
            None => Err(self.corrupt(entry, "its directory could not be made")),
        }
    }

    /// What a hard link leads to. Only this layer is searched: a link cannot lead into another file system.
    fn link_target(&mut self, entry: &Entry, target: &[u8]) -> Result<NodeId, ImageError> {
        let components = self.components(target)?;
        let node = match components.split_last() {
            Some((name, parents)) => {
                let parent = self.walk(entry, parents, false)?;
                parent.and_then(|parent| self.tree.child(parent, name))
            }
            None => None,
        };
        match node {
            Some(node) if self.is_whiteout(node) => {
                Err(self.corrupt(entry, "it is a hard link to a removed file"))
            }
            Some(node) if matches!(self.tree.node(node).kind, NodeKind::Directory { .. }) => {
                Err(self.corrupt(entry, "it is a hard link to a directory"))
            }
            Some(node) => Ok(node),
            None => Err(self.corrupt(
                entry,
                "it is a hard link to a file that is not in the layer",
            )),
        }
    }

    /// Walks to a directory, through symbolic links. `..` in their targets stops at the root.
    fn walk(
        &mut self,
        entry: &Entry,
        path: &[&[u8]],
        make: bool,
    ) -> Result<Option<NodeId>, ImageError> {
        let mut rest: VecDeque<Box<[u8]>> = path.iter().map(|part| Box::from(*part)).collect();
        let (mut at, mut steps, mut links) = (Tree::ROOT, 0, 0);
        while let Some(part) = rest.pop_front() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(self.corrupt(entry, "its path is too deep"));
            }
            match &*part {
                b"" | b"." => continue,
                b".." => {
                    at = self.tree.parent(at);
                    continue;
                }
                _ if part.len() > MAX_NAME => {
                    return Err(self.corrupt(entry, "its path has a name that is too long"));
                }
                _ => {}
            }
            let child = self.tree.child(at, &part);
            let hides = child.is_some_and(|child| self.is_whiteout(child));
            match child {
                Some(child) if !hides => match &self.tree.node(child).kind {
                    NodeKind::Directory { .. } => at = child,
                    NodeKind::Symlink(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(self
                                .corrupt(entry, "its path leads through too many symbolic links"));
                        }
                        if target.starts_with(b"/") {
                            at = Tree::ROOT;
                        }
                        for part in target.rsplit(|byte| *byte == b'/') {
                            rest.push_front(part.into());
                        }
                    }
                    _ => return Err(self.corrupt(entry, "a parent of its path is not a directory")),
                },
                _ if make => {
                    self.room_for(1, part.len())?;
                    let node = self.tree.add_directory(at, Attributes::IMPLIED);
                    if hides {
                        self.opaque(node);
                    }
                    self.tree.link(at, &part, node);
                    at = node;
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Sets owner, permissions, time and extended attributes.
    fn set(&mut self, node: NodeId, entry: &Entry) -> Result<(), ImageError> {
        let attributes = self.attributes(entry)?;
        let mut xattrs = std::collections::BTreeMap::new();
        let mut total = 0;
        for (name, value) in &entry.xattrs {
            total += name.len() + value.len();
            if value.len() > u16::MAX.into() || total > MAX_XATTRS {
                return Err(self.corrupt(entry, "its extended attributes are too large"));
            }
            if self.keeps(entry, name)? {
                xattrs.insert(name.as_slice().into(), value.as_slice().into());
            }
        }
        let node = self.tree.node_mut(node);
        // An opaque directory stays so when its own entry comes after the marker.
        if let Some(value) = node.xattrs.remove(OPAQUE_XATTR) {
            xattrs.entry(OPAQUE_XATTR.into()).or_insert(value);
        }
        node.attributes = attributes;
        node.xattrs = xattrs;
        Ok(())
    }

    /// Whether an extended attribute is content. Name spaces that Linux has not got are left out, as every runtime
    /// does (macOS tools write such). Overlayfs's own attributes are not content either: some say where else a file's
    /// data is to be looked for, and an image may not say that.
    fn keeps(&self, entry: &Entry, name: &[u8]) -> Result<bool, ImageError> {
        match name.strip_prefix(b"trusted.overlay.") {
            Some(b"opaque") => return Ok(true),
            Some(b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"xwhiteouts") => {
                return Ok(false);
            }
            Some(_) => {
                let reason = format!(
                    "it has the attribute {:?}, which only overlayfs may set",
                    String::from_utf8_lossy(name)
                );
                return Err(self.corrupt(entry, &reason));
            }
            None => {}
        }
        let known = [&b"user."[..], b"trusted.", b"security."]
            .iter()
            .any(|prefix| {
                name.strip_prefix(*prefix)
                    .is_some_and(|rest| !rest.is_empty() && rest.len() <= 255 && !rest.contains(&0))
            });
        let acl = matches!(
            name,
            b"system.posix_acl_access" | b"system.posix_acl_default"
        );
        if !known && !acl {
            tracing::debug!(layer = self.what, name = %String::from_utf8_lossy(name), "extended attribute left out");
        }
        Ok(known || acl)
    }

    fn attributes(&self, entry: &Entry) -> Result<Attributes, ImageError> {
        let id = |id: u64| {
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| self.corrupt(entry, "its owner is not a 32-bit number"))
        };
        Ok(Attributes {
            permissions: (entry.mode & 0o7777) as u16,
            uid: id(entry.uid)?,
            gid: id(entry.gid)?,
            mtime: entry.mtime.0,
            mtime_nsec: entry.mtime.1,
        })
    }

    fn device(&self, entry: &Entry, major: u64, minor: u64) -> Result<(u32, u32), ImageError> {
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(self.corrupt(entry, "its device number is not one that Linux has"));
        }
        Ok((major as u32, minor as u32))
    }

    fn account(&mut self, entry: &Entry) -> Result<(), ImageError> {
        let link = match &entry.kind {
            EntryKind::HardLink(target) | EntryKind::Symlink(target) => target.len(),
            _ => 0,
        };
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 64)
            .sum();
        self.room_for(1, entry.path.len() + link + xattrs)
    }

    fn room_for(&mut self, nodes: usize, bytes: usize) -> Result<(), ImageError> {
        self.metadata += bytes as u64;
        if self.tree.len() + nodes > MAX_NODES {
            return Err(ImageError::too_large(
                &*self.what,
                format!("it has more than {MAX_NODES} files"),
            ));
        }
        if self.metadata > MAX_METADATA {
            return Err(ImageError::too_large(
                &*self.what,
                "its names and attributes take more than 512 MiB",
            ));
        }
        Ok(())
    }

    fn corrupt(&self, entry: &Entry, reason: &str) -> ImageError {
        let path: String = String::from_utf8_lossy(&entry.path)
            .chars()
            .take(200)
            .collect();
        ImageError::corrupt(&*self.what, format!("entry {path:?}: {reason}"))
    }
}
