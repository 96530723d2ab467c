//! The buffers of a descriptor chain: slices of guest memory, read and written front to back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most slices that the system takes in one call (`IOV_MAX`).
const MAX_SLICES: usize = 1024;

/// Slices of guest memory in the order of their chain. Reading and writing consumes them from the front.
///
/// The guest can change the bytes at any time, so what is decided upon is copied out once; the addresses and
/// lengths are ours.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Adds a slice at the end.
    pub fn push_back(&mut self, slice: VolatileSlice<'m>) {
        // At most 2^16 slices of at most 2^32 bytes: no overflow.
        self.len += slice.len();
        self.slices.push_back(slice);
    }

    /// Adds all slices of another at the end.
    pub fn append(&mut self, mut other: Self) {
        self.len += other.len;
        self.slices.append(&mut other.slices);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slices that are left, in order; some may be empty.
    pub fn slices(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.slices.iter()
    }

    /// Copies bytes out, as many as there are and `into` takes, and consumes them.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let Some(slice) = self.front(into.len() - done) else {
                break;
            };
            done += slice.copy_to(&mut into[done..]);
        }
        done
    }

    /// Copies exactly `N` bytes out and consumes them; `None`, and nothing consumed, where there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        let mut bytes = [0; N];
        self.read(&mut bytes);
        Some(bytes)
    }

    /// Copies bytes in, as many as there is room for, and consumes the room.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        while done < from.len() {
            let Some(slice) = self.front(from.len() - done) else {
                break;
            };
            let n = slice.len();
            slice.copy_from(&from[done..done + n]);
            done += n;
        }
        done
    }

    /// Splits the first `count` bytes off; `None`, and nothing consumed, where there are fewer.
    pub fn split_front(&mut self, count: usize) -> Option<Self> {
        if self.len < count {
            return None;
        }
        let mut front = Self::default();
        while front.len < count {
            front.push_back(self.front(count - front.len)?);
        }
        Some(front)
    }

    /// Consumes `count` bytes, or all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        let count = count.min(self.len);
        let _ = self.split_front(count);
    }

    /// Takes the first slice, at most `limit` bytes of it. Empty slices are dropped.
    fn front(&mut self, limit: usize) -> Option<VolatileSlice<'m>> {
        loop {
            let slice = self.slices.pop_front()?;
            if slice.is_empty() {
                continue;
            }
            let n = slice.len().min(limit);
            // Both parts lie within the slice, so neither call fails; a slice that did would be lost, no more.
            let (taken, rest) = (slice.subslice(0, n).ok()?, slice.offset(n).ok()?);
            if !rest.is_empty() {
                self.slices.push_front(rest);
            }
            self.len -= n;
            return Some(taken);
        }
    }

    /// Fills all from a file at this byte offset; nothing is consumed.
    ///
    /// # Errors
    /// What `preadv` says; `UnexpectedEof` where the file ends first.
    pub fn fill_from(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |vectors, offset| {
            // SAFETY: the vectors point into guest memory, which is mapped for 'm, longer than this call. What
            // the kernel writes there is what a device is for: the guest sees such memory as volatile.
            unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count(vectors), offset) }
        })
    }

    /// Writes all to a file at this byte offset; nothing is consumed.
    ///
    /// # Errors
    /// What `pwritev` says; `WriteZero` where it takes nothing.
    pub fn drain_to(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::WriteZero, |vectors, offset| {
            // SAFETY: the vectors point into guest memory, which is mapped for 'm, longer than this call; the
            // kernel only reads it.
            unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count(vectors), offset) }
        })
    }

    /// Writes all in one call, as a datagram or frame; nothing is consumed.
    ///
    /// # Errors
    /// What `writev` says; `InvalidInput` where there are more slices than it takes.
    pub fn send(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        if self.slices.len() > MAX_SLICES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let vectors = self.vectors();
        // SAFETY: the vectors point into guest memory, which is mapped for 'm, longer than this call; the
        // kernel only reads it.
        let n = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Reads once, as much as there is and fits; nothing is consumed.
    ///
    /// # Errors
    /// What `readv` says.
    pub fn receive(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        // SAFETY: the vectors point into guest memory, which is mapped for 'm, longer than this call. What
        // the kernel writes there is what a device is for: the guest sees such memory as volatile.
        let n = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn transfer(
        &self,
        mut offset: u64,
        ended: io::ErrorKind,
        call: impl Fn(&[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let mut rest = self.clone();
        while !rest.is_empty() {
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let n = match usize::try_from(call(&rest.vectors(), at)) {
                Ok(0) => return Err(ended.into()),
                Ok(n) => n,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            };
            rest.skip(n);
            offset += n as u64;
        }
        Ok(())
    }

    /// At most [`MAX_SLICES`] vectors. They are good for as long as the slices are.
    fn vectors(&self) -> Vec<libc::iovec> {
        self.slices
            .iter()
            .take(MAX_SLICES)
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}

/// The length as the system's calls want it; there are at most [`MAX_SLICES`].
fn count(vectors: &[libc::iovec]) -> libc::c_int {
    vectors.len() as libc::c_int
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    fn buffers<'m>(parts: &'m mut [Vec<u8>]) -> Buffers<'m> {
        let mut all = Buffers::default();
        for part in parts {
            all.push_back(VolatileSlice::from(part.as_mut_slice()));
        }
        all
    }

    #[test]
    fn bytes_cross_slices() {
        let mut parts = [b"ab".to_vec(), vec![], b"cdef".to_vec()];
        let mut b = buffers(&mut parts);
        assert_eq!(b.read_array::<3>(), Some(*b"abc"));
        assert_eq!(b.len(), 3);
        assert_eq!(b.read_array::<4>(), None);
        let front = b.split_front(1).unwrap();
        assert_eq!((front.len(), b.len()), (1, 2));
        assert!(b.split_front(3).is_none());
        assert_eq!(b.write(b"xyz"), 2);
        assert!(b.is_empty());
        assert_eq!(parts[2], b"cdxy");
    }

    #[test]
    fn files_fill_and_drain() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut parts = [vec![0; 3], vec![0; 4]];
        buffers(&mut parts).fill_from(file.as_fd(), 2).unwrap();
        assert_eq!(
            (parts[0].as_slice(), parts[1].as_slice()),
            (&b"234"[..], &b"5678"[..])
        );
        buffers(&mut parts).drain_to(file.as_fd(), 0).unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "2345678789");
        let short = buffers(&mut parts).fill_from(file.as_fd(), 5).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
        assert!(
            buffers(&mut parts)
                .fill_from(file.as_fd(), u64::MAX)
                .is_err()
        );
    }

    #[test]
    fn more_slices_than_one_call_takes() {
        let file = tempfile::tempfile().unwrap();
        let mut parts = vec![vec![7]; MAX_SLICES + 9];
        buffers(&mut parts).drain_to(file.as_fd(), 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), MAX_SLICES as u64 + 9);
    }
}
