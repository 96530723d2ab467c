//! The structures on disk (kernel, `fs/erofs/erofs_fs.h`), little endian.

use std::io;

/// Bytes of an extended inode.
pub(super) const INODE: usize = 64;
/// Inode numbers count units of this many bytes.
pub(super) const SLOT: u64 = 32;
/// Bytes of a directory entry without its name.
pub(super) const DIRENT: usize = 12;
/// Where the superblock is.
pub(super) const SUPERBLOCK_OFFSET: usize = 1024;
/// Bytes of the header before inline extended attributes.
const XATTR_HEADER: usize = 12;
/// Most bytes of a value: the kernel's XATTR_SIZE_MAX, less one for the 16-bit field.
pub(super) const MAX_XATTR_VALUE: usize = 65_535;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// In blocks of its own.
    Plain,
    /// Its last part (or all of it) behind the inode.
    Inline,
}

/// What of an extended inode varies.
pub(super) struct Inode {
    pub layout: Layout,
    /// Bytes of its extended attributes, with their header; 0 if it has none.
    pub xattr_size: usize,
    /// Type and permissions, as in `st_mode`.
    pub mode: u16,
    pub size: u64,
    /// First block, or device number.
    pub union: u32,
    /// Number for `stat` on 32-bit systems.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
}

impl Inode {
    pub(super) fn encode(&self) -> [u8; INODE] {
        let layout: u16 = match self.layout {
            Layout::Plain => 0,
            Layout::Inline => 2,
        };
        let xattr_count = match self.xattr_size {
            0 => 0,
            size => (1 + (size - XATTR_HEADER) / 4) as u16,
        };
        let mut bytes = [0; INODE];
        let mut put = Put(&mut bytes, 0);
        // Bit 0: an extended inode. Bits 1 to 3: the layout.
        put.bytes(&(1 | layout << 1).to_le_bytes());
        put.bytes(&xattr_count.to_le_bytes());
        put.bytes(&self.mode.to_le_bytes());
        put.bytes(&[0; 2]);
        put.bytes(&self.size.to_le_bytes());
        put.bytes(&self.union.to_le_bytes());
        put.bytes(&self.ino.to_le_bytes());
        put.bytes(&self.uid.to_le_bytes());
        put.bytes(&self.gid.to_le_bytes());
        put.bytes(&self.mtime.to_le_bytes());
        put.bytes(&self.mtime_nsec.to_le_bytes());
        put.bytes(&self.nlink.to_le_bytes());
        bytes
    }
}

/// The superblock's block: the superblock itself, with its checksum, and zeros around it.
pub(super) fn superblock(root_nid: u16, inodes: u64, blocks: u32, meta_block: u32) -> [u8; 4096] {
    let mut block = [0; 4096];
    let mut put = Put(&mut block, SUPERBLOCK_OFFSET);
    put.bytes(&MAGIC.to_le_bytes());
    put.bytes(&[0; 4]); // checksum, below
    put.bytes(&(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put.bytes(&[12, 0]); // block size 2^12, no extension slots
    put.bytes(&root_nid.to_le_bytes());
    put.bytes(&inodes.to_le_bytes());
    put.bytes(&[0; 12]); // build time: none, for the same bytes each time
    put.bytes(&blocks.to_le_bytes());
    put.bytes(&meta_block.to_le_bytes());
    // Shared attributes, UUID, name, incompatible features and everything newer: none.
    let checksum = crc32c(&block[SUPERBLOCK_OFFSET..]);
    Put(&mut block, SUPERBLOCK_OFFSET + 4).bytes(&checksum.to_le_bytes());
    block
}

/// The kernel's `crc32c(~0, …)`: without the final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    })
}

/// A device number as the kernel's `new_encode_dev`: 12 bits of major, 20 of minor.
pub(super) fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// Splits a full attribute name into EROFS's prefix number and the rest; `None` for a name space that Linux's
/// EROFS cannot hold.
pub(super) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
        .into_iter()
        .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
        .filter(|(_, rest)| !rest.is_empty() && rest.len() <= 255 && !rest.contains(&0))
}

/// Attributes as they stand behind an inode. Those that [`xattr_prefix`] refuses are an error: the caller sorts
/// them out before.
pub(super) fn xattrs<'a>(list: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (name, value) in list {
        let (index, rest) = xattr_prefix(name)
            .filter(|_| value.len() <= MAX_XATTR_VALUE)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "an extended attribute does not fit EROFS",
                )
            })?;
        if bytes.is_empty() {
            bytes.resize(XATTR_HEADER, 0);
        }
        bytes.extend([rest.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    if bytes.len() > XATTR_HEADER + 4 * (usize::from(u16::MAX) - 1) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a file has more extended attributes than fit EROFS",
        ));
    }
    Ok(bytes)
}

/// Writes fields one after the other.
struct Put<'a>(&'a mut [u8], usize);

impl Put<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_the_known_one() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_numbers() {
        assert_eq!(device(8, 1), 0x801);
        assert_eq!(device(0xfff, 0xf_ffff), 0xffff_ffff);
    }

    #[test]
    fn attributes() {
        let list = [(&b"user.a"[..], &b"12345"[..])];
        let bytes = xattrs(list.into_iter()).unwrap();
        assert_eq!(bytes.len(), 12 + 12);
        assert_eq!(&bytes[12..], b"\x01\x01\x05\x00a12345\0\0");
        assert!(xattr_prefix(b"user.").is_none());
        assert!(xattr_prefix(b"com.apple.x").is_none());
    }
}
