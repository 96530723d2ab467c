//! Giving pages of the guest's memory back to the host.

use std::io;

use vm_memory::VolatileSlice;

/// The size of a page.
pub const PAGE: usize = 4096;

/// Whether a slice of guest memory is of whole pages. Regions of guest memory begin at pages, on the host as in the guest, so
/// an address is a page's in both or in neither.
pub fn is_whole_pages(slice: &VolatileSlice<'_>) -> bool {
    let begin = slice.ptr_guard().as_ptr() as usize;
    begin.is_multiple_of(PAGE) && slice.len().is_multiple_of(PAGE)
}

/// Gives whole pages back. What is there when they are touched again is zeroes, or in a clone of a template what the
/// template had there.
///
/// # Errors
/// What the system says.
pub fn discard(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let begin = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the slice is in guest memory, which stays mapped, here and after this: only its content changes. That can change
    // at any time, as everybody who looks at it knows; nobody has a reference to it.
    let done = unsafe { libc::madvise(begin.cast(), slice.len(), libc::MADV_DONTNEED) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
