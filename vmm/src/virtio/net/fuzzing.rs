//! One input of the fuzz target `net`: a driver's frames and its tricks, and frames from the other end of the cable.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use super::tap::{HEADER, MOST};
use super::*;
use crate::fuzzing::guest::{Device, Guest, NoInterrupt};
use crate::fuzzing::input::Input;

struct Fuzzed {
    frames: Frames,
    /// The other end of the cable.
    wire: Option<UnixDatagram>,
}

impl Device for Fuzzed {
    type Handler = Frames;

    fn handler(&mut self) -> &mut Frames {
        &mut self.frames
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0..3 => {
                let frame = vec![0x5a; usize::from(input.word())];
                if let Some(wire) = &self.wire {
                    // A full cable loses frames.
                    let _ = wire.send(&frame);
                }
            }
            3 => guest.request(1, &[&[0; HEADER], input.counted()], &[]),
            4 => guest.request_with(1, &[0; HEADER], input.length()),
            5 => self.wire = self.wire.take().filter(|_| input.byte() != 0xff),
            _ => {
                let room = input.length();
                for _ in 0..input.byte() % 16 {
                    guest.request(0, &[], &[room]);
                }
            }
        }
    }

    fn check(&mut self) {
        let mut frame = [0; HEADER + MOST + 1];
        while let Some(Ok(len)) = self.wire.as_ref().map(|wire| wire.recv(&mut frame)) {
            let allowed = HEADER + 14..=HEADER + MOST;
            assert!(allowed.contains(&len), "a frame of {len} bytes is sent");
        }
    }
}

fn cable() -> (UnixDatagram, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors that the call makes.
    let made = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
            fds.as_mut_ptr(),
        )
    };
    assert_eq!(made, 0, "a socket pair");
    // SAFETY: both are open, and nobody else's.
    unsafe {
        (
            UnixDatagram::from_raw_fd(fds[0]),
            OwnedFd::from_raw_fd(fds[1]),
        )
    }
}

/// The network device.
pub fn net(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.byte();
    let (guest, [receive, transmit]) = Guest::new(DEVICE, kind & 1 != 0, QUEUE_SIZES, &mut input);
    let (wire, tap) = cable();
    let features = if kind & 2 != 0 {
        1 << VIRTIO_NET_F_MRG_RXBUF
    } else {
        0
    };
    let frames = Frames::new(
        Tap::from_socket(tap, false).expect("a socket"),
        guest.memory.clone(),
        Arc::new(NoInterrupt),
        (receive, transmit),
        features,
    );
    let wire = Some(wire);
    guest.run(&mut Fuzzed { frames, wire }, input, true);
}
