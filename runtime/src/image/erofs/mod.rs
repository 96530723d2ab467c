//! EROFS images, written directly from a stream.
//!
//! The image is made in one pass: file data goes to the image as it comes ([`data`]), names and attributes are kept in
//! a [`tree::Tree`], and at the end the directories, the inodes and the superblock follow ([`image`]). No tree is ever
//! unpacked on the host, so that there is no path to escape through. The same input gives the same bytes.
//!
//! ```text
//! block 0     superblock, at byte 1024
//! block 1…    file data, in the order in which it came, each file at a block of its own
//! then        whole blocks of directories
//! then        inodes (64 bytes), each with its extended attributes and its short data
//! ```
//!
//! The format is that of the kernel's `fs/erofs/erofs_fs.h`, without compression: extended inodes, the layouts "flat
//! plain" and "flat inline", inline extended attributes, blocks of 4,096 bytes. Linux 5.4 and newer reads it.

pub(crate) mod data;
mod format;
pub(crate) mod image;
#[cfg(any(test, fuzzing))]
pub(crate) mod reader;
pub(crate) mod tree;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Files up to this size are kept with their inode; larger ones get blocks of their own. It is small, so that inodes are
/// close together: a guest reads all of them ahead, and who walks through the names needs nothing else.
pub(crate) const MAX_INLINE: u64 = 512;
