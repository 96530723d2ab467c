//! The control socket: requests in, replies and events out.
//!
//! Before the boot the process has one thread and listens only to the daemon that started it
//! ([`await_boot`]). Afterwards each connection has a thread of its own ([`Control`]), so that a client
//! that hangs or sends garbage hurts nobody else; and the machine goes on when all of them are gone.

mod events;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

pub use events::Events;

use crate::threads::{self, Kind};
use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use caisson_vmm_protocol::{
    Channel, ChannelError, Event, ExitReason, FdIndex, Frame, LayerPlace, PROTOCOL_VERSION, Reply,
    Request, STREAM_PORT, SavedMachine, Span, VmState, VmStatus,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::logs::{LogManager, NewLog};
use crate::pod::{Pod, Running};

/// The most connections at a time. A daemon uses one for each request that it has under way.
const MAX_CONNECTIONS: usize = 64;
/// How long the end of the machine waits until the containers' output is written.
const LAST_OUTPUT: Duration = Duration::from_secs(5);
/// How long a guest may take to accept the request to power off.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);
/// How long a client may take to send the rest of a frame, or to take one.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the daemon until it asks for the boot, or to join a pod. `None` if it went away before.
///
/// # Errors
/// [`ChannelError`] if what came is no request.
pub fn await_boot(channel: &mut Channel) -> Result<Option<Frame<Request>>, ChannelError> {
    set_patience(channel.stream())?;
    loop {
        let mut frame = match next_request(channel) {
            Err(ChannelError::Closed) => return Ok(None),
            other => other?,
        };
        let reply = match &mut frame.message {
            Request::Boot(_) | Request::Join(_) => return Ok(Some(frame)),
            Request::Status { .. } => Reply::Status(status(VmState::New)),
            Request::Kill => return Ok(None),
            _ => error("the machine has not been booted; send boot first"),
        };
        channel.send(&reply, &[])?;
    }
}

/// What the connections work on.
pub struct Control {
    running: Running,
    events: Arc<Events>,
    timings: Vec<Span>,
    connections: AtomicUsize,
    /// Watchers that have not been told everything yet.
    watchers: AtomicUsize,
}

impl Control {
    /// Takes control of a running machine.
    pub fn new(running: Running, events: Arc<Events>, timings: Vec<Span>) -> Arc<Self> {
        Arc::new(Self {
            running,
            events,
            timings,
            connections: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
        })
    }

    /// Serves a connection on a thread of its own.
    ///
    /// # Errors
    /// What the system says when it cannot make the thread.
    pub fn serve(self: &Arc<Self>, mut channel: Channel) -> io::Result<()> {
        set_patience(channel.stream())?;
        if self.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            let _ = channel.send(
                &error("too many control connections; close one of the others"),
                &[],
            );
            return Ok(());
        }
        let control = Arc::clone(self);
        let spawned = threads::spawn(Kind::Control, "control", 0, move || {
            // The end of a connection, whatever its cause, concerns nobody else.
            let _ = control.converse(&mut channel);
            control.connections.fetch_sub(1, Ordering::SeqCst);
        });
        if spawned.is_err() {
            self.connections.fetch_sub(1, Ordering::SeqCst);
        }
        spawned.map(drop)
    }

    /// Accepts connections until the process ends, on a thread of its own.
    ///
    /// # Errors
    /// What the system says when it cannot make the thread.
    pub fn listen(self: &Arc<Self>, listener: UnixListener) -> io::Result<()> {
        let control = Arc::clone(self);
        let accept = move || {
            for stream in listener.incoming() {
                let served = stream.and_then(|stream| {
                    stream.set_nonblocking(false)?;
                    control.serve(Channel::new(stream))
                });
                if served.is_err() {
                    // Out of descriptors or memory: waiting is all that can help.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        threads::spawn(Kind::Control, "listen", 0, accept).map(drop)
    }

    /// What runs.
    pub fn pod(&self) -> &Pod {
        &self.running.pod
    }

    /// Ends the machine's threads, once its end was told, and waits a bounded time for the containers' last output.
    pub fn stop(&self) {
        self.running.pod.stop();
        if let Some(logs) = &self.running.logs
            && !logs.finish(LAST_OUTPUT)
        {
            eprintln!("some output of containers could not be written before the end");
        }
    }

    /// Tells the end to the exit file and all watchers, and waits a bounded time for these.
    pub fn finish(&self, reason: &ExitReason, exit_file: Option<File>) {
        if let Some(file) = exit_file
            && let Err(error) = write_exit_file(file, reason)
        {
            eprintln!("the exit file could not be written: {error}");
        }
        self.events.publish(Event::Exited(reason.clone()));
        for _ in 0..200 {
            if self.watchers.load(Ordering::SeqCst) == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn converse(self: &Arc<Self>, channel: &mut Channel) -> Result<(), ChannelError> {
        loop {
            let frame = match next_request(channel) {
                Err(bad @ (ChannelError::Json(_) | ChannelError::TooLong(_))) => {
                    channel.send(&error(&bad), &[])?;
                    return Err(bad);
                }
                other => other?,
            };
            if matches!(frame.message, Request::Watch) {
                return self.watch(channel);
            }
            let reply = self.answer(frame);
            channel.send(&reply, &[])?;
        }
    }

    fn watch(&self, channel: &mut Channel) -> Result<(), ChannelError> {
        self.watchers.fetch_add(1, Ordering::SeqCst);
        let events = self.events.watch();
        let told = channel.send(&Reply::Done, &[]).and_then(|()| {
            events
                .iter()
                .try_for_each(|event| channel.send(&event, &[]))
        });
        self.watchers.fetch_sub(1, Ordering::SeqCst);
        told
    }

    fn answer(self: &Arc<Self>, frame: Frame<Request>) -> Reply {
        self.perform(frame).unwrap_or_else(error)
    }

    fn perform(self: &Arc<Self>, mut frame: Frame<Request>) -> Result<Reply, Box<dyn Error>> {
        let pod = &self.running.pod;
        match frame.message.clone() {
            Request::Boot(_) | Request::Join(_) => {
                return Err(
                    "the machine has been booted already; one process is one machine".into(),
                );
            }
            Request::Status { version } if version != PROTOCOL_VERSION => {
                return Err(format!(
                    "the daemon speaks control protocol {version}, this VMM speaks {PROTOCOL_VERSION}; install both from one release"
                )
                .into());
            }
            Request::Status { .. } => {
                return Ok(Reply::Status(VmStatus {
                    agent_ready: self.events.agent_ready(),
                    logs_held: self.running.logs.as_ref().is_some_and(LogManager::is_held),
                    landlock: self.running.landlock,
                    timings: self.timings.clone(),
                    ..status(pod.state())
                }));
            }
            Request::Pause => pod.pause()?,
            Request::Resume => pod.resume()?,
            Request::Kill => pod.ending().end(ExitReason::Killed),
            Request::Shutdown => self.shut_down()?,
            Request::AddLog(log) => {
                let logs = self.logs()?;
                self.events.forget_log(&log.container_id);
                logs.add(NewLog {
                    file: take(&mut frame, log.file)?,
                    stdout: take(&mut frame, log.stdout)?,
                    stderr: take(&mut frame, log.stderr)?,
                    container_id: log.container_id,
                    terminal: log.terminal,
                })?;
            }
            Request::ReopenLog { container_id, file } => {
                self.logs()?.reopen(&container_id, frame.take_fd(file)?)?;
            }
            Request::RemoveLog { container_id } => {
                self.logs()?.remove(&container_id);
                self.events.forget_log(&container_id);
            }
            Request::Attach {
                container_id,
                stdout,
                stderr,
            } => {
                let (stdout, stderr) = (take(&mut frame, stdout)?, take(&mut frame, stderr)?);
                self.logs()?.attach(&container_id, stdout, stderr)?;
            }
            Request::AddLayer { name, file } => {
                let layers = self
                    .running
                    .layers
                    .as_ref()
                    .ok_or("this pod's process has no disk of layers")?;
                let place = layers.add(&name, frame.take_fd(file)?)?;
                return Ok(Reply::LayerPlace {
                    offset: place.start,
                    bytes: place.end - place.start,
                });
            }
            Request::HoldLogs => self.logs()?.hold(),
            Request::ReleaseLogs => self.logs()?.release()?,
            Request::Save { to } => {
                let to = frame.take_fd(to)?;
                return self.save(to.into());
            }
            // The connection was turned into a stream of events before.
            Request::Watch => {}
        }
        Ok(Reply::Done)
    }

    /// Saves the machine on a thread of its own, the one that may read a vCPU's registers.
    fn save(self: &Arc<Self>, to: File) -> Result<Reply, Box<dyn Error>> {
        self.logs()?.wait_until_held()?;
        let control = Arc::clone(self);
        let save = move || control.pod().write(to);
        let thread = threads::spawn(Kind::Save, "save", 0, save)?;
        let written = thread
            .join()
            .map_err(|_| "the thread that saves has ended")?;
        let size = written?;
        let layers = self.running.layers.as_ref().map(|layers| layers.places());
        let places = layers.unwrap_or_default().into_iter();
        Ok(Reply::Saved(SavedMachine {
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            growth: size.growth,
            layers: places
                .map(|(name, place)| LayerPlace {
                    name,
                    offset: place.start,
                    bytes: place.end - place.start,
                })
                .collect(),
        }))
    }

    fn logs(&self) -> Result<&LogManager, &'static str> {
        self.running
            .logs
            .as_ref()
            .ok_or("this machine has no vsock device, so it has no containers' logs")
    }

    /// Asks the agent to power the machine off. It may take its time; the daemon does not wait for it.
    fn shut_down(&self) -> Result<(), Box<dyn Error>> {
        let connector = self
            .running
            .connector
            .clone()
            .ok_or("this machine has no vsock device, so its guest cannot be asked; kill it")?;
        self.running.pod.expect_end();
        let ask = move || {
            let asked = connector
                .dial(STREAM_PORT, SHUTDOWN_LIMIT)
                .and_then(|mut stream| {
                    stream.set_read_timeout(Some(SHUTDOWN_LIMIT))?;
                    stream.write_all(b"SHUTDOWN\n")?;
                    // Until the agent has read it, which it says by an answer or by closing.
                    stream.read(&mut [0; 64])
                });
            if let Err(error) = asked {
                eprintln!("the guest could not be asked to power off: {error}");
            }
        };
        threads::spawn(Kind::Control, "shutdown", 0, ask)?;
        Ok(())
    }
}

fn take(
    frame: &mut Frame<Request>,
    index: Option<FdIndex>,
) -> Result<Option<OwnedFd>, ChannelError> {
    index.map(|index| frame.take_fd(index)).transpose()
}

/// Waits for as long as it takes until a request begins; then it must come in time.
fn next_request(channel: &mut Channel) -> Result<Frame<Request>, ChannelError> {
    loop {
        let mut fds = [PollFd::new(channel.stream().as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
            Ok(_) => return channel.recv(),
        }
    }
}

fn set_patience(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn error(message: impl ToString) -> Reply {
    Reply::Error {
        message: message.to_string(),
    }
}

/// Of a process in this state of which nothing else is known.
fn status(state: VmState) -> VmStatus {
    VmStatus {
        version: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state,
        agent_ready: false,
        logs_held: false,
        landlock: 0,
        timings: Vec::new(),
    }
}

fn write_exit_file(mut file: File, reason: &ExitReason) -> io::Result<()> {
    file.set_len(0)?;
    let json = serde_json::to_vec(reason)?;
    file.write_all(&json)
}
