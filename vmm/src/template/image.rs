//! The file with a template's memory.

use std::fs::File;
use std::io;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::vm::memory::{self, HUGE};

const PAGE: usize = 4096;
const ZEROES: [u8; PAGE] = [0; PAGE];
/// So many pages in use make a block worth a huge page: at the most as much again is lost, once for all clones.
const DENSE: usize = HUGE / PAGE / 2;

/// Where a machine's memory goes when it has become a template.
///
/// The machine has memory of its own until then. What is copied is its pages that are not zero, so the file has holes for
/// all that the guest has not used. A block of 2 MiB that is mostly in use becomes a huge page, if the file's system gives
/// such on advice (a tmpfs with `huge=advise`): the kernel's code and tables are never written, so they stay one mapping
/// in each clone, where KVM would be asked for each of 512 pages else.
pub struct Image {
    from: GuestMemoryMmap,
    to: GuestMemoryMmap,
}

impl Image {
    /// Makes the file as long as the memory, and maps it. To be called before the process gives up the right to map files.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(from: &GuestMemoryMmap, file: &File) -> io::Result<Self> {
        let ranges: Vec<_> = from
            .iter()
            .map(|region| (region.start_addr(), region.len() as usize))
            .collect();
        Ok(Self {
            from: from.clone(),
            to: memory::map_file(&ranges, file)?,
        })
    }

    /// Copies the memory of a machine that is parked.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self) -> io::Result<()> {
        blocks(&self.from, |block| self.write_block(block))
    }

    fn write_block(&self, block: &Block<'_>) -> io::Result<()> {
        if block.used().count() >= DENSE {
            self.ask_for_huge_page(block.at, block.bytes.len())?;
        }
        for (offset, page) in block.used() {
            let to = block.at.unchecked_add(offset as u64);
            self.to.write_slice(page, to).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn ask_for_huge_page(&self, at: GuestAddress, size: usize) -> io::Result<()> {
        let block = self.to.get_slice(at, size).map_err(io::Error::other)?;
        // SAFETY: the range is of a mapping of ours, and its content stays what it is.
        let advised = unsafe {
            let at = block.ptr_guard_mut().as_ptr();
            libc::madvise(at.cast(), size, libc::MADV_HUGEPAGE)
        };
        // A kernel without huge pages says EINVAL, and small ones do.
        match advised {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                error => Err(error),
            },
        }
    }
}

/// A part of a machine's memory, at most [`HUGE`] bytes.
pub(super) struct Block<'a> {
    /// Where the guest has it.
    at: GuestAddress,
    /// Where it is when all regions lie one after another.
    pub offset: u64,
    /// What is there.
    bytes: &'a [u8],
}

impl Block<'_> {
    /// The pages that are not zero, each with its place in the block.
    pub fn used(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let pages = self.bytes.chunks(PAGE).enumerate();
        let used = pages.filter(|(_, page)| *page != &ZEROES[..page.len()]);
        used.map(|(number, page)| (number * PAGE, page))
    }

    /// The same, with neighbours in one.
    pub fn runs(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let mut used = self.used().peekable();
        std::iter::from_fn(move || {
            let (start, first) = used.next()?;
            let mut end = start + first.len();
            while let Some((_, page)) = used.next_if(|(next, _)| *next == end) {
                end += page.len();
            }
            Some((start, &self.bytes[start..end]))
        })
    }
}

/// Goes over the memory of a machine that is parked. Each block is read once.
///
/// # Errors
/// What `visit` says, and what of the memory cannot be read.
pub(super) fn blocks(
    memory: &GuestMemoryMmap,
    mut visit: impl FnMut(&Block<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let mut bytes = vec![0; HUGE];
    let mut before = 0;
    for region in memory.iter() {
        let (start, length) = (region.start_addr(), region.len() as usize);
        for offset in (0..length).step_by(HUGE) {
            let bytes = &mut bytes[..HUGE.min(length - offset)];
            let at = start.unchecked_add(offset as u64);
            memory.read_slice(bytes, at).map_err(io::Error::other)?;
            visit(&Block {
                at,
                offset: before + offset as u64,
                bytes,
            })?;
        }
        before += region.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn the_file_has_what_the_machine_has_used_and_holes() {
        let file = tempfile::tempfile().unwrap();
        let ranges = [(GuestAddress(0), 8 << 20), (GuestAddress(1 << 32), 4 << 20)];
        let memory = memory::map(&ranges).unwrap();
        let image = Image::new(&memory, &file).unwrap();
        // Touched, and zero again: not kept.
        memory.write_obj(1_u64, GuestAddress(6 << 20)).unwrap();
        memory.write_obj(0_u64, GuestAddress(6 << 20)).unwrap();
        // A block that is full, and two pages elsewhere.
        memory
            .write_slice(&vec![7; HUGE], GuestAddress(2 << 20))
            .unwrap();
        memory.write_slice(b"low", GuestAddress(4096)).unwrap();
        let high = GuestAddress((1 << 32) + (3 << 20));
        memory.write_slice(b"high", high).unwrap();
        image.write().unwrap();

        assert_eq!(file.metadata().unwrap().len(), 12 << 20);
        let there = |at: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        assert_eq!(&there(4096), b"low\0");
        assert_eq!(there(2 << 20), [7; 4]);
        assert_eq!(there((4 << 20) - 4), [7; 4]);
        assert_eq!(there(6 << 20), [0; 4]);
        assert_eq!(&there((8 << 20) + (3 << 20)), b"high");
        let kept = file.metadata().unwrap().blocks() * 512;
        assert!(kept < 4 << 20, "{kept} bytes for 2 MiB and two pages");
    }
}
