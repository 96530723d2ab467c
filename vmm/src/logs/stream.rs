//! A container's log and the threads that fill it.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use caisson_vmm_protocol::Event;

use super::EventSink;
use super::format::{Formatter, Tag};
use super::hold::Hold;
use super::sink::Sink;
use super::tee::{Arrivals, Tees};
use crate::threads::{self, Kind};

/// Bytes read at a time.
const READ: usize = 64 * 1024;
/// What a buffer of lines is cut back to; only 64 Ki of empty lines at once need more.
const KEEP: usize = 256 * 1024;
/// The stack of a thread that copies; its buffers are on the heap.
const STACK: usize = 128 * 1024;

/// Counts the streams that have not ended.
#[derive(Default)]
pub struct Live {
    count: Mutex<usize>,
    none: Condvar,
}

impl Live {
    fn change(&self, by: isize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_add_signed(by);
        if *count == 0 {
            self.none.notify_all();
        }
    }

    /// Waits until there is none; false after `timeout`.
    pub fn wait_for_none(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            count = self
                .none
                .wait_timeout(count, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

/// A container's log.
pub struct Log {
    id: String,
    terminal: bool,
    sink: Sink,
    hold: Hold,
    stdout: Arrivals,
    stderr: Arrivals,
    /// Streams that have not ended.
    left: AtomicUsize,
    unwanted: AtomicBool,
    events: EventSink,
}

impl Log {
    /// # Errors
    /// What the system says of the file.
    pub fn new(
        id: String,
        terminal: bool,
        file: Option<OwnedFd>,
        events: EventSink,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            id,
            terminal,
            sink: Sink::new(file)?,
            hold: Hold::default(),
            stdout: Arrivals::default(),
            stderr: Arrivals::default(),
            left: AtomicUsize::new(if terminal { 1 } else { 2 }),
            unwanted: AtomicBool::new(false),
            events,
        }))
    }

    /// Whether there is one stream, a terminal's.
    pub fn terminal(&self) -> bool {
        self.terminal
    }

    /// Where clients of a stream are attached.
    pub fn arrivals(&self, tag: Tag) -> &Arrivals {
        match tag {
            Tag::Stdout => &self.stdout,
            Tag::Stderr => &self.stderr,
        }
    }

    /// Goes on in another file.
    ///
    /// # Errors
    /// What the system says of the file.
    pub fn reopen(&self, file: OwnedFd) -> io::Result<()> {
        self.sink.reopen(file)
    }

    /// Waits for nobody any more.
    pub fn abandon(&self) {
        self.unwanted.store(true, Ordering::Relaxed);
        self.sink.abandon();
        self.hold.end();
    }

    /// What becomes of streams at their end.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }

    /// Waits until all streams that have not ended are held. False after `timeout`.
    pub fn wait_until_held(&self, timeout: Duration) -> bool {
        self.hold
            .wait_for(timeout, || self.left.load(Ordering::Acquire))
    }

    /// Whether all streams have ended and are written.
    pub fn is_drained(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Starts a thread for each stream.
    ///
    /// # Errors
    /// What the system says when it cannot make one. A thread that did start ends when its stream does.
    pub fn start(
        self: &Arc<Self>,
        streams: Vec<(Tag, UnixStream)>,
        live: &Arc<Live>,
    ) -> io::Result<()> {
        for (tag, stream) in streams {
            let log = Arc::clone(self);
            let ours = Arc::clone(live);
            live.change(1);
            let thread = threads::spawn(
                Kind::Log,
                &format!("log-{}", tag.name()),
                STACK,
                move || {
                    log.copy(stream, tag, &ours);
                    ours.change(-1);
                },
            );
            if let Err(error) = thread {
                live.change(-1);
                return Err(error);
            }
        }
        Ok(())
    }

    fn copy(&self, mut stream: UnixStream, tag: Tag, live: &Live) {
        let mut bytes = vec![0; READ];
        let mut lines = Vec::new();
        let mut formatter = Formatter::new(tag);
        let mut tees = Tees::default();
        loop {
            match stream.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    if self.sink.has_file() {
                        formatter.feed(&bytes[..n], SystemTime::now(), &mut lines);
                        self.write(&mut lines);
                    }
                    tees.write(&bytes[..n], self.arrivals(tag), &self.unwanted);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The stream is the end of a socket pair of ours: it ends, it does not fail.
                _ => {
                    if self.sink.has_file() {
                        formatter.finish(SystemTime::now(), &mut lines);
                        self.write(&mut lines);
                    }
                    // Nothing of it is under way, so nobody has to wait for it.
                    live.change(-1);
                    let next = self.hold.next(tag, stream);
                    live.change(1);
                    match next {
                        Some(next) => stream = next,
                        None => break,
                    }
                }
            }
        }
        drop(tees);
        self.arrivals(tag).end();
        let last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        self.hold.tell();
        if last && !self.unwanted.load(Ordering::Relaxed) {
            (self.events)(Event::LogDrained {
                container_id: self.id.clone(),
            });
        }
    }

    fn write(&self, lines: &mut Vec<u8>) {
        self.sink.write(lines, &|error| {
            let container_id = self.id.clone();
            (self.events)(match error {
                Some(error) => Event::LogFailed {
                    message: format!(
                        "the log of container {container_id} could not be written: {error}; make room or reopen it"
                    ),
                    container_id,
                },
                None => Event::LogRecovered { container_id },
            });
        });
        lines.clear();
        lines.shrink_to(KEEP);
    }
}
