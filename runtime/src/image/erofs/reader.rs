//! Reads an image back, for tests and fuzzing: strictly, and by the format's description alone.

use std::collections::{BTreeMap, BTreeSet};

use super::BLOCK;

const S_IFMT: u16 = 0o170_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFLNK: u16 = 0o120_000;
const S_IFREG: u16 = 0o100_000;

/// What an image has under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Type and permissions.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub links: u32,
    /// Of a device, as the kernel encodes it on the disk.
    pub device: u32,
    /// A file's data, or a link's target.
    pub data: Vec<u8>,
    /// How many extended attributes there are.
    pub xattrs: usize,
}

/// Everything in an image, by its path; the root's is empty. What is wrong with the image is an error in words.
pub(crate) fn read(image: &[u8]) -> Result<BTreeMap<Vec<u8>, Found>, String> {
    let reader = Reader::new(image)?;
    let mut found = BTreeMap::new();
    let mut names: BTreeMap<u64, u32> = BTreeMap::new();
    let mut directories: BTreeSet<u64> = BTreeSet::new();
    let mut pending = vec![(Vec::new(), reader.root, reader.root)];
    while let Some((path, nid, parent)) = pending.pop() {
        let inode = reader.inode(nid)?;
        *names.entry(nid).or_default() += 1;
        let mut below = 2;
        if inode.found.mode & S_IFMT == S_IFDIR {
            if !directories.insert(nid) {
                return Err(format!("{path:?} is a directory with two names"));
            }
            for (name, child, kind) in directory(&inode.found.data)? {
                let target = reader.inode(child)?;
                check_type(kind, target.found.mode)?;
                match name.as_slice() {
                    b"." if child == nid => {}
                    b".." if child == parent => {}
                    b"." | b".." => return Err(format!("{path:?} has a wrong {name:?}")),
                    _ if name.contains(&b'/') || name.contains(&0) || name.is_empty() => {
                        return Err(format!("{path:?} has the name {name:?}"));
                    }
                    _ => {
                        if target.found.mode & S_IFMT == S_IFDIR {
                            below += 1;
                        }
                        let mut full = path.clone();
                        if !full.is_empty() {
                            full.push(b'/');
                        }
                        full.extend_from_slice(&name);
                        pending.push((full, child, nid));
                    }
                }
            }
            if inode.found.links != below {
                return Err(format!(
                    "{path:?} has {} links, and not {below}",
                    inode.found.links
                ));
            }
        }
        let is_new = found.insert(path, (nid, inode.found)).is_none();
        if !is_new {
            return Err("a path is there twice".to_owned());
        }
    }
    if names.len() as u64 != reader.inodes {
        return Err(format!(
            "{} inodes have names, and {} are said",
            names.len(),
            reader.inodes
        ));
    }
    let mut result = BTreeMap::new();
    for (path, (nid, mut inode)) in found {
        if inode.mode & S_IFMT == S_IFDIR {
            inode.data.clear();
        } else if names.get(&nid) != Some(&inode.links) {
            return Err(format!(
                "{path:?} has {} links and {:?} names",
                inode.links,
                names.get(&nid)
            ));
        }
        result.insert(path, inode);
    }
    Ok(result)
}

struct Reader<'a> {
    image: &'a [u8],
    root: u64,
    inodes: u64,
    meta: usize,
}

struct Inode {
    found: Found,
}

impl<'a> Reader<'a> {
    fn new(image: &'a [u8]) -> Result<Self, String> {
        if !(image.len() as u64).is_multiple_of(BLOCK) || image.len() < 2 * BLOCK as usize {
            return Err(format!("it has {} bytes", image.len()));
        }
        let mut fields = Fields(image, 1024);
        if fields.u32()? != 0xE0F5_E1E2 {
            return Err("it has another magic number".to_owned());
        }
        let _checksum = fields.u32()?;
        let _features = fields.u32()?;
        if fields.bytes(2)? != [12, 0] {
            return Err("it has another block size".to_owned());
        }
        let root = fields.u16()?.into();
        let inodes = fields.u64()?;
        fields.bytes(12)?;
        let blocks = fields.u32()?;
        if u64::from(blocks) * BLOCK != image.len() as u64 {
            return Err(format!("it says that it has {blocks} blocks"));
        }
        let meta = fields.u32()? as usize * BLOCK as usize;
        Ok(Self {
            image,
            root,
            inodes,
            meta,
        })
    }

    fn inode(&self, nid: u64) -> Result<Inode, String> {
        let at = self.meta + nid as usize * 32;
        let mut fields = Fields(self.image, at);
        let format = fields.u16()?;
        let xattr_count = fields.u16()?;
        let mode = fields.u16()?;
        fields.bytes(2)?;
        let size = fields.u64()?;
        let union = fields.u32()?;
        let _ino = fields.u32()?;
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        let mtime = (fields.u64()? as i64, fields.u32()?);
        let links = fields.u32()?;
        fields.bytes(16)?;
        let (xattrs, xattr_size) = match xattr_count {
            0 => (0, 0),
            count => {
                let size = 12 + 4 * (usize::from(count) - 1);
                (xattrs(&fields.bytes(size)?[12..])?, size)
            }
        };
        let mut device = 0;
        let data = match (mode & S_IFMT, format) {
            (S_IFDIR | S_IFLNK | S_IFREG, 1) => {
                let first = union as usize * BLOCK as usize;
                Fields(self.image, first).bytes(size as usize)?.to_vec()
            }
            (S_IFDIR | S_IFLNK | S_IFREG, 5) => {
                let whole = (size / BLOCK * BLOCK) as usize;
                let first = union as usize * BLOCK as usize;
                let mut data = Fields(self.image, first).bytes(whole)?.to_vec();
                let behind = at + 64 + xattr_size;
                let tail = size as usize - whole;
                if tail > 0 && behind / BLOCK as usize != (behind + tail - 1) / BLOCK as usize {
                    return Err(format!("the data behind inode {nid} crosses a block"));
                }
                data.extend_from_slice(Fields(self.image, behind).bytes(tail)?);
                data
            }
            (_, 1) => {
                device = union;
                Vec::new()
            }
            _ => {
                return Err(format!(
                    "inode {nid} has the format {format} and the mode {mode:o}"
                ));
            }
        };
        Ok(Inode {
            found: Found {
                mode,
                uid,
                gid,
                mtime,
                links,
                device,
                data,
                xattrs,
            },
        })
    }
}

/// The entries of a directory: name, inode number and type.
fn directory(data: &[u8]) -> Result<Vec<(Vec<u8>, u64, u8)>, String> {
    let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
    for block in data.chunks(BLOCK as usize) {
        let first = usize::from(Fields(block, 8).u16()?);
        if first == 0 || !first.is_multiple_of(12) {
            return Err(format!("a directory's names begin at {first}"));
        }
        let count = first / 12;
        for at in 0..count {
            let mut fields = Fields(block, at * 12);
            let (nid, start) = (fields.u64()?, usize::from(fields.u16()?));
            let kind = fields.bytes(1)?[0];
            let end = match at + 1 < count {
                true => usize::from(Fields(block, (at + 1) * 12 + 8).u16()?),
                false => {
                    let rest = block.get(start..).ok_or("a name leads outside")?;
                    start
                        + rest
                            .iter()
                            .position(|byte| *byte == 0)
                            .unwrap_or(rest.len())
                }
            };
            let name = block
                .get(start..end)
                .ok_or("a name leads outside")?
                .to_vec();
            if entries.last().is_some_and(|(last, ..)| *last >= name) {
                return Err(format!("the name {name:?} is out of order"));
            }
            entries.push((name, nid, kind));
        }
    }
    Ok(entries)
}

fn check_type(kind: u8, mode: u16) -> Result<(), String> {
    let expected = match mode >> 12 {
        0o10 => 1,
        0o4 => 2,
        0o2 => 3,
        0o6 => 4,
        0o1 => 5,
        0o12 => 7,
        _ => return Err(format!("a file has the mode {mode:o}")),
    };
    if kind == expected {
        Ok(())
    } else {
        Err(format!(
            "an entry of type {kind} is a file of type {expected}"
        ))
    }
}

fn xattrs(mut bytes: &[u8]) -> Result<usize, String> {
    let mut count = 0;
    while !bytes.is_empty() {
        let mut fields = Fields(bytes, 0);
        let (name, index) = (usize::from(fields.bytes(1)?[0]), fields.bytes(1)?[0]);
        let value = usize::from(fields.u16()?);
        if !matches!(index, 1..=4 | 6) {
            return Err(format!("an attribute has the prefix {index}"));
        }
        let length = (4 + name + value).next_multiple_of(4);
        bytes = bytes.get(length..).ok_or("attributes lead outside")?;
        count += 1;
    }
    Ok(count)
}

/// Little-endian fields from an offset on.
struct Fields<'a>(&'a [u8], usize);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.1.checked_add(count);
        let bytes = end.and_then(|end| self.0.get(self.1..end));
        self.1 += count;
        bytes.ok_or_else(|| format!("{count} bytes at {} lead outside", self.1))
    }

    fn number(&mut self, count: usize) -> Result<u64, String> {
        let bytes = self.bytes(count)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn u16(&mut self) -> Result<u16, String> {
        Ok(self.number(2)? as u16)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(self.number(4)? as u32)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.number(8)
    }
}
