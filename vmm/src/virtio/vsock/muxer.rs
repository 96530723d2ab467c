//! All connections of one guest: who may connect where, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use caisson_vmm_protocol::{READY_PORT, SETTLED_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::NAME;
use super::connection::{Connection, Opener};
use super::connector::Requests;
use super::handshake::{Handshake, Progress};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, TYPE_STREAM, op};
use super::receive::ReceiveRing;
use crate::virtio::DeviceError;
use crate::virtio::buffers::Buffers;
use crate::virtio::worker::Poll;

/// The most connections and clients that have not said where they want to, together.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most resets for packets of unknown connections that wait for receive buffers. More are left out:
/// a guest that gives us no buffers would not see them either.
const MAX_REPLIES: usize = 256;
/// How long a client may take for its line.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// How often time-outs are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Clients accepted before others get their turn.
const ACCEPT_BATCH: usize = 64;
/// Host ports are given out from here on, so that they are none that anybody knows by number.
const FIRST_PORT: u32 = 1 << 30;

const LISTENER: u64 = 1 << 40;
const REQUESTS: u64 = 2 << 40;
const TIMER: u64 = 3 << 40;
const HANDSHAKE: u64 = 4 << 40;
const CONNECTION: u64 = 5 << 40;
const KIND: u64 = !((1 << 40) - 1);

/// What the guest can say by a connection that is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Knock {
    /// Its agent listens: [`READY_PORT`].
    Ready,
    /// Its start is over: [`SETTLED_PORT`].
    Settled,
}

/// Called when the guest says something for the first time.
pub type KnockCallback = Arc<dyn Fn(Knock) + Send + Sync>;

/// The connections of a guest.
pub struct Muxer {
    guest_cid: u64,
    listener: Option<UnixListener>,
    requests: Arc<Requests>,
    knocked: KnockCallback,
    heard: Vec<Knock>,
    timer: TimerFd,
    timer_runs: bool,
    /// Not accepting until the timer's next tick: the process has no descriptor left.
    listener_rests: bool,
    handshakes: HashMap<u32, Handshake>,
    connections: HashMap<u32, Connection>,
    /// Resets for packets that belong to no connection.
    replies: VecDeque<Header>,
    /// Connections with something to send to the guest, each once, in the order of their turns.
    line: VecDeque<u32>,
    last_port: u32,
    last_handshake: u32,
    scratch: Vec<u8>,
}

impl Muxer {
    /// # Errors
    /// What the system says when it cannot make a timer or change the listener.
    pub fn new(
        guest_cid: u32,
        listener: Option<OwnedFd>,
        requests: Arc<Requests>,
        knocked: KnockCallback,
    ) -> io::Result<Self> {
        let listener = listener.map(UnixListener::from);
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self {
            guest_cid: guest_cid.into(),
            listener,
            requests,
            knocked,
            heard: Vec::new(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            timer_runs: false,
            listener_rests: false,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            replies: VecDeque::new(),
            line: VecDeque::new(),
            last_port: FIRST_PORT,
            last_handshake: 0,
            scratch: vec![0; MAX_PAYLOAD as usize],
        })
    }

    /// Gives out other ports than an earlier device, so that what the guest still has to say of its connections is not taken
    /// for what it says of ours.
    pub fn use_other_ports(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        // Less than 2³⁰ of them.
        self.last_port = FIRST_PORT + now.unwrap_or_default().subsec_nanos();
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        if let Some(listener) = &self.listener {
            poll.add(listener.as_raw_fd(), LISTENER, EventSet::IN)
                .map_err(DeviceError::host(NAME))?;
        }
        poll.add(self.requests.event().as_raw_fd(), REQUESTS, EventSet::IN)
            .map_err(DeviceError::host(NAME))?;
        poll.add(self.timer.as_raw_fd(), TIMER, EventSet::IN)
            .map_err(DeviceError::host(NAME))
    }

    /// Serves a descriptor of its own.
    pub fn handle(&mut self, token: u64, ready: EventSet, poll: &Poll) {
        // The low bits are a port or a handshake's number.
        let id = token as u32;
        match token & KIND {
            LISTENER => self.accept(poll),
            REQUESTS => self.take_requests(poll),
            TIMER => self.tick(poll),
            HANDSHAKE => self.shake_hands(id, poll),
            CONNECTION => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.socket_ready(ready, &mut self.scratch);
                    self.settle(id);
                }
            }
            _ => {}
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.handshakes.len() >= MAX_CONNECTIONS
    }

    fn accept(&mut self, poll: &Poll) {
        for _ in 0..ACCEPT_BATCH {
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept() {
                Ok((stream, _)) => self.greet(stream, poll),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    // No descriptors or memory: the client stays in the backlog, and we do not spin on it.
                    let _ = poll.modify(listener.as_raw_fd(), LISTENER, EventSet::empty());
                    self.listener_rests = true;
                    self.run_timer(true);
                    return;
                }
            }
        }
    }

    /// Takes a client that has connected.
    pub(super) fn greet(&mut self, stream: UnixStream, poll: &Poll) {
        if self.is_full() || stream.set_nonblocking(true).is_err() {
            return;
        }
        let id = next_free(&mut self.last_handshake, 0, &self.handshakes);
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if poll
            .add(stream.as_raw_fd(), HANDSHAKE | u64::from(id), events)
            .is_ok()
        {
            let deadline = Instant::now() + HANDSHAKE_TIME;
            self.handshakes.insert(id, Handshake { stream, deadline });
            self.run_timer(true);
            self.shake_hands(id, poll);
        }
    }

    fn shake_hands(&mut self, id: u32, poll: &Poll) {
        let Some(handshake) = self.handshakes.get(&id) else {
            return;
        };
        match handshake.progress() {
            Progress::More => {}
            Progress::Bad => {
                self.handshakes.remove(&id);
            }
            Progress::Port(port) => {
                if let Some(Handshake { stream, .. }) = self.handshakes.remove(&id) {
                    // Polled anew under the connection's token, which also tells of what is there already.
                    if poll.remove(stream.as_raw_fd()).is_ok() {
                        self.open(port, stream, Opener::Client, poll);
                    }
                }
            }
        }
    }

    fn take_requests(&mut self, poll: &Poll) {
        for request in self.requests.take() {
            if self.is_full() {
                let _ = request.answer.try_send(Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("the guest already has {MAX_CONNECTIONS} vsock connections"),
                )));
                continue;
            }
            let opener = Opener::Caller(request.answer);
            self.open(request.port, request.stream, opener, poll);
        }
    }

    fn open(&mut self, guest_port: u32, stream: UnixStream, opener: Opener, poll: &Poll) {
        let host_port = next_free(&mut self.last_port, FIRST_PORT, &self.connections);
        // Edge-triggered: a half-closed socket, or one that nobody may read now, is told once and does not
        // keep the loop busy.
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let token = CONNECTION | u64::from(host_port);
        if poll.add(stream.as_raw_fd(), token, events).is_ok() {
            let connection = Connection::new(self.guest_cid, host_port, guest_port, stream, opener);
            self.connections.insert(host_port, connection);
            self.settle(host_port);
        }
    }

    /// Puts a connection in the line if it has something to send, and forgets it if it is over.
    fn settle(&mut self, host_port: u32) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        if connection.finished() {
            self.connections.remove(&host_port);
            return;
        }
        if !connection.in_line && connection.next().is_some() {
            connection.in_line = true;
            self.line.push_back(host_port);
        }
        if connection.deadline().is_some() {
            self.run_timer(true);
        }
    }

    fn tick(&mut self, poll: &Poll) {
        let _ = self.timer.wait();
        let now = Instant::now();
        if std::mem::take(&mut self.listener_rests)
            && let Some(listener) = &self.listener
        {
            let _ = poll.modify(listener.as_raw_fd(), LISTENER, EventSet::IN);
        }
        self.handshakes.retain(|_, h| h.deadline > now);
        let late: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, c)| c.deadline().is_some_and(|d| d <= now))
            .map(|(port, _)| *port)
            .collect();
        for port in late {
            if let Some(connection) = self.connections.get_mut(&port) {
                connection.expired();
                connection.settle(&mut self.scratch);
            }
            self.settle(port);
        }
        let needed = self.listener_rests
            || !self.handshakes.is_empty()
            || self.connections.values().any(|c| c.deadline().is_some());
        self.run_timer(needed);
    }

    /// Lets the timer run while there is something that can expire, and only then.
    fn run_timer(&mut self, run: bool) {
        if run == self.timer_runs {
            return;
        }
        let done = if run {
            self.timer.reset(TICK, Some(TICK))
        } else {
            self.timer.clear()
        };
        if done.is_ok() {
            self.timer_runs = run;
        }
    }

    /// Takes a packet that the guest sent. Nothing in it is trusted; the header is copied out once, so that
    /// the guest cannot change it between a check and its use.
    pub fn packet(&mut self, mut buffers: Buffers<'_>) {
        let Some(header) = buffers.read_array().as_ref().map(Header::from_bytes) else {
            return;
        };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let host_port = header.dst_port;
        let known = self
            .connections
            .get_mut(&host_port)
            .filter(|c| c.guest_port() == header.src_port && c.is_guests());
        let Some(connection) = known else {
            return self.unknown(&header);
        };
        let payload = (header.len <= MAX_PAYLOAD && header.kind == TYPE_STREAM)
            .then(|| buffers.split_front(header.len as usize))
            .flatten();
        match payload {
            Some(payload) => connection.packet(&header, payload, &mut self.scratch),
            None => {
                connection.abort();
                connection.settle(&mut self.scratch);
            }
        }
        self.settle(host_port);
    }

    fn unknown(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        let knock = match header.dst_port {
            READY_PORT => Some(Knock::Ready),
            SETTLED_PORT => Some(Knock::Settled),
            _ => None,
        };
        if let Some(knock) = knock
            && header.op == op::REQUEST
            && header.kind == TYPE_STREAM
            // Once: a guest that says it again and again tells nothing new.
            && !self.heard.contains(&knock)
        {
            self.heard.push(knock);
            (self.knocked)(knock);
        }
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(header.reset());
        }
    }

    /// Whether there is something to send to the guest.
    pub fn has_work(&self) -> bool {
        !self.replies.is_empty() || !self.line.is_empty()
    }

    /// Sends the next thing. The ring has room for at least one packet.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring.
    pub fn send_next(&mut self, ring: &mut ReceiveRing<'_, '_>) -> Result<(), DeviceError> {
        if let Some(reply) = self.replies.pop_front() {
            return ring.commit(0, |_| reply);
        }
        let Some(host_port) = self.line.pop_front() else {
            return Ok(());
        };
        if let Some(connection) = self.connections.get_mut(&host_port) {
            connection.in_line = false;
            connection.send_next(ring)?;
            connection.settle(&mut self.scratch);
            self.settle(host_port);
        }
        Ok(())
    }

    /// Ends all connections, because the device stops. What the guest has sent goes to those who read it
    /// within `patience`.
    pub fn stop(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        self.replies.clear();
        self.line.clear();
        self.handshakes.clear();
        for connection in self.connections.values_mut() {
            connection.abort();
        }
        loop {
            for connection in self.connections.values_mut() {
                connection.socket_ready(EventSet::OUT, &mut self.scratch);
            }
            self.connections.retain(|_, c| c.has_backlog());
            let left = end.saturating_duration_since(Instant::now());
            if self.connections.is_empty() || left.is_zero() {
                break;
            }
            let mut fds: Vec<PollFd<'_>> = self
                .connections
                .values()
                .filter_map(Connection::stream)
                .map(|s| PollFd::new(std::os::fd::AsFd::as_fd(s), PollFlags::POLLOUT))
                .collect();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, timeout).is_err() {
                break;
            }
        }
        self.connections.clear();
        self.run_timer(false);
    }
}

#[cfg(any(test, fuzzing))]
impl Muxer {
    /// Panics where more is held than may be.
    pub fn check(&self) {
        assert!(self.connections.len() + self.handshakes.len() <= MAX_CONNECTIONS);
        assert!(self.replies.len() <= MAX_REPLIES);
        // Those that are gone may still be in line once.
        let waiting = self.connections.values().filter(|c| c.in_line).count();
        assert!(waiting <= self.line.len());
        for connection in self.connections.values() {
            assert!(connection.backlog() <= super::connection::BUF_ALLOC as usize);
        }
    }
}

/// The next number, from `first` on, that is no key of the map. The map has far fewer keys than there are numbers.
fn next_free<T>(last: &mut u32, first: u32, taken: &HashMap<u32, T>) -> u32 {
    loop {
        *last = last.wrapping_add(1).max(first) & !(1 << 31);
        if *last >= first && !taken.contains_key(last) {
            return *last;
        }
    }
}
