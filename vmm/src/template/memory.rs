//! A clone's view of its template's memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use crate::vm::memory::HUGE;

/// Parts of the file that are nearer to each other than this are mapped as one.
const GAP: u64 = 256 << 10;

/// Lays a template's memory over a machine's.
///
/// Only what the template has written is mapped from its file, for a hole in a file is filled when it is read, even
/// through a private mapping, and each page of a clone beyond the template's would then be there twice. The rest stays
/// the machine's own.
pub struct Overlay<'a> {
    file: &'a File,
    parts: Vec<Range<u64>>,
}

impl<'a> Overlay<'a> {
    /// Looks where the file, which has `length` bytes, has data.
    ///
    /// # Errors
    /// What the system says; also where the file is not so long.
    pub fn new(file: &'a File, length: u64) -> io::Result<Self> {
        if file.metadata()?.len() != length {
            return Err(io::Error::other(format!("it has not {length} bytes")));
        }
        let mut parts: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        loop {
            let start = match lseek64(file.as_fd(), at, Whence::SeekData) {
                Ok(start) => start,
                Err(Errno::ENXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let end = lseek64(file.as_fd(), start, Whence::SeekHole)?;
            let (start_at, end_at) = (start as u64, end as u64);
            match parts.last_mut() {
                Some(last) if start_at - last.end < GAP => last.end = end_at,
                _ => parts.push(start_at..end_at),
            }
            at = end;
        }
        Ok(Self { file, parts })
    }

    /// Maps the parts over `memory`, whose regions are in the file one after another.
    ///
    /// # Errors
    /// What the system says.
    pub fn lay(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        self.each(memory, |region, offset, part| {
            self.map(region.as_ptr(), offset, part.start, part.end - part.start)
        })
    }

    /// Copies the parts into `memory`, likewise. The file is not needed any more then, and may change.
    ///
    /// # Errors
    /// What the system says.
    pub fn fill(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let mut bytes = vec![0; HUGE];
        self.each(memory, |region, offset, part| {
            for at in part.clone().step_by(HUGE) {
                let bytes = &mut bytes[..HUGE.min((part.end - at) as usize)];
                self.file.read_exact_at(bytes, at)?;
                let to = MemoryRegionAddress(offset + (at - part.start));
                region.write_slice(bytes, to).map_err(io::Error::other)?;
            }
            Ok(())
        })
    }

    /// What is there for each region: where in the region, and where in the file.
    fn each(
        &self,
        memory: &GuestMemoryMmap,
        mut visit: impl FnMut(&GuestRegionMmap, u64, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut begin = 0;
        for region in memory.iter() {
            let end = begin + region.len();
            for part in &self.parts {
                let (from, to) = (part.start.max(begin), part.end.min(end));
                if from < to {
                    visit(region, from - begin, from..to)?;
                }
            }
            begin = end;
        }
        Ok(())
    }

    fn map(&self, region: *mut u8, offset: u64, from: u64, length: u64) -> io::Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is in the region, which is ours and in use by nobody yet: a machine that is being made. Both
        // ends are of whole pages: a file system tells of data in whole pages, and regions are of whole mebibytes.
        let mapped = unsafe {
            libc::mmap(
                region.add(offset as usize).cast(),
                length as usize,
                protection,
                flags,
                self.file.as_raw_fd(),
                from as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn a_clone_sees_the_template_and_changes_only_its_own() {
        let file = tempfile::tempfile().unwrap();
        let length = 8 << 20;
        file.set_len(length).unwrap();
        file.write_all_at(b"low", 4096).unwrap();
        file.write_all_at(b"high", 6 << 20).unwrap();
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 4 << 20)];
        let memory = crate::vm::memory::map(&ranges).unwrap();
        let overlay = Overlay::new(&file, length).unwrap();
        assert_eq!(overlay.parts.len(), 2, "{:?}", overlay.parts);
        overlay.lay(&memory).unwrap();

        let high = GuestAddress((1 << 32) + (2 << 20));
        let read = |at| memory.read_obj::<[u8; 4]>(at).unwrap();
        assert_eq!(&read(GuestAddress(4096)), b"low\0");
        assert_eq!(&read(high), b"high");
        assert_eq!(read(GuestAddress(2 << 20)), [0; 4]);
        memory.write_obj(*b"mine", high).unwrap();
        memory.write_obj(*b"mine", GuestAddress(2 << 20)).unwrap();
        let mut there = [0; 4];
        file.read_exact_at(&mut there, 6 << 20).unwrap();
        assert_eq!(&there, b"high");
        file.read_exact_at(&mut there, 2 << 20).unwrap();
        assert_eq!(there, [0; 4]);
    }

    #[test]
    fn a_restored_machine_has_a_memory_of_its_own() {
        let file = tempfile::tempfile().unwrap();
        let length = 8 << 20;
        file.set_len(length).unwrap();
        // Over the end of a region, and of what is read at a time.
        file.write_all_at(&vec![7; 3 << 20], (2 << 20) + 4096)
            .unwrap();
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 4 << 20)];
        let memory = crate::vm::memory::map(&ranges).unwrap();
        Overlay::new(&file, length).unwrap().fill(&memory).unwrap();
        file.set_len(0).unwrap();

        let read = |at| memory.read_obj::<[u8; 2]>(GuestAddress(at)).unwrap();
        assert_eq!(read((2 << 20) + 4095), [0, 7]);
        assert_eq!(read((4 << 20) - 2), [7, 7]);
        assert_eq!(read(1 << 32), [7, 7]);
        assert_eq!(read((1 << 32) + (1 << 20) + 4095), [7, 0]);
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(Overlay::new(&file, 8192).is_err());
    }
}
