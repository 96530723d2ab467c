//! What is behind a block device: a raw image, or image layers.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use super::super::buffers::Buffers;
use super::SECTOR;
use super::layers::{self, Layers};

/// Zeroes written at a time where the host cannot zero a range itself.
const ZEROES: usize = 64 * 1024;

/// Why a descriptor cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It is a directory, a pipe or the like.
    #[error("the disk \"{serial}\" is neither a regular file nor a block device: give one that is")]
    NotADisk {
        /// The disk's serial.
        serial: String,
    },
    /// It has not one sector.
    #[error("the disk \"{serial}\" is smaller than a sector of 512 bytes: give a larger one")]
    Empty {
        /// The disk's serial.
        serial: String,
    },
    /// It is not open for what it is wanted for.
    #[error("the disk \"{serial}\" is not open for {wanted}: open it so, or state it read-only")]
    NotOpenFor {
        /// The disk's serial.
        serial: String,
        /// "reading" or "writing".
        wanted: &'static str,
    },
    /// The serial cannot be told to the guest.
    #[error("a disk's serial must have 1 to 20 printable ASCII characters, and {serial:?} has not")]
    Serial {
        /// The serial.
        serial: String,
    },
    /// The system cannot say what it is.
    #[error("the disk \"{serial}\" cannot be examined: {source}")]
    Examine {
        /// The disk's serial.
        serial: String,
        /// What the system said.
        source: io::Error,
    },
}

enum Backing {
    /// A raw image.
    Image(File),
    Layers(Arc<Layers>),
}

/// A disk; a raw image is bounded to the size it had at the start.
pub struct Disk {
    backing: Backing,
    sectors: u64,
    serial: [u8; 20],
    read_only: bool,
}

impl Disk {
    /// Checks what the descriptor is, and takes it.
    pub fn new(file: OwnedFd, serial: &str, read_only: bool) -> Result<Self, DiskError> {
        let named = || serial.to_owned();
        let padded = pad(serial)?;
        let mut file = File::from(file);
        let examine = |source| DiskError::Examine {
            serial: named(),
            source,
        };
        let kind = file.metadata().map_err(examine)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { serial: named() });
        }
        // SAFETY: F_GETFL takes no argument and touches no memory of ours.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(examine(io::Error::last_os_error()));
        }
        let mode = flags & libc::O_ACCMODE;
        let lacking = if flags & libc::O_PATH != 0 || mode == libc::O_WRONLY {
            Some("reading")
        } else if !read_only && mode != libc::O_RDWR {
            Some("writing")
        } else {
            None
        };
        if let Some(wanted) = lacking {
            return Err(DiskError::NotOpenFor {
                serial: named(),
                wanted,
            });
        }
        // The end, not the metadata's size, which is 0 for a block device.
        let sectors = file.seek(SeekFrom::End(0)).map_err(examine)? / SECTOR;
        if sectors == 0 {
            return Err(DiskError::Empty { serial: named() });
        }
        Ok(Self {
            backing: Backing::Image(file),
            sectors,
            serial: padded,
            read_only,
        })
    }

    /// A disk of layers.
    pub fn of_layers(layers: Arc<Layers>, serial: &str) -> Result<Self, DiskError> {
        Ok(Self {
            backing: Backing::Layers(layers),
            sectors: layers::CAPACITY / SECTOR,
            serial: pad(serial)?,
            read_only: true,
        })
    }

    /// The capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The serial, padded with zeroes.
    pub fn serial(&self) -> &[u8; 20] {
        &self.serial
    }

    /// Whether writes must be refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The byte offset of `sector` if `bytes`, a whole number of sectors, from there on are on the disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// Reads into guest memory.
    pub fn read(&self, offset: u64, into: &Buffers<'_>) -> io::Result<()> {
        match &self.backing {
            Backing::Image(file) => into.fill_from(file.as_fd(), offset),
            Backing::Layers(layers) => layers.read(offset, into),
        }
    }

    /// Writes from guest memory.
    pub fn write(&self, offset: u64, from: &Buffers<'_>) -> io::Result<()> {
        from.drain_to(self.image()?.as_fd(), offset)
    }

    /// Makes what was written last.
    pub fn flush(&self) -> io::Result<()> {
        match &self.backing {
            Backing::Image(file) => file.sync_data(),
            Backing::Layers(_) => Ok(()),
        }
    }

    /// Gives the range's storage back. Its content is undefined afterwards, so a host file system that cannot
    /// do it has nothing to do.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, bytes) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            done => done,
        }
    }

    /// Makes the range read as zeroes, and gives its storage back if `unmap`.
    pub fn zero(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        match self.allocate(mode, offset, bytes) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.write_zeroes(offset, bytes)
            }
            done => done,
        }
    }

    /// What can be written.
    fn image(&self) -> io::Result<&File> {
        match &self.backing {
            Backing::Image(file) => Ok(file),
            Backing::Layers(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let signed = |n: u64| i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
        let (offset, bytes) = (signed(offset)?, signed(bytes)?);
        let image = self.image()?;
        // SAFETY: the call takes numbers only.
        let result = unsafe {
            libc::fallocate(
                image.as_raw_fd(),
                mode | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                bytes,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn write_zeroes(&self, mut offset: u64, mut bytes: u64) -> io::Result<()> {
        let zeroes = vec![0; ZEROES];
        while bytes > 0 {
            let n = usize::try_from(bytes).map_or(ZEROES, |n| n.min(ZEROES));
            self.image()?.write_all_at(&zeroes[..n], offset)?;
            offset += n as u64;
            bytes -= n as u64;
        }
        Ok(())
    }
}

fn pad(serial: &str) -> Result<[u8; 20], DiskError> {
    if serial.is_empty() || serial.len() > 20 || !serial.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(DiskError::Serial {
            serial: serial.to_owned(),
        });
    }
    let mut padded = [0; 20];
    padded[..serial.len()].copy_from_slice(serial.as_bytes());
    Ok(padded)
}
