//! The guest's memory, laid out so that the host can give it in huge pages.
//!
//! KVM maps 2 MiB at once only where an address of the guest and ours agree in their low 21 bits, and the system places
//! a mapping at any page. Whether there are huge pages is the host's policy (transparent_hugepage): with them a guest's
//! first touch of its memory costs one fault in place of 512, and each miss of the TLB a shorter walk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// A huge page of x86-64, in bytes.
pub const HUGE: usize = 2 << 20;

/// Maps ranges of guest-physical addresses: private, anonymous and without reservation, so that the pod's cgroup accounts
/// for pages when they are touched. The mapping is for the life of the process.
///
/// # Errors
/// What the system says.
pub fn map(ranges: &[(GuestAddress, usize)]) -> io::Result<GuestMemoryMmap> {
    regions(ranges, |size, _| aligned(size))
}

/// Maps ranges to a file that is made as long as all of them, one after another: what is written there is in the file.
///
/// # Errors
/// What the system says.
pub fn map_file(ranges: &[(GuestAddress, usize)], file: &File) -> io::Result<GuestMemoryMmap> {
    let length: usize = ranges.iter().map(|(_, size)| size).sum();
    file.set_len(length as u64)?;
    regions(ranges, |size, offset| shared(size, offset, file))
}

fn regions(
    ranges: &[(GuestAddress, usize)],
    map: impl Fn(usize, usize) -> io::Result<MmapRegion>,
) -> io::Result<GuestMemoryMmap> {
    let mut offset = 0;
    let regions = ranges
        .iter()
        .map(|&(start, size)| {
            let region = map(size, offset)?;
            offset += size;
            GuestRegionMmap::new(region, start)
                .ok_or_else(|| io::Error::other("the range is beyond all addresses"))
        })
        .collect::<io::Result<Vec<_>>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}

fn shared(size: usize, offset: usize, file: &File) -> io::Result<MmapRegion> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
    // SAFETY: a new mapping at an address of the system's choice; no memory in use is touched.
    let begin = unsafe { libc::mmap(ptr::null_mut(), size, protection, flags, fd, offset) };
    if begin == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has this size, and is never unmapped: the region does not own it, and nobody else knows it.
    unsafe { MmapRegion::build_raw(begin.cast(), size, protection, flags) }
        .map_err(io::Error::other)
}

fn aligned(size: usize) -> io::Result<MmapRegion> {
    let room = size.checked_add(HUGE).ok_or(io::ErrorKind::InvalidInput)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the system's choice; no memory in use is touched.
    let begin = unsafe { libc::mmap(ptr::null_mut(), room, protection, flags, -1, 0) };
    if begin == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = begin.align_offset(HUGE);
    // SAFETY: `before` is less than a huge page, so `size` bytes from there on are in the mapping, and so is what is
    // unmapped before and after them, of which nobody has a pointer.
    unsafe {
        let start = begin.cast::<u8>().add(before);
        let end = start.add(size);
        let unmapped = [(begin, before), (end.cast(), HUGE - before)];
        for (part, length) in unmapped.into_iter().filter(|(_, length)| *length > 0) {
            if libc::munmap(part, length) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // It is never unmapped: the region does not own it, and nobody else knows it.
        MmapRegion::build_raw(start, size, protection, flags).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion};

    #[test]
    fn regions_begin_at_huge_pages() {
        let ranges = [
            (GuestAddress(0), 3 << 20),
            (GuestAddress(4 << 30), (1 << 20) + 4096),
        ];
        let memory = map(&ranges).unwrap();
        for (region, (start, size)) in memory.iter().zip(ranges) {
            assert_eq!(region.as_ptr() as usize % HUGE, 0);
            assert_eq!((region.start_addr(), region.len()), (start, size as u64));
            let last = GuestAddress(start.0 + size as u64 - 8);
            memory.write_obj(0x1234_5678_u64, last).unwrap();
            assert_eq!(memory.read_obj::<u64>(last).unwrap(), 0x1234_5678);
        }
        assert!(map(&[(GuestAddress(0), usize::MAX)]).is_err());
    }
}
