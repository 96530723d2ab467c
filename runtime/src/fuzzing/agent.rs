//! One input of the fuzz target `agent_replies`: what an agent, or a pod process that a guest has taken over, says to
//! the daemon.

use caisson_proto::agent::{self, agent_client::AgentClient};
use prost::Message;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::runtime::{Builder, Runtime};
use tonic::Request;
use tonic::transport::Endpoint;

use crate::cri::containers::fuzzing as containers;
use crate::sandbox::fuzzing as sandbox;

/// The most bytes of one answer that the daemon takes, as a pipe holds them.
const PIPE: usize = 1 << 16;
/// Longer than all that the daemon waits for.
const LONG: std::time::Duration = std::time::Duration::from_secs(3600);

fn runtime() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
}

/// A runtime whose clock goes on by itself while everybody waits.
fn paused() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    builder.build().expect("a runtime")
}

/// The call that is made: the bytes are the answer to it.
fn call(said: Vec<u8>) {
    paused().block_on(async {
        let (theirs, ours) = tokio::io::duplex(PIPE);
        let mut ours = Some(hyper_util::rt::TokioIo::new(ours));
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let io: Option<hyper_util::rt::TokioIo<DuplexStream>> = ours.take();
            async { io.ok_or_else(|| std::io::Error::other("there is one connection")) }
        });
        let channel = Endpoint::from_static("http://agent").connect_with_connector_lazy(connector);
        let mut client = AgentClient::new(channel).max_decoding_message_size(sandbox::MAX_ANSWER);
        let (mut reader, mut writer) = tokio::io::split(theirs);
        let say = async {
            let _ = writer.write_all(&said).await;
            let _ = writer.shutdown().await;
        };
        let mut nowhere = tokio::io::sink();
        let hear = tokio::io::copy(&mut reader, &mut nowhere);
        let listen = tokio::spawn(async move {
            let stats = client.stats(Request::new(agent::StatsRequest::default()));
            if let Ok(answer) = stats.await {
                containers::stats(&answer.into_inner());
            }
        });
        let all = async { tokio::join!(say, hear, listen).2 };
        let ended = tokio::time::timeout(LONG, all).await;
        let heard = ended.expect("an agent that has gone is waited for");
        heard.expect("the client panicked");
    });
}

/// Frames of HTTP/2 around what the input says: settings, then an answer's head, its message and its end.
fn http2(mut input: &[u8]) -> Vec<u8> {
    let mut said = Vec::new();
    let mut frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        said.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        said.extend([kind, flags, 0, 0, 0, stream]);
        said.extend(payload);
    };
    frame(4, 0, 0, &[]);
    while let [kind, count, rest @ ..] = input {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*count)));
        input = rest;
        match kind {
            // :status 200 and content-type application/grpc, not indexed.
            0 => {
                let mut head = vec![0x88, 0x0f, 0x10, 16];
                head.extend(b"application/grpc");
                frame(1, 4, 1, &head);
            }
            1 => {
                let mut message = vec![0];
                message.extend((body.len() as u32).to_be_bytes());
                message.extend(body);
                frame(0, 0, 1, &message);
            }
            // grpc-status 0.
            2 => {
                let mut end = vec![0x40, 11];
                end.extend(b"grpc-status");
                end.extend([1, b'0']);
                frame(1, 5, 1, &end);
            }
            3 => frame(0, body.first().copied().unwrap_or_default() & 1, 1, body),
            // Any frame; what is above the types there are, on the call's stream.
            kind => frame(kind & 15, kind >> 4, u8::from(kind & 0x80 != 0), body),
        }
    }
    said
}

/// Everything that the daemon reads of a pod.
pub fn agent_replies(data: &[u8]) {
    let Some((kind, said)) = data.split_first() else {
        return;
    };
    match kind % 9 {
        0 => call(http2(said)),
        1 => call(said.to_vec()),
        2 => {
            if let Ok(answer) = agent::StatsResponse::decode(said) {
                containers::stats(&answer);
            }
        }
        3 => {
            if let Ok(answer) = agent::WaitResponse::decode(said) {
                containers::exit(answer.status.unwrap_or_default());
            }
        }
        4 => runtime().block_on(sandbox::answer_line(said)),
        5 => runtime().block_on(sandbox::events(said)),
        6 => sandbox::reply(said),
        8 => crate::snapshot::fuzzing::machine(said),
        _ => {
            // What the agent is told of a container once it is made, and of itself.
            let _ = agent::CreateContainerResponse::decode(said);
            let _ = agent::VersionResponse::decode(said);
        }
    }
}
