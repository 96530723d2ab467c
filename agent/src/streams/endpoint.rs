//! The agent's end of one standard stream: a pipe, or the master of a terminal.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedMutexGuard, watch};

/// What moves between a stream and its client at once.
pub const CHUNK: usize = 64 * 1024;

/// How long a client that the other side has left may take to let go of the stream.
const HANDOVER: Duration = Duration::from_secs(2);

/// Which standard stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the client to the process.
    Stdin,
    /// From the process to the client.
    Stdout,
    /// From the process to the client.
    Stderr,
    /// Both ways: the process has a terminal.
    Tty,
}

impl Kind {
    /// Parses the name used in a stream's header line.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "stdin" => Self::Stdin,
            "stdout" => Self::Stdout,
            "stderr" => Self::Stderr,
            "tty" => Self::Tty,
            _ => return None,
        })
    }

    /// The name used in a stream's header line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Tty => "tty",
        }
    }
}

/// Bytes taken from one side and not yet given to the other.
#[derive(Default)]
pub struct Pending {
    bytes: Vec<u8>,
    start: usize,
}

impl Pending {
    /// The bytes to deliver next.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Forgets `count` delivered bytes.
    pub fn delivered(&mut self, count: usize) {
        self.start = (self.start + count).min(self.bytes.len());
        if self.start == self.bytes.len() {
            self.start = 0;
            self.bytes.clear();
        }
    }

    /// Puts bytes behind what is there.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Gives the memory back when a stream falls idle.
    pub fn shrink(&mut self) {
        if self.rest().is_empty() {
            *self = Self::default();
        }
    }
}

/// What a client holds while it is connected: bytes on their way, in both directions.
#[derive(Default)]
pub struct InFlight {
    /// From the process, not yet delivered to a client.
    pub output: Pending,
    /// From a client, not yet delivered to the process.
    pub input: Pending,
}

/// A stream's end in the agent. At most one client is connected to it at a time; what it did not take is
/// there for the next one.
pub struct Endpoint {
    kind: Kind,
    fd: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    turn: Arc<tokio::sync::Mutex<InFlight>>,
    /// The present client has closed its sending side: perhaps it is gone, so that a new one may take over.
    abandoned: AtomicBool,
    handover: Notify,
    /// No more of the process's output is read.
    held: watch::Sender<bool>,
}

/// The right to move a stream's bytes.
pub struct Turn {
    /// The stream.
    pub endpoint: Arc<Endpoint>,
    /// Bytes on their way.
    pub in_flight: OwnedMutexGuard<InFlight>,
}

impl Endpoint {
    /// Takes the agent's end of a pipe or terminal. Needs a running tokio runtime.
    ///
    /// # Errors
    /// If the descriptor cannot be made non-blocking or registered with the event loop.
    pub fn new(kind: Kind, fd: OwnedFd) -> io::Result<Arc<Self>> {
        let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let interest = match kind {
            Kind::Stdin => Interest::WRITABLE | Interest::ERROR,
            Kind::Stdout | Kind::Stderr => Interest::READABLE,
            Kind::Tty => Interest::READABLE | Interest::WRITABLE,
        };
        // SAFETY: an OwnedFd owns its one descriptor.
        let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }?;
        Ok(Arc::new(Self {
            kind,
            fd: Mutex::new(Some(Arc::new(fd))),
            turn: Arc::default(),
            abandoned: AtomicBool::new(false),
            handover: Notify::new(),
            held: watch::Sender::new(false),
        }))
    }

    /// Which stream it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The descriptor, until the stream has ended.
    pub fn fd(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<AsyncFd<OwnedFd>>>> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream has ended: the agent's end is closed as soon as no one uses it.
    pub fn close(&self) {
        self.lock().take();
    }

    /// Becomes the stream's client, or `None` if there is one already. A client that has closed its
    /// sending side gives way to the new one.
    pub async fn take_turn(self: &Arc<Self>) -> Option<Turn> {
        let in_flight = match self.turn.clone().try_lock_owned() {
            Ok(in_flight) => in_flight,
            Err(_) if self.abandoned.load(Ordering::Relaxed) => {
                self.handover.notify_one();
                tokio::time::timeout(HANDOVER, self.turn.clone().lock_owned())
                    .await
                    .ok()?
            }
            Err(_) => return None,
        };
        self.abandoned.store(false, Ordering::Relaxed);
        Some(Turn {
            endpoint: self.clone(),
            in_flight,
        })
    }

    /// Says that the present client has closed its sending side.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Resolves when another client wants the stream of an abandoned one.
    pub async fn wanted(&self) {
        loop {
            self.handover.notified().await;
            // A permit can be left from a client that had gone in the meantime.
            if self.abandoned.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// From now on no more output is read, and its client is told an end once it has what was read; or it is as usual again.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Resolves when no more output is to be read.
    pub async fn held(&self) {
        // The sender is in `self`, so that the channel is open while this runs.
        let _ = self.held.subscribe().wait_for(|held| *held).await;
    }

    /// Whether somebody is connected.
    pub fn has_client(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// Waits until nobody is connected.
    pub async fn wait_until_free(&self) {
        drop(self.turn.lock().await);
    }

    /// Whether it is a terminal's input or both of its directions.
    pub fn is_terminal(&self) -> bool {
        self.fd().is_some_and(|fd| is_terminal(&fd))
    }

    /// Sets a terminal's window size.
    ///
    /// # Errors
    /// `ENOTTY` for a pipe; `EBADF` if the stream has ended.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let fd = self
            .fd()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is open while `fd` lives, and TIOCSWINSZ reads one `winsize`.
        let result = unsafe { libc::ioctl(fd.get_ref().as_raw_fd(), libc::TIOCSWINSZ, &size) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Whether a descriptor is a terminal's.
pub fn is_terminal(fd: &AsyncFd<OwnedFd>) -> bool {
    nix::unistd::isatty(fd.get_ref()).unwrap_or(false)
}
