//! fs-verity (the kernel's Documentation/filesystems/fsverity.rst): a file is closed for ever, the kernel keeps a tree of
//! hashes beside its data, and checks each block that is read against it. The digest of the tree's root says which content
//! the file has, at no cost that grows with its size.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use redb::ReadableDatabase;

use super::digest::{DiffId, Digest};
use super::error::ImageError;
use super::store::{SEALS, Store};

// Of linux/fsverity.h.
const FS_IOC_ENABLE_VERITY: libc::Ioctl = 0x4080_6685;
const FS_IOC_MEASURE_VERITY: libc::Ioctl = 0xc004_6686;
const FS_VERITY_HASH_ALG_SHA256: u16 = 1;
const BLOCK: u32 = 4096;

/// Bytes of a SHA-256 digest.
const DIGEST: usize = 32;

/// The digest of a file that has fs-verity.
type Seal = [u8; DIGEST];

/// `struct fsverity_enable_arg`.
#[repr(C)]
struct Enable {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt: u64,
    signature_size: u32,
    reserved: u32,
    signature: u64,
    reserved_too: [u64; 11],
}

/// `struct fsverity_digest` with room for the digest.
#[repr(C)]
struct Measured {
    algorithm: u16,
    size: u16,
    digest: Seal,
}

/// Closes a file, which nobody may have open for writing. Reads all of it, once.
///
/// # Errors
/// What the system says; `Unsupported` where the file system has no fs-verity.
fn seal(path: &Path) -> io::Result<Seal> {
    let file = File::open(path)?;
    let argument = Enable {
        version: 1,
        hash_algorithm: FS_VERITY_HASH_ALG_SHA256.into(),
        block_size: BLOCK,
        salt_size: 0,
        salt: 0,
        signature_size: 0,
        reserved: 0,
        signature: 0,
        reserved_too: [0; 11],
    };
    // SAFETY: the request reads one struct fsverity_enable_arg, which Enable is laid out as, and neither salt nor signature.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_ENABLE_VERITY, &raw const argument) };
    match Errno::result(result) {
        Ok(_) => {}
        Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => return Err(io::ErrorKind::Unsupported.into()),
        Err(error) => return Err(error.into()),
    }
    measure(path)?
        .ok_or_else(|| io::Error::other("the file has no seal right after it was given one"))
}

/// The digest of a file; `None` if it has no fs-verity.
///
/// # Errors
/// What the system says.
fn measure(path: &Path) -> io::Result<Option<Seal>> {
    let file = File::open(path)?;
    let mut measured = Measured {
        algorithm: 0,
        size: DIGEST as u16,
        digest: [0; DIGEST],
    };
    // SAFETY: the request writes one struct fsverity_digest and at most `size` bytes behind its two fields, which
    // Measured has.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_MEASURE_VERITY, &raw mut measured) };
    match Errno::result(result) {
        Ok(_) => {}
        // Another algorithm's digest may be too long.
        Err(Errno::ENODATA | Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::EOVERFLOW) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    }
    let ours =
        measured.algorithm == FS_VERITY_HASH_ALG_SHA256 && usize::from(measured.size) == DIGEST;
    Ok(ours.then_some(measured.digest))
}

impl Store {
    /// Whether the layer is complete here and, with fs-verity, what it was when it was stored.
    pub(super) fn has_usable_layer(&self, layer: &DiffId) -> Result<bool, ImageError> {
        if !self.has_layer(layer) {
            return Ok(false);
        }
        match self.check_seals(std::slice::from_ref(layer)) {
            Err(ImageError::Changed { .. }) => Ok(false),
            checked => checked.map(|()| true),
        }
    }

    /// Checks that layers are what they were when they were stored, where they have fs-verity.
    pub(super) fn check_seals(&self, layers: &[DiffId]) -> Result<(), ImageError> {
        for layer in layers.iter().filter(|_| self.verity) {
            let path = self.layer_path(layer);
            let found = measure(&path)
                .map_err(|error| ImageError::disk("read the fs-verity digest of", &path, error))?;
            let known = self.sealed_as(layer)?;
            let reason = match (known, found) {
                (Some(known), Some(found)) if known == found => continue,
                (None, _) => "it was stored before images.verity was set",
                (Some(_), None) => "it has lost its fs-verity, so it was replaced",
                (Some(_), Some(_)) => "its fs-verity digest is another one, so it was replaced",
            };
            return Err(ImageError::Changed { path, reason });
        }
        Ok(())
    }

    fn sealed_as(&self, layer: &DiffId) -> Result<Option<Seal>, ImageError> {
        self.with(|database| {
            let transaction = self.db(database.begin_read())?;
            let table = self.db(transaction.open_table(SEALS))?;
            let known = self.db(table.get(layer.hex().as_str()))?;
            Ok(known.and_then(|known| known.value().try_into().ok()))
        })
    }

    /// Gives a complete layer fs-verity, and remembers its digest.
    pub(super) fn seal(&self, layer: &DiffId, image: &Path) -> Result<(), ImageError> {
        let seal = seal(image).map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => ImageError::unsupported(
                format!("fs-verity on the disk that holds {}", self.root().display()),
                "its file system has none; use `tune2fs -O verity` on ext4, or set images.verity = false",
            ),
            _ => ImageError::disk("give fs-verity to", image, error),
        })?;
        self.with(|database| {
            let transaction = self.db(database.begin_write())?;
            {
                let mut table = self.db(transaction.open_table(SEALS))?;
                self.db(table.insert(layer.hex().as_str(), seal.as_slice()))?;
            }
            self.db(transaction.commit())
        })
    }

    /// Forgets the digests of layers that are gone.
    pub(super) fn forget_seals(&self, gone: &[Digest]) -> Result<(), ImageError> {
        if gone.is_empty() {
            return Ok(());
        }
        self.with(|database| {
            let transaction = self.db(database.begin_write())?;
            {
                let mut table = self.db(transaction.open_table(SEALS))?;
                for layer in gone {
                    self.db(table.remove(layer.hex().as_str()))?;
                }
            }
            self.db(transaction.commit())
        })
    }
}
