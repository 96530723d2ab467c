//! What the fuzz targets of this crate do with one input (see `tests/fuzz`): a client says it, on a clock that goes on
//! by itself while everybody waits.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, split};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol;

use crate::spdy::frame::{Control, HEAD, Head, data_head};
use crate::spdy::headers::{Deflater, Inflater};
use crate::{
    Backend, BackendError, Input, Output, Request, Streams, Wants, portforward, remotecommand,
    websocket,
};

/// What a pipe between the two sides holds.
const PIPE: usize = 64 << 10;
/// Longer than all that either side waits for.
const LONG: Duration = Duration::from_secs(3600);

/// A process that says what it is told.
struct Echo;

impl Echo {
    async fn echo(input: &mut Input, output: &Output) {
        while let Ok(Some(chunk)) = input.next().await {
            if output.write(chunk.bytes.clone()).await.is_err() {
                return;
            }
        }
    }
}

impl Backend for Echo {
    async fn exec(
        &self,
        _: &str,
        _: Vec<String>,
        _: bool,
        streams: &mut Streams,
    ) -> Result<i32, BackendError> {
        if let Some(resize) = &mut streams.resize {
            while resize.next().await.is_some() {}
        }
        let output = streams.stdout.as_ref().or(streams.stderr.as_ref());
        if let (Some(stdin), Some(output)) = (&mut streams.stdin, output) {
            Self::echo(stdin, output).await;
        }
        Ok(3)
    }

    async fn attach(&self, name: &str, streams: &mut Streams) -> Result<(), BackendError> {
        self.exec(name, Vec::new(), false, streams).await.map(drop)
    }

    async fn port_forward(
        &self,
        _: &str,
        port: u16,
        input: &mut Input,
        output: &Output,
    ) -> Result<(), BackendError> {
        if port == 9 {
            return Err(BackendError("nobody listens".into()));
        }
        Self::echo(input, output).await;
        output.finish().await;
        Ok(())
    }
}

fn wants(bits: u8) -> Wants {
    Wants {
        stdin: bits & 1 != 0,
        stdout: bits & 2 != 0,
        stderr: bits & 4 != 0,
        tty: bits & 8 != 0,
    }
}

fn request(bits: u8) -> Request {
    Request::Exec {
        container: "c".into(),
        command: vec!["cat".into()],
        wants: wants(bits),
    }
}

/// Has a client say `bytes` in pieces and go, while `serve` serves it; returns what it heard.
fn talk<F: Future<Output = ()> + Send + 'static>(
    pieces: Vec<Vec<u8>>,
    serve: impl FnOnce(DuplexStream) -> F,
) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (theirs, ours) = tokio::io::duplex(PIPE);
        let (mut reader, mut writer) = split(theirs);
        let say = async {
            for piece in pieces {
                if writer.write_all(&piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _ = writer.shutdown().await;
        };
        let mut heard = Vec::new();
        let hear = async {
            let _ = reader.read_to_end(&mut heard).await;
        };
        let served = tokio::spawn(serve(ours));
        let both = async { tokio::join!(say, hear, served).2 };
        let served = tokio::time::timeout(LONG, both).await;
        let served = served.expect("a client that has gone is served for ever");
        served.expect("the server panicked");
        heard
    })
}

/// Frames out of an input: what a client may send, with headers that are compressed as they must be, and what not.
fn frames(mut input: &[u8]) -> Vec<Vec<u8>> {
    let mut deflater = Deflater::new().expect("a compressor");
    let mut frames = Vec::new();
    while let [kind, id, count, rest @ ..] = input {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*count)));
        input = rest;
        let (id, flags) = (u32::from(id & 31), id >> 5);
        let control = |kind: u16, payload: &[u8]| {
            let length = (payload.len() as u32).to_be_bytes();
            let head = [
                0x80, 3, 0, kind as u8, flags, length[1], length[2], length[3],
            ];
            [&head[..], payload].concat()
        };
        let with_id = |rest: &[u8]| [&id.to_be_bytes()[..], rest].concat();
        frames.push(match kind % 12 {
            0..3 => [&data_head(id.max(1), flags & 1 != 0, body.len())[..], body].concat(),
            3..6 => {
                // A name/value block that is written by hand, or one of those that Kubernetes sends.
                let block = match body {
                    [choice, rest @ ..] if *choice < 16 => known(*choice, rest),
                    other => other.to_vec(),
                };
                let block = deflater.pack(&block).expect("a block");
                control(1, &with_id(&[&[0; 6], &*block].concat()))
            }
            6 => {
                let block = deflater.pack(body).expect("a block");
                control(if flags & 2 == 0 { 2 } else { 8 }, &with_id(&block))
            }
            7 => control(3, &with_id(body)),
            8 => control(6, &with_id(&[])),
            9 => control(u16::from(id as u8), body),
            // Much data, of which an input has not so much.
            10 => {
                let length = usize::from(*count) << 8;
                [&data_head(id.max(1), false, length)[..], &vec![0; length]].concat()
            }
            _ => body.to_vec(),
        });
    }
    frames
}

/// The headers of a stream as Kubernetes' clients send them.
fn known(choice: u8, rest: &[u8]) -> Vec<u8> {
    let kind = ["error", "stdin", "stdout", "stderr", "resize", "data"][usize::from(choice) % 6];
    let port = rest.first().map_or(80, |port| *port).to_string();
    let id = rest.get(1).map_or(0, |id| *id).to_string();
    let mut block = Vec::new();
    let pairs = [("streamtype", kind), ("port", &port), ("requestid", &id)];
    let pairs = &pairs[..if choice < 6 { 3 } else { 2 }];
    let mut put = |bytes: &[u8]| {
        block.extend((bytes.len() as u32).to_be_bytes());
        block.extend(bytes);
    };
    for (name, value) in pairs {
        put(name.as_bytes());
        put(value.as_bytes());
    }
    [&(pairs.len() as u32).to_be_bytes()[..], &block].concat()
}

/// Panics where a server has sent what is no SPDY.
fn check(mut heard: &[u8]) {
    let mut inflater = Inflater::default();
    while let Some((head, rest)) = heard.split_first_chunk::<HEAD>() {
        let head = Head::parse(*head).expect("a frame of the server's");
        let (Head::Data { length, .. } | Head::Control { length, .. }) = head;
        // The last frame may be cut off where the connection was.
        let Some((payload, rest)) = rest.split_at_checked(length) else {
            return;
        };
        heard = rest;
        if let Head::Control { kind, flags, .. } = head {
            Control::parse(kind, flags, payload, &mut inflater).expect("a frame of the server's");
        }
    }
}

/// SPDY: exec and attach in each version, and port-forward.
pub fn spdy(data: &[u8]) {
    let [how, bits, rest @ ..] = data else { return };
    let pieces = if how & 0x80 == 0 {
        frames(rest)
    } else {
        vec![rest.to_vec()]
    };
    let (how, bits) = (usize::from(how & 7), *bits);
    let heard = talk(pieces, async move |transport| match how {
        0 | 5.. => portforward::serve_spdy(transport, "p".into(), Arc::new(Echo)).await,
        version => {
            let protocol = remotecommand::SPDY_PROTOCOLS[version - 1];
            remotecommand::serve_spdy(transport, request(bits), protocol, &Echo).await;
        }
    });
    check(&heard);
}

/// Messages out of an input: frames of a client, each masked with zeros.
fn messages(mut input: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let [head, count, rest @ ..] = input {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*count & 127)));
        input = rest;
        // Final frames of the binary kind are what is sent most often.
        let head = if head & 0x70 == 0 { 0x82 } else { head & 0x8f };
        messages.push(match count & 128 {
            0 if body.len() < 126 => {
                [&[head, 0x80 | body.len() as u8, 0, 0, 0, 0][..], body].concat()
            }
            // A long one, with the body at its beginning.
            _ => {
                let length = (body.len() as u16) << 8;
                let [high, low] = length.to_be_bytes();
                let mut long = vec![head, 0xfe, high, low, 0, 0, 0, 0];
                long.extend(body);
                long.resize(8 + usize::from(length), 0);
                long
            }
        });
    }
    messages
}

/// WebSocket: channels of exec and attach in both versions, those of port-forward, and the tunnel.
pub fn web_socket(data: &[u8]) {
    let [how, bits, rest @ ..] = data else { return };
    let pieces = match how >> 6 {
        0 | 1 => messages(rest),
        // A tunnel's messages are frames of SPDY.
        2 => frames(rest)
            .into_iter()
            .flat_map(|frame| {
                let head = vec![0x82, 0xfe, (frame.len() >> 8) as u8, frame.len() as u8];
                [head, vec![0; 4], frame]
            })
            .collect(),
        _ => vec![rest.to_vec()],
    };
    let (how, bits) = (how & 3, *bits);
    talk(pieces, async move |transport| {
        let config = Some(websocket::config());
        let role = protocol::Role::Server;
        let socket = WebSocketStream::from_raw_socket(transport, role, config).await;
        match how {
            0 | 1 => {
                let protocol = remotecommand::WEBSOCKET_PROTOCOLS[usize::from(how)];
                remotecommand::serve_websocket(socket, request(bits), protocol, &Echo).await;
            }
            2 => {
                let ports = vec![80, 9];
                portforward::serve_channels(socket, "p".into(), ports, Arc::new(Echo)).await;
            }
            _ => {
                let tunnel = websocket::Tunnel::new(socket);
                portforward::serve_spdy(tunnel, "p".into(), Arc::new(Echo)).await;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    include!("../../../tests/fuzz/seed_tests.rs");

    seeds!(spdy web_socket);
}
