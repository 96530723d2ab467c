//! The end of an image: directories, inodes, superblock.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::BLOCK;
use super::data::{DataWriter, block_number};
use super::format::{self, DIRENT, INODE, Inode, Layout, SLOT};
use super::tree::{FileData, NodeId, NodeKind, Tree};

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// The root's offset from the beginning of the inodes. Not 0, because `ls` takes an inode number of 0 for a deleted
/// file; and the superblock has only 16 bits for it.
const ROOT_OFFSET: u64 = INODE as u64;

/// An inode's place, and what stands behind it.
struct Placed {
    id: NodeId,
    /// From the beginning of the inodes.
    offset: u64,
    layout: Layout,
    xattrs: Vec<u8>,
    /// Size of the file, link or directory.
    size: u64,
    /// How much of it stands behind the inode.
    inline: usize,
}

/// Writes everything that follows the file data, and the superblock; the file is complete and not yet synced.
pub(crate) fn finish(tree: &Tree, mut writer: DataWriter) -> io::Result<File> {
    let (placed, slots) = place(tree)?;
    let spool = writer.spool()?;
    let mut outside = HashMap::new();
    for inode in &placed {
        if inode.inline as u64 != inode.size
            && let Some(bytes) = content(tree, inode.id, &slots, &spool)?
        {
            outside.insert(
                inode.id,
                writer.blocks(&bytes[..bytes.len() - inode.inline])?,
            );
        }
    }
    let meta = writer.position();
    let meta_block = block_number(meta)?;
    for (number, inode) in placed.iter().enumerate() {
        writer.pad_to(meta + inode.offset)?;
        let node = tree.node(inode.id);
        let first = outside.get(&inode.id).copied().unwrap_or(0);
        let (kind, union) = match &node.kind {
            NodeKind::Directory { .. } => (S_IFDIR, first),
            NodeKind::File(FileData::Blocks { first, .. }) => (S_IFREG, *first),
            NodeKind::File(_) => (S_IFREG, first),
            NodeKind::Symlink(_) => (S_IFLNK, first),
            NodeKind::CharDevice(major, minor) => (S_IFCHR, format::device(*major, *minor)),
            NodeKind::BlockDevice(major, minor) => (S_IFBLK, format::device(*major, *minor)),
            NodeKind::Fifo => (S_IFIFO, 0),
        };
        let encoded = Inode {
            layout: inode.layout,
            xattr_size: inode.xattrs.len(),
            mode: kind | node.attributes.permissions & 0o7777,
            size: inode.size,
            union,
            ino: number as u32 + 1,
            uid: node.attributes.uid,
            gid: node.attributes.gid,
            mtime: node.attributes.mtime,
            mtime_nsec: node.attributes.mtime_nsec,
            nlink: links(tree, inode.id),
        };
        writer.raw(&encoded.encode())?;
        writer.raw(&inode.xattrs)?;
        if inode.inline > 0
            && let Some(bytes) = content(tree, inode.id, &slots, &spool)?
        {
            writer.raw(&bytes[bytes.len() - inode.inline..])?;
        }
    }
    writer.align()?;
    let blocks = block_number(writer.position())?;
    let superblock = format::superblock(
        (ROOT_OFFSET / SLOT) as u16,
        placed.len() as u64,
        blocks,
        meta_block,
    );
    let end = writer.position();
    let (image, _) = writer.finish()?;
    image.write_all_at(&superblock, 0)?;
    image.set_len(end)?;
    Ok(image)
}

/// What a node holds that is not in the image yet: a directory's entries, a link's target, a short file's data.
fn content(
    tree: &Tree,
    id: NodeId,
    slots: &HashMap<NodeId, u64>,
    spool: &File,
) -> io::Result<Option<Vec<u8>>> {
    Ok(match &tree.node(id).kind {
        NodeKind::Directory { .. } => Some(directory(tree, id, slots)?),
        NodeKind::Symlink(target) => Some(target.to_vec()),
        NodeKind::File(FileData::Spooled { offset, size }) => {
            let mut data = vec![0; *size as usize];
            spool.read_exact_at(&mut data, *offset)?;
            Some(data)
        }
        _ => None,
    })
}

/// The link count that `stat` shows.
fn links(tree: &Tree, id: NodeId) -> u32 {
    match &tree.node(id).kind {
        NodeKind::Directory { children, .. } => {
            let below = |id: &&NodeId| matches!(tree.node(**id).kind, NodeKind::Directory { .. });
            2 + children.values().filter(below).count() as u32
        }
        _ => tree.node(id).links,
    }
}

/// Gives each node that has a name its place: the root first, then, directory for directory, what each holds
/// together. Returns the places in order, and each node's number.
fn place(tree: &Tree) -> io::Result<(Vec<Placed>, HashMap<NodeId, u64>)> {
    let mut placed: Vec<Placed> = Vec::new();
    let mut slots = HashMap::new();
    let mut next = ROOT_OFFSET;
    let mut add = |id: NodeId, slots: &mut HashMap<NodeId, u64>| -> io::Result<()> {
        let node = tree.node(id);
        let xattrs = format::xattrs(node.xattrs.iter().map(|(name, value)| (&**name, &**value)))?;
        let room = (BLOCK as usize).saturating_sub(INODE + xattrs.len());
        let (size, tail) = match &node.kind {
            NodeKind::Directory { children, .. } => {
                let size = directory_size(&sorted(children));
                (size, (size % BLOCK) as usize)
            }
            NodeKind::File(FileData::Blocks { size, .. }) => (*size, 0),
            NodeKind::File(FileData::Spooled { size, .. }) => (u64::from(*size), *size as usize),
            NodeKind::Symlink(target) => (target.len() as u64, target.len()),
            _ => (0, 0),
        };
        // Beside long extended attributes there may be no room; then all the content gets blocks of its own.
        let inline = if tail <= room { tail } else { 0 };
        let length = (INODE + xattrs.len() + inline) as u64;
        // The kernel wants data behind an inode in the inode's own block.
        if next % BLOCK + length > BLOCK
            && (length <= BLOCK || inline > 0 || next % BLOCK + INODE as u64 > BLOCK)
        {
            next = next.next_multiple_of(BLOCK);
        }
        let layout = if inline > 0 {
            Layout::Inline
        } else {
            Layout::Plain
        };
        slots.insert(id, next / SLOT);
        placed.push(Placed {
            id,
            offset: next,
            layout,
            xattrs,
            size,
            inline,
        });
        next = (next + length).next_multiple_of(SLOT);
        Ok(())
    };
    add(Tree::ROOT, &mut slots)?;
    let mut pending = vec![Tree::ROOT];
    while let Some(directory) = pending.pop() {
        let NodeKind::Directory { children, .. } = &tree.node(directory).kind else {
            continue;
        };
        for id in children.values() {
            if !slots.contains_key(id) {
                add(*id, &mut slots)?;
            }
        }
        let below = |id: &&NodeId| matches!(tree.node(**id).kind, NodeKind::Directory { .. });
        pending.extend(children.values().rev().filter(below));
    }
    Ok((placed, slots))
}

/// The names of a directory in the order in which the kernel searches them, `.` and `..` among them.
fn sorted(children: &BTreeMap<Box<[u8]>, NodeId>) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = children.keys().map(|name| &**name).collect();
    names.extend([&b"."[..], b".."]);
    names.sort_unstable();
    names
}

/// How many of `names` the next block of a directory holds, and the bytes it needs for them.
fn fill(names: &[&[u8]]) -> (usize, usize) {
    let mut used = 0;
    for (count, name) in names.iter().enumerate() {
        let more = used + DIRENT + name.len();
        if more > BLOCK as usize {
            return (count, used);
        }
        used = more;
    }
    (names.len(), used)
}

/// Bytes of a directory: whole blocks, but for the last.
fn directory_size(names: &[&[u8]]) -> u64 {
    let (mut size, mut rest) = (0, names);
    loop {
        let (count, used) = fill(rest);
        rest = &rest[count..];
        if rest.is_empty() {
            return size + used as u64;
        }
        size += BLOCK;
    }
}

/// A directory's content: in each block the entries, then their names.
fn directory(tree: &Tree, id: NodeId, slots: &HashMap<NodeId, u64>) -> io::Result<Vec<u8>> {
    let NodeKind::Directory { children, parent } = &tree.node(id).kind else {
        return Ok(Vec::new());
    };
    let names = sorted(children);
    let (mut bytes, mut rest) = (Vec::new(), &names[..]);
    while !rest.is_empty() {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let (count, _) = fill(rest);
        let mut name_offset = count * DIRENT;
        for name in &rest[..count] {
            let child = match *name {
                b"." => id,
                b".." => *parent,
                name => *children.get(name).ok_or(io::ErrorKind::InvalidData)?,
            };
            let slot = slots.get(&child).ok_or(io::ErrorKind::InvalidData)?;
            bytes.extend(slot.to_le_bytes());
            bytes.extend((name_offset as u16).to_le_bytes());
            bytes.extend([file_type(&tree.node(child).kind), 0]);
            name_offset += name.len();
        }
        rest[..count]
            .iter()
            .for_each(|name| bytes.extend_from_slice(name));
        rest = &rest[count..];
    }
    Ok(bytes)
}

/// The type of a directory entry (`EROFS_FT_*`).
fn file_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::File(_) => 1,
        NodeKind::Directory { .. } => 2,
        NodeKind::CharDevice(..) => 3,
        NodeKind::BlockDevice(..) => 4,
        NodeKind::Fifo => 5,
        NodeKind::Symlink(_) => 7,
    }
}
