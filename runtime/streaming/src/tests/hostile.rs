//! Clients that do not keep to the protocol.

use std::time::Duration;

use tokio::io::DuplexStream;

use super::*;
use crate::spdy::Role;
use crate::spdy::frame::{Control, HEAD, Head, data_head};
use crate::spdy::headers::{Deflater, Inflater};

/// A server connection, and the raw bytes' other end.
fn raw() -> (Connection, DuplexStream) {
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    (Connection::new(ours, Role::Server).unwrap(), theirs)
}

fn syn(deflater: &mut Deflater, id: u32) -> Vec<u8> {
    let control = Control::SynStream {
        id,
        fin: false,
        unidirectional: false,
        headers: Headers::new([("streamtype", "data")]),
    };
    control.encode(deflater).unwrap()
}

/// The next control frame that the server sends.
async fn control(stream: &mut DuplexStream, inflater: &mut Inflater) -> Option<Control> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head).await.ok()?;
    let Head::Control {
        kind,
        flags,
        length,
    } = Head::parse(head).unwrap()
    else {
        panic!("data");
    };
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await.unwrap();
    Some(Control::parse(kind, flags, &payload, inflater).unwrap())
}

#[tokio::test]
async fn what_is_no_spdy_ends_the_connection_and_nothing_else() {
    let mut deflater = Deflater::new().unwrap();
    let good = syn(&mut deflater, 1);
    let mut broken = good.clone();
    let last = broken.len() - 3;
    broken[last] ^= 0x55;
    broken[last - 4] ^= 0x55;
    let cases: Vec<Vec<u8>> = vec![
        vec![0x80, 2, 0, 1, 0, 0, 0, 0],
        vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
        vec![0x80, 3, 0, 1, 0, 0, 0, 2, 0, 0],
        vec![0; 8],
        vec![0xff; 4096],
        broken,
    ];
    for case in cases {
        let (mut connection, mut client) = raw();
        client.write_all(&case).await.unwrap();
        assert!(connection.accept().await.is_none(), "{case:?}");
        connection.closed().wait().await;
        let bye = control(&mut client, &mut Inflater::default())
            .await
            .unwrap();
        assert!(matches!(bye, Control::GoAway { status: 1, .. }), "{bye:?}");
    }
}

#[tokio::test]
async fn half_a_frame_and_the_end() {
    for length in 1..20 {
        let (mut connection, mut client) = raw();
        let frame = syn(&mut Deflater::new().unwrap(), 1);
        client.write_all(&frame[..length]).await.unwrap();
        drop(client);
        assert!(connection.accept().await.is_none());
    }
    // Data that is cut off: what came is there, then the reader learns that the client has gone.
    let (mut connection, mut client) = raw();
    let mut bytes = syn(&mut Deflater::new().unwrap(), 1);
    bytes.extend(data_head(1, false, 100));
    bytes.extend([7; 40]);
    client.write_all(&bytes).await.unwrap();
    let mut stream = connection.accept().await.unwrap();
    drop(client);
    assert!(stream.input.next().await.is_err());
}

#[tokio::test]
async fn stream_ids_out_of_order_are_reset() {
    let (mut connection, mut client) = raw();
    let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
    for (id, good) in [(3, true), (3, false), (1, false), (4, false), (5, true)] {
        client.write_all(&syn(&mut deflater, id)).await.unwrap();
        let answer = control(&mut client, &mut inflater).await.unwrap();
        match answer {
            Control::SynReply { id: replied, .. } => assert!(good && replied == id, "{id}"),
            Control::Reset {
                id: reset,
                status: 1,
            } => assert!(!good && reset == id, "{id}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(connection.accept().await.unwrap().id, 3);
    assert_eq!(connection.accept().await.unwrap().id, 5);
}

#[tokio::test]
async fn too_many_streams_are_refused() {
    let (mut connection, mut client) = raw();
    let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
    let mut streams = Vec::new();
    for n in 0..1024 {
        client
            .write_all(&syn(&mut deflater, n * 2 + 1))
            .await
            .unwrap();
        streams.push(connection.accept().await.unwrap());
        let answer = control(&mut client, &mut inflater).await;
        assert!(matches!(answer, Some(Control::SynReply { .. })));
    }
    client.write_all(&syn(&mut deflater, 4001)).await.unwrap();
    let answer = control(&mut client, &mut inflater).await;
    assert_eq!(
        answer,
        Some(Control::Reset {
            id: 4001,
            status: 3
        })
    );
    // One that goes makes room for another.
    drop(streams.pop());
    let answer = control(&mut client, &mut inflater).await;
    assert!(matches!(answer, Some(Control::Reset { status: 5, .. })));
    client.write_all(&syn(&mut deflater, 4003)).await.unwrap();
    let answer = control(&mut client, &mut inflater).await;
    assert!(matches!(answer, Some(Control::SynReply { id: 4003, .. })));
}

#[tokio::test]
async fn pings_are_answered_and_unknown_frames_ignored() {
    let (_connection, mut client) = raw();
    let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
    let frames = [
        Control::Settings,
        Control::Unknown(99),
        Control::WindowUpdate { id: 1, delta: 5 },
        Control::SynReply {
            id: 77,
            fin: true,
            headers: Headers::default(),
        },
        Control::Headers {
            id: 77,
            fin: true,
            headers: Headers::default(),
        },
        Control::Reset { id: 77, status: 5 },
        Control::Ping(2), // an echo of a ping that we never sent
        Control::Ping(3),
    ];
    for frame in frames {
        client
            .write_all(&frame.encode(&mut deflater).unwrap())
            .await
            .unwrap();
    }
    client.write_all(&data_head(77, true, 5)).await.unwrap();
    client.write_all(b"lost!").await.unwrap();
    client
        .write_all(&Control::Ping(5).encode(&mut deflater).unwrap())
        .await
        .unwrap();
    assert_eq!(
        control(&mut client, &mut inflater).await,
        Some(Control::Ping(3))
    );
    assert_eq!(
        control(&mut client, &mut inflater).await,
        Some(Control::Ping(5))
    );
}

// A data frame may announce 16 MiB: nothing is held for what has not come.
#[tokio::test]
async fn large_frames_are_read_in_pieces_and_bounded() {
    let (mut connection, client) = raw();
    let (_reader, mut writer) = tokio::io::split(client);
    writer
        .write_all(&syn(&mut Deflater::new().unwrap(), 1))
        .await
        .unwrap();
    let mut stream = connection.accept().await.unwrap();
    let length = 0xff_ffff;
    let sending = tokio::spawn(async move {
        writer.write_all(&data_head(1, true, length)).await.unwrap();
        let piece = vec![1; 64 << 10];
        let mut sent = 0;
        while sent < length {
            let part = piece.len().min(length - sent);
            writer.write_all(&piece[..part]).await.unwrap();
            sent += part;
        }
    });
    // Nobody reads: the sender has to wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!sending.is_finished());
    assert_eq!(all(&mut stream.input).await.len(), length);
    sending.await.unwrap();
}

#[tokio::test]
async fn a_stream_that_nobody_reads_any_more_does_not_stop_the_others() {
    let (mut connection, mut client) = raw();
    let mut deflater = Deflater::new().unwrap();
    for id in [1, 3] {
        client.write_all(&syn(&mut deflater, id)).await.unwrap();
    }
    let first = connection.accept().await.unwrap();
    let mut second = connection.accept().await.unwrap();
    let (_reader, mut writer) = tokio::io::split(client);
    let sending = tokio::spawn(async move {
        for _ in 0..64 {
            writer
                .write_all(&data_head(1, false, 64 << 10))
                .await
                .unwrap();
            writer.write_all(&vec![1; 64 << 10]).await.unwrap();
        }
        writer.write_all(&data_head(3, true, 2)).await.unwrap();
        writer.write_all(b"ok").await.unwrap();
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(first.input);
    assert_eq!(all(&mut second.input).await, b"ok");
    sending.await.unwrap();
}

#[tokio::test]
async fn a_websocket_client_that_breaks_the_rules_is_closed() {
    let (endpoint, _) = serve().await;
    for message in [
        Message::text("hello"),
        Message::Binary(vec![0; (1 << 20) + 1].into()),
    ] {
        let mut socket = websocket(&exec(&endpoint, "cat", false), "v5.channel.k8s.io").await;
        socket.send(message).await.unwrap();
        let closed = async { while let Some(Ok(_)) = socket.next().await {} };
        tokio::time::timeout(Duration::from_secs(20), closed)
            .await
            .unwrap();
    }
    // Channels that are not there, and signals that make no sense, are ignored.
    let mut socket = websocket(&exec(&endpoint, "cat", false), "v5.channel.k8s.io").await;
    for message in [
        &b""[..],
        b"\x07x",
        b"\x01x",
        b"\xff\x09",
        b"\xff",
        b"\xff\x00\x00",
    ] {
        socket
            .send(Message::Binary(message.to_vec().into()))
            .await
            .unwrap();
    }
    say(&mut socket, 0, b"still here").await;
    say(&mut socket, 255, &[0]).await;
    assert_eq!(hear(&mut socket).await[1], b"still here");
}
