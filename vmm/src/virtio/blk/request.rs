//! One request of the block device (virtio 1.2 §5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::super::DeviceError;
use super::super::buffers::Buffers;
use super::super::queue::Chain;
use super::disk::Disk;
use super::{DEVICE, MOST_DISCARDED, MOST_RANGES, MOST_ZEROED, SECTOR};

/// Why a request failed, as its status tells the driver.
#[derive(Debug)]
enum Failure {
    /// `VIRTIO_BLK_S_IOERR`: the request or the host is at fault.
    Io,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        // Whatever the host's trouble (ENOSPC and EIO are the usual ones), a status byte is all there is to
        // say it with.
        Self::Io
    }
}

/// Serves a request and writes its status; returns how many bytes were written to the chain.
///
/// # Errors
/// [`DeviceError::Guest`] where there is no room for the status: nothing can be told to such a driver.
pub fn serve(disk: &Disk, chain: Chain<'_>) -> Result<u32, DeviceError> {
    let Chain {
        mut readable,
        writable: mut status,
        ..
    } = chain;
    let room = status.len().checked_sub(1);
    let Some(data) = room.and_then(|n| status.split_front(n)) else {
        return Err(DeviceError::Guest {
            device: DEVICE,
            what: "a request has no room for its status".into(),
        });
    };
    let (code, written) = match execute(disk, &mut readable, &data) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    status.write(&[code as u8]);
    // The status is behind the data: a failed request counts as one that wrote nothing else.
    Ok(u32::try_from(written).unwrap_or(u32::MAX - 1) + 1)
}

/// Does what the request says; returns how many bytes of data were written to `data`.
fn execute(disk: &Disk, readable: &mut Buffers<'_>, data: &Buffers<'_>) -> Result<usize, Failure> {
    // Copied out once: the guest may change it while we act on it.
    let header: [u8; 16] = readable.read_array().ok_or(Failure::Io)?;
    let (kind, sector) = (le32(&header, 0), le64(&header, 8));
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = range(disk, sector, data.len())?;
            disk.read(offset, data)?;
            Ok(data.len())
        }
        VIRTIO_BLK_T_OUT => {
            writable(disk)?;
            let offset = range(disk, sector, readable.len())?;
            disk.write(offset, readable)?;
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            disk.flush()?;
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => Ok(data.clone().write(disk.serial())),
        VIRTIO_BLK_T_DISCARD => {
            writable(disk)?;
            for (offset, bytes, flags) in ranges(disk, readable, MOST_DISCARDED)? {
                if flags != 0 {
                    return Err(Failure::Unsupported);
                }
                disk.discard(offset, bytes)?;
            }
            Ok(0)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            writable(disk)?;
            for (offset, bytes, flags) in ranges(disk, readable, MOST_ZEROED)? {
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Failure::Unsupported);
                }
                disk.zero(offset, bytes, flags != 0)?;
            }
            Ok(0)
        }
        _ => Err(Failure::Unsupported),
    }
}

fn writable(disk: &Disk) -> Result<(), Failure> {
    if disk.read_only() {
        Err(Failure::Io)
    } else {
        Ok(())
    }
}

fn range(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Failure> {
    disk.range(sector, bytes as u64).ok_or(Failure::Io)
}

/// The ranges of a discard or write-zeroes (`struct virtio_blk_discard_write_zeroes`): byte offset, bytes and
/// flags of each, all checked before the first is acted upon.
fn ranges(
    disk: &Disk,
    readable: &mut Buffers<'_>,
    most_sectors: u32,
) -> Result<Vec<(u64, u64, u32)>, Failure> {
    let count = readable.len() / 16;
    if count == 0 || count > MOST_RANGES as usize || !readable.len().is_multiple_of(16) {
        return Err(Failure::Io);
    }
    let mut all = Vec::with_capacity(count);
    while let Some(range) = readable.read_array::<16>() {
        let (sector, sectors, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
        if sectors > most_sectors {
            return Err(Failure::Io);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let offset = disk.range(sector, bytes).ok_or(Failure::Io)?;
        all.push((offset, bytes, flags));
    }
    Ok(all)
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
