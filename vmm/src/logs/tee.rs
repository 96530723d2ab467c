//! Copies of a stream for clients that are attached to it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How often a writer that waits for a slow reader looks whether the log is still wanted, in milliseconds.
const LOOK_UP: u16 = 500;
/// The most clients that are attached to a stream.
const MAX_TEES: usize = 64;

/// Clients that were attached since the stream's last bytes. Never held while a client is waited for.
#[derive(Default)]
pub struct Arrivals(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    fds: Vec<File>,
    ended: bool,
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches a client. After the stream's end its descriptor is closed at once: it sees the end.
    ///
    /// # Errors
    /// What the system says when it cannot make the descriptor non-blocking; `QuotaExceeded` where more clients
    /// wait than a stream can have.
    pub fn add(&self, fd: OwnedFd) -> io::Result<()> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let mut waiting = self.lock();
        if waiting.ended {
            return Ok(());
        }
        if waiting.fds.len() >= MAX_TEES {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        waiting.fds.push(fd.into());
        Ok(())
    }

    /// The stream has ended: closes what waits and what comes.
    pub fn end(&self) {
        let mut waiting = self.lock();
        waiting.ended = true;
        waiting.fds.clear();
    }
}

/// The clients of a stream, in the hands of its thread.
#[derive(Default)]
pub struct Tees(Vec<File>);

impl Tees {
    /// Copies bytes to all clients, waiting for slow ones while the log is wanted. Drops those that are gone.
    pub fn write(&mut self, bytes: &[u8], arrivals: &Arrivals, unwanted: &AtomicBool) {
        self.0.append(&mut arrivals.lock().fds);
        self.0.truncate(MAX_TEES);
        self.0.retain_mut(|fd| copy(fd, bytes, unwanted).is_ok());
    }
}

fn copy(file: &mut File, mut bytes: &[u8], unwanted: &AtomicBool) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if unwanted.load(Ordering::Relaxed) {
                    return Err(e);
                }
                let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut fds, PollTimeout::from(LOOK_UP)) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
