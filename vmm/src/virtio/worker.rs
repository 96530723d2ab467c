//! The thread that serves one activated device: an epoll loop that can be parked and stopped.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DeviceError, FailureSink};
use crate::threads::{self, Kind};

/// Events taken from the kernel at a time.
const BATCH: usize = 32;
/// The token of the worker's own wake-up event; handlers use smaller ones.
const WAKE: u64 = u64::MAX;

/// The descriptors that a worker waits for.
pub struct Poll(Epoll);

impl Poll {
    /// Wait for `events` on `fd`; [`Handler::handle`] is told `token`.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.0
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Change what is waited for on a descriptor that was added.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.0
            .ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Wait for this descriptor no longer.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.0
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

#[cfg(any(test, fuzzing))]
impl Poll {
    /// For a handler without a thread (see [`crate::fuzzing`]).
    ///
    /// # Errors
    /// What the system says.
    pub fn new() -> io::Result<Self> {
        Epoll::new().map(Self)
    }

    /// What is ready at this moment, each with its token.
    ///
    /// # Errors
    /// What the system says.
    pub fn ready(&self) -> io::Result<Vec<(u64, EventSet)>> {
        let mut events = [EpollEvent::default(); BATCH];
        let ready = self.0.wait(0, &mut events)?;
        Ok(events[..ready]
            .iter()
            .map(|event| (event.data(), event.event_set()))
            .collect())
    }
}

/// What a device does on its worker.
pub trait Handler: Send + 'static {
    /// Registers the descriptors to wait for, and does what is due at once. Called on the worker's thread.
    ///
    /// # Errors
    /// [`DeviceError`] ends the machine.
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError>;

    /// Serves one ready descriptor.
    ///
    /// # Errors
    /// [`DeviceError`] ends the machine.
    fn handle(&mut self, token: u64, ready: EventSet, poll: &Poll) -> Result<(), DeviceError>;

    /// Has others stop what they do on the handler's behalf, until [`Handler::unpark`]. Nothing is asked of it meanwhile.
    ///
    /// # Errors
    /// [`DeviceError`] ends the machine.
    fn park(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Has them go on.
    ///
    /// # Errors
    /// [`DeviceError`] ends the machine.
    fn unpark(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// When [`Handler::go_on`] is to be called; `None`: not by the clock.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Goes on with what had to wait for the time that [`Handler::due`] named.
    ///
    /// # Errors
    /// [`DeviceError`] ends the machine.
    fn go_on(&mut self, _: &Poll) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    Run,
    Park,
    Stop,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

struct State {
    order: Order,
    parked: bool,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is two flags, valid at any time: a panic elsewhere cannot have torn it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        self.lock().order = order;
        self.changed.notify_all();
        // A full counter is a wake-up that is still to be seen.
        let _ = self.wake.write(1);
    }
}

/// A running worker, which gives back an `R` of its handler. Dropping it stops it.
pub struct Worker<R> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<R>>,
}

impl<R: Send + 'static> Worker<R> {
    /// Starts a thread that serves the handler until [`Worker::stop`] or an error, which goes to `failure`. What is
    /// given back is made on that thread, too: nobody else may make the system calls that it takes to finish.
    ///
    /// # Errors
    /// What the system says when it cannot make the thread or its descriptors.
    pub fn spawn<H: Handler + Into<R>>(
        kind: Kind,
        name: &str,
        mut handler: H,
        failure: FailureSink,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                order: Order::Run,
                parked: false,
                ended: false,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        });
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            std::os::fd::AsRawFd::as_raw_fd(&shared.wake),
            EpollEvent::new(EventSet::IN, WAKE),
        )?;
        let poll = Poll(epoll);
        let ours = Arc::clone(&shared);
        let thread = threads::spawn(kind, name, 0, move || {
            if let Err(error) = run(&mut handler, &poll, &ours) {
                failure(error);
            }
            ours.lock().ended = true;
            ours.changed.notify_all();
            handler.into()
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Parks the worker and returns when it is between two events.
    pub fn pause(&self) {
        self.shared.order(Order::Park);
        let mut state = self.shared.lock();
        while !state.parked && !state.ended {
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets a parked worker go on.
    pub fn resume(&self) {
        self.shared.order(Order::Run);
    }

    /// Stops the worker and returns what it gives back; `None` if its thread panicked.
    pub fn stop(mut self) -> Option<R> {
        self.shared.order(Order::Stop);
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl<R> Drop for Worker<R> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.order(Order::Stop);
            let _ = thread.join();
        }
    }
}

fn run<H: Handler>(handler: &mut H, poll: &Poll, shared: &Shared) -> Result<(), DeviceError> {
    handler.start(poll)?;
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let mut order = shared.lock().order;
        if order == Order::Park {
            handler.park()?;
            order = wait_for_order(shared);
            if order == Order::Run {
                handler.unpark()?;
            }
        }
        if order == Order::Stop {
            return Ok(());
        }
        let ready = match poll.0.wait(timeout(handler.due()), &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(DeviceError::host("a device's event loop")(source));
            }
        };
        for event in &events[..ready] {
            if event.data() == WAKE {
                let _ = shared.wake.read();
            } else {
                handler.handle(event.data(), event.event_set(), poll)?;
            }
        }
        if handler.due().is_some_and(|due| due <= Instant::now()) {
            handler.go_on(poll)?;
        }
    }
}

/// Milliseconds until then, rounded up, as `epoll_wait` takes them: -1 is for ever.
fn timeout(due: Option<Instant>) -> i32 {
    let Some(due) = due else { return -1 };
    let left = due.saturating_duration_since(Instant::now());
    i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// Waits while the order is to park, and says what it is then.
fn wait_for_order(shared: &Shared) -> Order {
    let mut state = shared.lock();
    while state.order == Order::Park {
        state.parked = true;
        shared.changed.notify_all();
        state = shared
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
    state.parked = false;
    state.order
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc;
    use std::time::Duration;

    const PARKED: u64 = 1;
    const UNPARKED: u64 = 2;

    struct Counter {
        event: EventFd,
        seen: mpsc::Sender<u64>,
    }

    impl Handler for Counter {
        fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
            poll.add(self.event.as_raw_fd(), 1, EventSet::IN).unwrap();
            Ok(())
        }

        fn park(&mut self) -> Result<(), DeviceError> {
            self.seen.send(PARKED).unwrap();
            Ok(())
        }

        fn unpark(&mut self) -> Result<(), DeviceError> {
            self.seen.send(UNPARKED).unwrap();
            Ok(())
        }

        fn handle(&mut self, token: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
            let n = self.event.read().unwrap();
            self.seen.send(token * 100 + n).unwrap();
            if n == 13 {
                return Err(DeviceError::Guest {
                    device: "test",
                    what: "thirteen".into(),
                });
            }
            Ok(())
        }
    }

    fn worker() -> (
        Worker<Counter>,
        EventFd,
        mpsc::Receiver<u64>,
        mpsc::Receiver<String>,
    ) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, got) = mpsc::channel();
        let (failed, failures) = mpsc::channel();
        let handler = Counter {
            event: event.try_clone().unwrap(),
            seen,
        };
        let sink: FailureSink = Arc::new(move |e| failed.send(e.to_string()).unwrap());
        let worker = Worker::spawn(Kind::Rng, "test", handler, sink).unwrap();
        (worker, event, got, failures)
    }

    #[test]
    fn a_parked_worker_serves_nothing_until_it_goes_on() {
        let (worker, event, got, _failures) = worker();
        event.write(1).unwrap();
        assert_eq!(got.recv_timeout(Duration::from_secs(5)), Ok(101));
        worker.pause();
        assert_eq!(got.try_recv(), Ok(PARKED), "before it counts as parked");
        event.write(2).unwrap();
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
        worker.resume();
        assert_eq!(got.recv_timeout(Duration::from_secs(5)), Ok(UNPARKED));
        assert_eq!(got.recv_timeout(Duration::from_secs(5)), Ok(102));
        assert!(worker.stop().is_some());
    }

    #[test]
    fn an_error_reaches_the_sink_and_a_pause_after_it_returns() {
        let (worker, event, got, failures) = worker();
        event.write(13).unwrap();
        assert_eq!(got.recv_timeout(Duration::from_secs(5)), Ok(113));
        let message = failures.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(message.contains("thirteen"), "{message}");
        worker.pause();
    }
}
