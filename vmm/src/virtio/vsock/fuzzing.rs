//! One input of the fuzz targets `vsock` and `vsock_packets`: packets of the guest, what clients on the host do
//! meanwhile, and, for the former, a driver's tricks.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::connector::Wish;
use super::packet::{HOST_CID, Header, TYPE_STREAM};
use super::*;
use crate::fuzzing::guest::{Device, Guest};
use crate::fuzzing::input::Input;

const CID: u32 = 3;
/// The port that the device gives its first connection.
const FIRST: u32 = (1 << 30) + 1;
const MOST_CLIENTS: usize = 8;

enum Client {
    Inside(Wish),
    Outside(UnixStream),
    Gone,
}

impl Client {
    fn stream(&self) -> Option<&UnixStream> {
        match self {
            Self::Inside(wish) => Some(&wish.stream),
            Self::Outside(stream) => Some(stream),
            Self::Gone => None,
        }
    }
}

struct Fuzzed {
    handler: VsockHandler,
    requests: Arc<Requests>,
    clients: Vec<Client>,
}

impl Fuzzed {
    fn client(&mut self, input: &mut Input<'_>) -> Option<&mut Client> {
        let index = usize::from(input.byte()) % MOST_CLIENTS;
        self.clients.get_mut(index)
    }

    /// Reads what is there; the end is no error.
    fn read(&mut self, input: &mut Input<'_>) {
        let most = u64::from(input.length());
        if let Some(stream) = self.client(input).and_then(|client| client.stream()) {
            let _ = stream.take(most).read_to_end(&mut Vec::new());
        }
    }

    fn packet(guest: &mut Guest, input: &mut Input<'_>) {
        let port = input.byte();
        let (src_port, dst_port) = match port {
            0xff => (input.long(), input.long()),
            // The port in the guest of the n-th connection is n.
            near => (u32::from(near) % 8, FIRST + u32::from(near) % 8),
        };
        let op = input.byte();
        let flags = input.byte();
        let mut header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            len: 0,
            kind: TYPE_STREAM,
            op: u16::from(op & 15),
            flags: u32::from(flags & 3),
            buf_alloc: u32::from(input.word()) << 4,
            fwd_cnt: input.word().into(),
        };
        if flags & 4 != 0 {
            header.kind = input.word();
            header.fwd_cnt = input.long();
            header.buf_alloc = input.long();
        }
        if op & 0x80 == 0 {
            let payload = input.counted();
            header.len = payload.len() as u32;
            guest.request(1, &[&header.to_bytes(), payload], &[]);
        } else {
            let len = input.length();
            header.len = len;
            if op & 0x40 != 0 {
                header.len = input.length();
            }
            guest.request_with(1, &header.to_bytes(), len);
        }
    }
}

impl Device for Fuzzed {
    type Handler = VsockHandler;

    fn handler(&mut self) -> &mut VsockHandler {
        &mut self.handler
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0 | 1 if self.clients.len() < MOST_CLIENTS => {
                // The n-th connection goes to port n.
                let wish = self.requests.wish(self.clients.len() as u32).expect("room");
                wish.stream.set_nonblocking(true).expect("a socket");
                self.clients.push(Client::Inside(wish));
            }
            2 if self.clients.len() < MOST_CLIENTS => {
                let (ours, theirs) = UnixStream::pair().expect("sockets");
                ours.set_nonblocking(true).expect("a socket");
                let _ = (&ours).write(input.counted());
                self.handler.muxer.greet(theirs, guest.poll());
                self.clients.push(Client::Outside(ours));
            }
            3 => {
                if let Some(stream) = self.client(input).and_then(|client| client.stream()) {
                    let mut stream: &UnixStream = stream;
                    let _ = stream.write(&vec![0x5a; input.length().min(1 << 18) as usize]);
                }
            }
            4 => self.read(input),
            5 => {
                if let Some(client) = self.client(input) {
                    let how = input.byte();
                    match (how, client.stream()) {
                        (0, Some(stream)) => drop(stream.shutdown(Shutdown::Write)),
                        (1, Some(stream)) => drop(stream.shutdown(Shutdown::Read)),
                        _ => *client = Client::Gone,
                    }
                }
            }
            6..10 => {
                let room = input.length();
                for _ in 0..input.byte() % 16 {
                    guest.request(0, &[], &[44, room]);
                }
            }
            _ => Self::packet(guest, input),
        }
    }

    fn check(&mut self) {
        self.handler.muxer.check();
    }
}

fn run(data: &[u8], hostile: bool) {
    let mut input = Input::new(data);
    let event_index = input.byte() & 1 != 0;
    let (guest, [receive, transmit, _event]) =
        Guest::new(NAME, event_index, QUEUE_SIZES, &mut input);
    let requests = Requests::new().expect("an eventfd");
    let muxer = Muxer::new(CID, None, Arc::clone(&requests), Arc::new(|_| {})).expect("a timer");
    let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd");
    let mut device = Fuzzed {
        handler: VsockHandler::new(guest.memory.clone(), receive, transmit, again, muxer),
        requests,
        clients: Vec::new(),
    };
    guest.run(&mut device, input, hostile);
    device.handler.muxer.stop(Duration::ZERO);
}

/// The vsock device and its rings.
pub fn vsock(data: &[u8]) {
    run(data, true);
}

/// The vsock device by packets alone.
pub fn vsock_packets(data: &[u8]) {
    run(data, false);
}
