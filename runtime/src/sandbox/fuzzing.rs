//! What is read of an agent and of a pod process, for the fuzz target `agent_replies`.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use caisson_vmm_protocol::Request;
use tokio::io::AsyncWriteExt;

pub(crate) use super::agent::MAX_ANSWER;
use super::agent::read_line;
use super::pod::control::{exchange, follow, sentence};

/// The line that answers a header.
pub(crate) async fn answer_line(said: &[u8]) {
    let (mut ours, mut theirs) = tokio::net::UnixStream::pair().expect("sockets");
    theirs.write_all(said).await.expect("room");
    drop(theirs);
    if let Ok(line) = read_line(&mut ours).await {
        let end = said.iter().position(|byte| *byte == b'\n').expect("a line");
        assert_eq!(line, String::from_utf8_lossy(&said[..end]));
    }
}

/// What a watcher hears of a pod process, until it says how it ended or is gone.
pub(crate) async fn events(said: &[u8]) {
    let (ours, mut theirs) = tokio::net::UnixStream::pair().expect("sockets");
    let frames = said.split(|byte| *byte == 0xff);
    let all: Vec<u8> = frames
        .flat_map(|frame| [&(frame.len() as u32).to_le_bytes(), frame].concat())
        .collect();
    // At the same time: a socket has room for some hundreds of frames, however small they are.
    let (_, (drained, reason)): (_, (BTreeSet<String>, _)) = tokio::join!(
        async move {
            // A watcher that has heard enough hangs up.
            let _ = theirs.write_all(&all).await;
        },
        follow(ours)
    );
    assert!(drained.len() <= said.len());
    if let Some(reason) = reason {
        let _ = sentence(&reason);
    }
}

/// The answer to a request.
pub(crate) fn reply(said: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let length = (said.len() as u32).to_le_bytes();
    theirs.write_all(&[&length, said].concat()).expect("room");
    theirs.shutdown(Shutdown::Write).expect("a socket");
    if let Err(error) = exchange(ours, &Request::Pause, &[], (), Duration::from_secs(20)) {
        assert!(!error.to_string().is_empty());
    }
}
