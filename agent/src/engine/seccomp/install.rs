//! Handing a filter to the kernel.

use std::io;

use nix::errno::Errno;

use super::Filter;

/// Installs a filter on the calling process, for good.
///
/// # Errors
/// EACCES without CAP_SYS_ADMIN and without no_new_privs; EINVAL for a filter the kernel does not take.
pub(crate) fn install(filter: &Filter) -> io::Result<()> {
    let mut code: Vec<libc::sock_filter> = filter
        .instructions
        .iter()
        .map(|packed| libc::sock_filter {
            code: (packed >> 48) as u16,
            jt: (packed >> 40) as u8,
            jf: (packed >> 32) as u8,
            k: *packed as u32,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: `program` points at `code`, of that length, and both outlive the call, which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &raw const program,
        )
    };
    Errno::result(result)?;
    Ok(())
}
