//! One input of the fuzz target `control`: what comes on the control socket, before the machine is there and after.

use std::net::Shutdown;
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::*;
use crate::config::MachineConfig;
use crate::fuzzing::input::Input;
use crate::host::{HostConfig, HostPod};
use crate::logs::fuzzing::Said;
use crate::pod::Pod;
use crate::virtio::blk::Layers;
use crate::vm::Ending;

/// More fit into no input that says something new.
const MOST_FRAMES: usize = 16;
/// No frame is a JSON text with this byte in it, so it ends one.
const END: u8 = 0xff;

/// Sends what the input says: frames, each with descriptors, or bytes without a form.
fn send(stream: &UnixStream, input: &mut Input<'_>) {
    let kind = input.byte();
    if kind & 1 != 0 {
        let _ = (&*stream).write_all(input.rest());
        return;
    }
    for frame in input.rest().split(|byte| *byte == END).take(MOST_FRAMES) {
        let (count, json) = frame.split_at(frame.len().min(1));
        let files: Vec<OwnedFd> = (0..count.first().map_or(0, |count| count % 8))
            .map(|_| memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a file"))
            .collect();
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        // An input is short.
        let bytes = [&(json.len() as u32).to_le_bytes(), json].concat();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[io::IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_DONTWAIT,
            None,
        );
        if !sent.is_ok_and(|sent| sent == bytes.len()) {
            return;
        }
    }
}

/// An agent that opens each stream and has nothing to say.
fn silent() -> Said {
    Said(b"OK\n".to_vec())
}

fn running(events: &Arc<Events>) -> Arc<Control> {
    let null = File::options().write(true).open("/dev/null");
    let sink = Arc::clone(events);
    let running = Running {
        pod: Pod::Host(HostPod::alone(null.expect("/dev/null"), Ending::new())),
        logs: Some(LogManager::new(
            silent(),
            Arc::new(move |event| sink.publish(event)),
        )),
        layers: Some(Arc::new(Layers::default())),
        landlock: 0,
        connector: Some(Arc::new(silent())),
    };
    Control::new(running, Arc::clone(events), Vec::new())
}

/// The control protocol.
pub fn control(data: &[u8]) {
    let (theirs, ours) = UnixStream::pair().expect("sockets");
    let mut input = Input::new(data);
    send(&theirs, &mut input);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let mut channel = Channel::new(ours);
    // The first request that makes a machine is checked; those behind it are for a machine that runs.
    if let Ok(Some(mut frame)) = await_boot(&mut channel) {
        let refused = match frame.message.clone() {
            Request::Boot(config) => MachineConfig::new(*config, &mut frame).err(),
            Request::Join(config) => HostConfig::new(*config, &mut frame).err(),
            other => panic!("{other:?} is no way to begin"),
        };
        if let Some(error) = refused {
            assert!(!error.to_string().is_empty());
        }
    }
    let events = Arc::new(Events::default());
    // The end of all events is near, so that a watcher does not wait for it.
    events.publish(Event::Exited(ExitReason::Killed));
    let control = running(&events);
    let _ = control.converse(&mut channel);
    let ended = control
        .running
        .logs
        .as_ref()
        .is_none_or(|logs| logs.finish(LAST_OUTPUT));
    assert!(ended, "a log is not written to its end");
}
