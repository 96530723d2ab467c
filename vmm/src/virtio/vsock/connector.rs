//! Connections to the guest from inside this process.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The most connections that may wait for the guest's driver at a time.
const MAX_WAITING: usize = 256;

/// Asks the vsock device for connections to the guest. Clones ask the same device.
#[derive(Clone)]
pub struct VsockConnector {
    requests: Arc<Requests>,
}

impl VsockConnector {
    /// Connects to a port of the guest. Also works before the guest's driver is up: the request then waits.
    /// The stream is an ordinary blocking socket; its half-closes pass through.
    ///
    /// # Errors
    /// - `ConnectionRefused`: nobody listens on that port in the guest, or the device has its most connections;
    /// - `TimedOut`: the guest has not answered within `timeout`;
    /// - `NotConnected`: the device was stopped;
    /// - otherwise what the system says when it cannot make the sockets.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let wish = self.requests.wish(port)?;
        wait(&wish.answered, port, timeout)?;
        Ok(wish.stream)
    }
}

/// A wish for a connection, as its caller holds it. Dropped, it is none any more.
pub(super) struct Wish {
    /// The caller's end.
    pub stream: UnixStream,
    /// What the guest says.
    pub answered: Receiver<io::Result<()>>,
    _caller: Arc<()>,
}

fn wait(answered: &Receiver<io::Result<()>>, port: u32, timeout: Duration) -> io::Result<()> {
    match answered.recv_timeout(timeout) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the guest has not answered on vsock port {port} within {timeout:?}"),
        )),
        Err(RecvTimeoutError::Disconnected) => Err(stopped()),
    }
}

fn stopped() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the vsock device was stopped; the machine is ending",
    )
}

/// One wish for a connection.
pub(super) struct Request {
    /// The port in the guest.
    pub port: u32,
    /// The device's end of the socket pair, non-blocking.
    pub stream: UnixStream,
    /// Where the caller waits for the guest's answer.
    pub answer: SyncSender<io::Result<()>>,
    /// Gone when the caller no longer waits.
    caller: Weak<()>,
}

impl Request {
    fn is_awaited(&self) -> bool {
        self.caller.strong_count() > 0
    }
}

/// The wishes that the device has not seen yet.
pub(super) struct Requests {
    state: Mutex<State>,
    wake: EventFd,
}

struct State {
    waiting: VecDeque<Request>,
    closed: bool,
}

impl Requests {
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                closed: false,
            }),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    pub fn connector(self: &Arc<Self>) -> VsockConnector {
        VsockConnector {
            requests: Arc::clone(self),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A queue and a flag, valid at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a wish for a connection to this port in line.
    ///
    /// # Errors
    /// As [`VsockConnector::connect`], but for the guest's answer.
    pub fn wish(&self, port: u32) -> io::Result<Wish> {
        let (stream, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let (answer, answered) = sync_channel(1);
        let caller = Arc::new(());
        self.push(Request {
            port,
            stream: theirs,
            answer,
            caller: Arc::downgrade(&caller),
        })?;
        Ok(Wish {
            stream,
            answered,
            _caller: caller,
        })
    }

    fn push(&self, request: Request) -> io::Result<()> {
        let mut state = self.lock();
        if state.closed {
            return Err(stopped());
        }
        state.waiting.retain(Request::is_awaited);
        if state.waiting.len() >= MAX_WAITING {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("{MAX_WAITING} connections already wait for the guest's vsock driver"),
            ));
        }
        state.waiting.push_back(request);
        drop(state);
        // A full counter is a wake-up that is still to be seen.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// Signalled when there are wishes.
    pub fn event(&self) -> &EventFd {
        &self.wake
    }

    /// Takes all wishes that somebody still waits for.
    pub fn take(&self) -> VecDeque<Request> {
        let _ = self.wake.read();
        let mut waiting = std::mem::take(&mut self.lock().waiting);
        waiting.retain(Request::is_awaited);
        waiting
    }

    /// Refuses this and any later wish.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_before_the_driver_waits_no_longer_than_asked() {
        let requests = Requests::new().unwrap();
        let error = requests
            .connector()
            .connect(1024, Duration::from_millis(20))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("1024"), "{error}");
        assert!(requests.take().is_empty());
    }

    #[test]
    fn a_stopped_device_refuses_at_once() {
        let requests = Requests::new().unwrap();
        let connector = requests.connector();
        let waiter = std::thread::spawn(move || {
            connector
                .connect(1, Duration::from_secs(20))
                .unwrap_err()
                .kind()
        });
        while requests.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        requests.close();
        assert_eq!(waiter.join().unwrap(), io::ErrorKind::NotConnected);
        let again = requests.connector().connect(1, Duration::from_secs(20));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
