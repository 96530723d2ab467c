//! The life of the process: one control socket, one machine, one end.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;

use caisson_vmm_protocol::{CONTROL_FD, Channel, ExitReason, Frame, Reply, Request};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{SFlag, fstat};

use crate::boot::build_and_boot;
use crate::config::MachineConfig;
use crate::control::{Control, Events, await_boot};
use crate::host::{self, HostConfig};
use crate::pod::{Pod, Running};
use crate::template::Making;
use crate::threads::{self, Kind};
use crate::timeline::Timeline;
use crate::vm::Ending;

/// The machine could not be started.
pub const EXIT_START: u8 = 1;
/// Started by hand or wrongly.
pub const EXIT_USAGE: u8 = 2;
/// The most open descriptors.
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// The exit status that stands for a reason.
pub fn exit_status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PoweredOff => 0,
        ExitReason::Reset => 10,
        ExitReason::Panicked => 11,
        ExitReason::Killed => 12,
        ExitReason::GuestError(_) => 13,
        ExitReason::InternalError(_) => 14,
    }
}

/// Runs one machine from its control socket to its end.
pub fn run() -> ExitCode {
    let mut timeline = Timeline::new();
    // Whatever else was left open by mistake: a guest must not find it here.
    // SAFETY: first of all; nothing in this process has opened a descriptor yet.
    unsafe { libc::close_range(CONTROL_FD as u32 + 1, u32::MAX, 0) };
    let Some(mut channel) = control_socket() else {
        eprintln!(
            "caisson-vmm: descriptor {CONTROL_FD} is no socket; this program is started by `caisson serve`"
        );
        return ExitCode::from(EXIT_USAGE);
    };
    raise_descriptor_limit();
    let frame = match await_boot(&mut channel) {
        Ok(Some(frame)) => frame,
        Ok(None) => return ExitCode::from(EXIT_START),
        Err(error) => return refuse(&mut channel, error),
    };
    timeline.mark("boot request");
    let ending = Ending::new();
    match start(frame, &ending, &mut timeline) {
        Ok(started) => serve(channel, started, &ending, &timeline),
        Err(error) => refuse(&mut channel, error),
    }
}

/// What the end of the process needs besides the machine.
struct Started {
    running: Running,
    making: Option<Making>,
    events: Arc<Events>,
    control_listener: Option<std::os::unix::net::UnixListener>,
    exit_file: Option<File>,
}

fn start(
    mut frame: Frame<Request>,
    ending: &Arc<Ending>,
    timeline: &mut Timeline,
) -> Result<Started, Box<dyn std::error::Error>> {
    let request = frame.message.clone();
    let events = Arc::new(Events::default());
    let signals = block_signals()?;
    end_on_panic(ending);
    let started = match request {
        Request::Boot(config) => {
            let mut config = MachineConfig::new(*config, &mut frame)?;
            drop(frame);
            let control_listener = config.control_listener.take();
            let exit_file = config.exit_file.take();
            let (running, making) = build_and_boot(config, ending, &events, timeline)?;
            Started {
                running,
                making,
                events,
                control_listener,
                exit_file,
            }
        }
        Request::Join(config) => {
            let mut config = HostConfig::new(*config, &mut frame)?;
            drop(frame);
            let control_listener = config.control_listener.take();
            let exit_file = config.exit_file.take();
            let running = host::join(config, ending, &events, timeline)?;
            Started {
                running,
                making: None,
                events,
                control_listener,
                exit_file,
            }
        }
        _ => return Err("the first request must be boot or join".into()),
    };
    end_on_signals(signals, ending)?;
    Ok(started)
}

fn serve(
    mut channel: Channel,
    started: Started,
    ending: &Arc<Ending>,
    timeline: &Timeline,
) -> ExitCode {
    let timings = timeline.spans().to_vec();
    let control = Control::new(started.running, started.events, timings);
    // A daemon that is gone already changes nothing: it finds the machine again by the listener.
    let _ = channel.send(&Reply::Done, &[]);
    let served = control.serve(channel).and_then(|()| {
        started
            .control_listener
            .map_or(Ok(()), |listener| control.listen(listener))
    });
    if let Err(error) = served {
        ending.end(ExitReason::InternalError(format!(
            "no thread for the control socket: {error}"
        )));
    }
    if let Some(making) = started.making {
        make_template(making, control.pod(), ending);
    }
    if let Err(error) = threads::confine_self(Kind::Main) {
        ending.end(ExitReason::InternalError(error.to_string()));
    }
    let reason = ending.wait();
    control.stop();
    control.finish(&reason, started.exit_file);
    ExitCode::from(exit_status(&reason))
}

/// Makes a template of the machine, which ends with that.
fn make_template(making: Making, pod: &Pod, ending: &Arc<Ending>) {
    let Pod::Machine(machine) = pod else {
        return;
    };
    match making.finish(machine) {
        Ok(true) => ending.end(ExitReason::PoweredOff),
        // It has ended already, and why is known.
        Ok(false) => {}
        Err(error) => ending.end(ExitReason::InternalError(error.to_string())),
    }
}

fn refuse(channel: &mut Channel, error: impl std::fmt::Display) -> ExitCode {
    let message = error.to_string();
    eprintln!("caisson-vmm: {message}");
    // The daemon may be gone; then nobody wants to know.
    let _ = channel.send(&Reply::Error { message }, &[]);
    ExitCode::from(EXIT_START)
}

/// The file server holds a descriptor for each file that the guest knows, and the usual limit is 1024. How many a guest
/// can make it open has an end all the same.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        let most = hard.min(MAX_DESCRIPTORS);
        setrlimit(Resource::RLIMIT_NOFILE, most, most)
    });
    if let Err(error) = raised {
        eprintln!("caisson-vmm: the limit of open files stays what it was: {error}");
    }
}

/// The control socket, if this process was started with one.
fn control_socket() -> Option<Channel> {
    // SAFETY: called once, first of all; nothing in this process has opened or owns descriptor 3.
    let fd = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    let is_socket = fstat(&fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFSOCK
    });
    if !is_socket {
        // Not ours to close.
        std::mem::forget(fd);
        return None;
    }
    Some(Channel::new(UnixStream::from(fd)))
}

/// Blocks termination signals in this thread and in those that it starts.
fn block_signals() -> nix::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

/// Termination signals end the machine in order.
fn end_on_signals(signals: SigSet, ending: &Arc<Ending>) -> std::io::Result<()> {
    let ending = Arc::clone(ending);
    let wait = move || {
        if signals.wait().is_ok() {
            ending.end(ExitReason::Killed);
        }
    };
    threads::spawn(Kind::Watch, "signals", 0, wait).map(drop)
}

/// A bug in one thread ends the machine with a reason instead of leaving it half alive.
fn end_on_panic(ending: &Arc<Ending>) {
    let ending = Arc::clone(ending);
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        ending.end(ExitReason::InternalError(format!(
            "a thread of the VMM panicked: {info}"
        )));
    }));
}
