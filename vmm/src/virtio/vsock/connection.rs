//! One stream between a host socket and a port of the guest (virtio 1.2 §5.10.6.1 to .6.6).
//!
//! Bytes to the guest are read from the socket straight into its receive buffers, never more than it has
//! credit for, so a slow guest leaves them in the socket and its writer waits. Bytes from the guest go
//! straight into the socket; what that does not take is kept in a backlog. The backlog's limit is the credit
//! that the guest was given, so a slow reader stops its own stream and no other.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::handshake;
use super::packet::{
    HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::receive::ReceiveRing;
use crate::virtio::DeviceError;
use crate::virtio::buffers::Buffers;

/// The room that the guest is told it has, in bytes, and the most that a connection's backlog holds.
pub const BUF_ALLOC: u32 = 256 * 1024;
/// The most bytes read from a socket at a time.
const MAX_READ: usize = 128 * 1024;
/// How long a guest may take to answer a request for a connection.
const ACCEPT_TIME: Duration = Duration::from_secs(10);
/// How long a guest may take to confirm the end of a connection.
const LINGER: Duration = Duration::from_secs(10);

/// Who waits to hear that the guest has accepted.
pub enum Opener {
    /// A client of the listener, by a line in its stream.
    Client,
    /// A thread of this process.
    Caller(SyncSender<io::Result<()>>),
}

enum State {
    /// The guest has not accepted yet.
    Connecting(Opener),
    Open,
    /// The guest's end is gone; the client still gets what the guest sent before.
    Closing,
}

/// What is to be sent to the guest next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Ask it to accept.
    Request,
    /// End the connection at once.
    Reset,
    /// Tell it what we have taken.
    CreditUpdate,
    /// Ask it what it has taken.
    CreditRequest,
    /// Send what the client wrote.
    Data,
    /// Tell it which directions have ended.
    Shutdown,
}

/// A connection.
pub struct Connection {
    guest_cid: u64,
    host_port: u32,
    guest_port: u32,
    /// `None` when both directions of the socket have ended.
    stream: Option<UnixStream>,
    state: State,
    /// A request that is still to be sent.
    request_due: bool,
    reset_due: bool,
    /// When the guest must have done what we wait for.
    deadline: Option<Instant>,

    // Toward the guest.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    credit_asked: bool,
    readable: bool,
    client_ended: bool,
    guest_receives: bool,

    // From the guest.
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
    credit_due: bool,
    backlog: VecDeque<u8>,
    writable: bool,
    client_receives: bool,
    guest_sends: bool,
    write_ended: bool,

    shutdown: u32,
    shutdown_told: u32,
    /// Whether it stands in the muxer's line for receive buffers.
    pub in_line: bool,
}

impl Connection {
    /// A connection that is still to be asked for.
    pub fn new(
        guest_cid: u64,
        host_port: u32,
        guest_port: u32,
        stream: UnixStream,
        opener: Opener,
    ) -> Self {
        Self {
            guest_cid,
            host_port,
            guest_port,
            stream: Some(stream),
            state: State::Connecting(opener),
            request_due: true,
            reset_due: false,
            deadline: Some(Instant::now() + ACCEPT_TIME),
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_asked: false,
            readable: true,
            client_ended: false,
            guest_receives: true,
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            credit_due: false,
            backlog: VecDeque::new(),
            writable: true,
            client_receives: true,
            guest_sends: true,
            write_ended: false,
            shutdown: 0,
            shutdown_told: 0,
            in_line: false,
        }
    }

    /// The port in the guest.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// The host's socket, while a direction of it is open.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// When the guest must have answered.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the client still has to get bytes that the guest sent.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() && self.client_receives && self.stream.is_some()
    }

    /// Bytes of the guest that the client has not taken yet.
    #[cfg(any(test, fuzzing))]
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Whether the guest regards the connection as its own.
    pub fn is_guests(&self) -> bool {
        !matches!(self.state, State::Closing)
    }

    /// Nothing is left to do.
    pub fn finished(&self) -> bool {
        !self.is_guests() && !self.reset_due && !self.has_backlog()
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    fn wants_to_read(&self) -> bool {
        self.stream.is_some() && self.readable && !self.client_ended && self.guest_receives
    }

    /// What is to be sent to the guest next, if anything.
    pub fn next(&self) -> Option<Next> {
        if self.reset_due {
            return Some(Next::Reset);
        }
        match self.state {
            State::Connecting(_) => self.request_due.then_some(Next::Request),
            State::Closing => None,
            State::Open if self.credit_due => Some(Next::CreditUpdate),
            State::Open if self.wants_to_read() && self.credit() > 0 => Some(Next::Data),
            State::Open if self.wants_to_read() && !self.credit_asked => Some(Next::CreditRequest),
            State::Open => (self.shutdown & !self.shutdown_told != 0).then_some(Next::Shutdown),
        }
    }

    /// Sends what [`next`](Self::next) says. The ring has room for at least one packet.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring.
    pub fn send_next(&mut self, ring: &mut ReceiveRing<'_, '_>) -> Result<(), DeviceError> {
        let header = match self.next() {
            None => return Ok(()),
            Some(Next::Data) => return self.send_data(ring),
            Some(Next::Request) => {
                self.request_due = false;
                self.header(op::REQUEST)
            }
            Some(Next::Reset) => {
                self.reset_due = false;
                self.header(op::RST)
            }
            Some(Next::CreditUpdate) => {
                self.credit_due = false;
                self.header(op::CREDIT_UPDATE)
            }
            Some(Next::CreditRequest) => {
                self.credit_asked = true;
                self.header(op::CREDIT_REQUEST)
            }
            Some(Next::Shutdown) => {
                self.shutdown_told = self.shutdown;
                Header {
                    flags: self.shutdown,
                    ..self.header(op::SHUTDOWN)
                }
            }
        };
        self.forwarded_told = self.forwarded;
        ring.commit(0, |_| header)
    }

    fn send_data(&mut self, ring: &mut ReceiveRing<'_, '_>) -> Result<(), DeviceError> {
        let Some(stream) = self.stream.as_ref() else {
            return Ok(());
        };
        let want = MAX_READ.min(self.credit() as usize);
        let room = ring.reserve(want)?.min(want);
        match ring.places(room).receive(stream.as_fd()) {
            Ok(0) => self.client_ended = true,
            Ok(n) => {
                // At most MAX_READ.
                self.sent = self.sent.wrapping_add(n as u32);
                self.credit_asked = false;
                self.credit_due = false;
                self.forwarded_told = self.forwarded;
                let header = self.header(op::RW);
                ring.commit(n, |len| Header { len, ..header })?;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // The client closed without reading all it was sent: what it wrote has been read.
            Err(_) => self.client_ended = true,
        }
        Ok(())
    }

    /// Takes what epoll says of the host's socket.
    pub fn socket_ready(&mut self, ready: EventSet, scratch: &mut [u8]) {
        if ready
            .intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
        {
            self.readable = true;
        }
        // Both directions have ended while we have not ended ours: the client does not read any more.
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) && !self.write_ended {
            self.client_is_deaf();
            if matches!(self.state, State::Connecting(_)) {
                // Nobody is left to hear of the guest's answer.
                self.abort();
            }
        }
        if ready.contains(EventSet::OUT) {
            self.writable = true;
            self.flush();
        }
        self.settle(scratch);
    }

    /// Takes a packet of the guest for this connection. `payload` is exactly as long as the header says.
    pub fn packet(&mut self, header: &Header, payload: Buffers<'_>, scratch: &mut [u8]) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        let in_flight = self.sent.wrapping_sub(header.fwd_cnt);
        match (header.op, &self.state) {
            (op::RST, _) => self.guest_is_gone(),
            // It says it took more than was sent.
            _ if in_flight > u32::MAX / 2 => self.abort(),
            (op::RESPONSE, State::Connecting(_)) if !self.request_due => self.accepted(),
            (op::RW, State::Open) => self.data(payload, scratch),
            (op::SHUTDOWN, State::Open) => self.guest_shuts(header.flags),
            (op::CREDIT_UPDATE, State::Open) => {}
            (op::CREDIT_REQUEST, State::Open) => self.credit_due = true,
            _ => self.abort(),
        }
        self.settle(scratch);
    }

    fn accepted(&mut self) {
        let told = match (&self.state, &self.stream) {
            (State::Connecting(Opener::Client), Some(stream)) => {
                handshake::accept(stream, self.host_port).is_ok()
            }
            (State::Connecting(Opener::Caller(answer)), _) => answer.send(Ok(())).is_ok(),
            _ => false,
        };
        if told {
            self.state = State::Open;
            self.deadline = None;
        } else {
            self.abort();
        }
    }

    fn data(&mut self, mut payload: Buffers<'_>, scratch: &mut [u8]) {
        let outstanding = self.received.wrapping_sub(self.forwarded);
        // At most MAX_PAYLOAD, so neither this nor the sum can overflow.
        let len = payload.len() as u32;
        if !self.guest_sends || outstanding + len > BUF_ALLOC {
            return self.abort();
        }
        self.received = self.received.wrapping_add(len);
        let mut passed_on = 0;
        while self.backlog.is_empty() && self.writable && self.client_receives {
            let Some(stream) = self.stream.as_ref().filter(|_| !payload.is_empty()) else {
                break;
            };
            match payload.send(stream.as_fd()) {
                Ok(n) => {
                    payload.skip(n);
                    passed_on += n;
                }
                Err(e) => self.not_written(&e),
            }
        }
        if !self.client_receives || self.stream.is_none() {
            passed_on += payload.len();
            payload.skip(payload.len());
        }
        while !payload.is_empty() {
            let n = payload.read(scratch);
            self.backlog.extend(&scratch[..n]);
        }
        self.took(passed_on);
    }

    fn not_written(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ => self.client_is_deaf(),
        }
    }

    /// Counts bytes of the guest as taken, and tells it when its view of our room has become small.
    fn took(&mut self, n: usize) {
        // At most BUF_ALLOC.
        self.forwarded = self.forwarded.wrapping_add(n as u32);
        let room_told = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.forwarded_told));
        if room_told < BUF_ALLOC / 2 && self.forwarded != self.forwarded_told {
            self.credit_due = true;
        }
    }

    /// Writes the backlog to the client, as far as it goes without waiting.
    pub fn flush(&mut self) {
        while self.writable && self.has_backlog() {
            let Some(stream) = self.stream.as_ref() else {
                return;
            };
            let (first, second) = self.backlog.as_slices();
            let mut socket: &UnixStream = stream;
            match socket.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.took(n);
                }
                Err(e) => self.not_written(&e),
            }
        }
        if self.backlog.is_empty() {
            // An idle connection should not keep what a burst needed.
            self.backlog.shrink_to(0);
        }
    }

    fn client_is_deaf(&mut self) {
        self.client_receives = false;
        let lost = self.backlog.len();
        self.backlog = VecDeque::new();
        self.took(lost);
        self.shutdown |= SHUTDOWN_RECEIVE;
    }

    fn guest_shuts(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_receives = false;
        }
        if flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH {
            // It has closed its socket and waits for this confirmation.
            self.abort();
        } else if !self.guest_receives
            && let Some(stream) = &self.stream
        {
            // The client's writes shall fail as they would on a local socket.
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// Ends the guest's side at once, from ours. What it sent before still reaches the client.
    pub fn abort(&mut self) {
        self.guest_is_gone();
        self.reset_due = !self.request_due;
    }

    fn guest_is_gone(&mut self) {
        if let State::Connecting(Opener::Caller(answer)) = &self.state {
            let _ = answer.try_send(Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!(
                    "the guest refused a connection to vsock port {}",
                    self.guest_port
                ),
            )));
        }
        self.state = State::Closing;
        self.deadline = None;
        self.reset_due = false;
    }

    /// The guest has not done in time what we waited for.
    pub fn expired(&mut self) {
        self.abort();
    }

    /// Draws the consequences of what has ended.
    pub fn settle(&mut self, scratch: &mut [u8]) {
        let to_guest_ended = self.client_ended || !self.guest_receives;
        match self.state {
            State::Connecting(_) => {}
            State::Open => {
                if self.client_ended {
                    self.shutdown |= SHUTDOWN_SEND;
                }
                if !self.guest_sends && self.backlog.is_empty() && !self.write_ended {
                    self.write_ended = true;
                    if let Some(stream) = &self.stream {
                        let _ = stream.shutdown(Shutdown::Write);
                    }
                }
                if to_guest_ended && (self.write_ended || !self.client_receives) {
                    self.close_stream(scratch);
                    self.shutdown = SHUTDOWN_BOTH;
                    self.deadline.get_or_insert_with(|| Instant::now() + LINGER);
                }
            }
            State::Closing => {
                if !self.has_backlog() {
                    self.close_stream(scratch);
                }
            }
        }
    }

    /// Closes the host's socket so that its client sees an end, not a reset: bytes that nobody will read
    /// are taken out first.
    fn close_stream(&mut self, scratch: &mut [u8]) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        let _ = stream.shutdown(Shutdown::Both);
        // A socket buffer holds less than this many reads.
        for _ in 0..64 {
            match (&stream).read(scratch) {
                Ok(n) if n > 0 => {}
                _ => break,
            }
        }
    }
}
