//! Port-forward.

use tokio::net::TcpListener;

use super::*;
use crate::client::dial;
use crate::spdy::Role;
use crate::websocket::Tunnel;

/// An application that answers every connection's bytes in capitals, and then its end.
async fn application() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 16 << 10];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    buffer[..n].make_ascii_uppercase();
                    stream.write_all(&buffer[..n]).await.unwrap();
                }
                stream.write_all(b".").await.unwrap();
            });
        }
    });
    port
}

/// A port that nobody listens on.
async fn nobody() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port()
}

async fn pair(connection: &Connection, port: u16, request: usize) -> (Stream, Stream) {
    let (port, request) = (port.to_string(), request.to_string());
    let header = |kind: &str| {
        Headers::new([
            ("streamType", kind),
            ("port", port.as_str()),
            ("requestID", request.as_str()),
        ])
    };
    let error = connection.open(header("error")).await.unwrap();
    error.output.finish().await;
    let data = connection.open(header("data")).await.unwrap();
    (error, data)
}

async fn several_connections(connection: &Connection) {
    let port = application().await;
    let mut pairs = Vec::new();
    for request in 0..20 {
        pairs.push(pair(connection, port, request).await);
    }
    for (request, (error, data)) in pairs.iter_mut().enumerate() {
        let text = format!("hello {request}");
        data.output.write(Bytes::from(text.clone())).await.unwrap();
        data.output.finish().await;
        let answer = String::from_utf8(all(&mut data.input).await).unwrap();
        assert_eq!(answer, format!("{}.", text.to_uppercase()));
        assert_eq!(all(&mut error.input).await, b"");
    }
    // Much, both ways.
    let (mut error, mut data) = pair(connection, port, 99).await;
    let chunk = Bytes::from(vec![b'a'; 1 << 20]);
    let send = async {
        for _ in 0..32 {
            data.output.write(chunk.clone()).await.unwrap();
        }
        data.output.finish().await;
    };
    let ((), answer) = tokio::join!(send, all(&mut data.input));
    assert_eq!(answer.len(), (32 << 20) + 1);
    assert!(answer[..32 << 20].iter().all(|byte| *byte == b'A'));
    assert_eq!(all(&mut error.input).await, b"");

    // A port that nobody listens on is told with its reason, and the connection goes on.
    let (mut error, mut data) = pair(connection, nobody().await, 100).await;
    let text = String::from_utf8(all(&mut error.input).await).unwrap();
    assert!(
        text.starts_with("error forwarding port ") && text.contains("refused"),
        "{text}"
    );
    assert!(data.input.next().await.is_err(), "it is reset");
    let (_error, mut data) = pair(connection, port, 101).await;
    data.output.finish().await;
    assert_eq!(all(&mut data.input).await, b".");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_spdy() {
    let (endpoint, _) = serve().await;
    let url = forward(&endpoint, &[]);
    let (connection, _) = dial(&url, &["portforward.k8s.io"]).await.unwrap();
    several_connections(&connection).await;
    // Streams that make no sense are reset.
    for wrong in [
        &[("streamtype", "data")][..],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "stdin"), ("port", "80")],
    ] {
        let mut stream = open(&connection, wrong).await;
        assert!(stream.input.next().await.is_err(), "{wrong:?}");
    }
    // An old client's: no request ID.
    let port = application().await.to_string();
    let _error = open(&connection, &[("streamtype", "error"), ("port", &port)]).await;
    let mut data = open(&connection, &[("streamtype", "data"), ("port", &port)]).await;
    data.output.finish().await;
    assert_eq!(all(&mut data.input).await, b".");
    connection.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_spdy_in_a_websocket() {
    let (endpoint, _) = serve().await;
    let url = forward(&endpoint, &[]);
    let socket = websocket(&url, "SPDY/3.1+portforward.k8s.io").await;
    let connection = Connection::new(Tunnel::new(socket), Role::Client).unwrap();
    several_connections(&connection).await;
    connection.close().await;
}

#[tokio::test]
async fn connections_over_channels() {
    let (endpoint, _) = serve().await;
    let (port, nobody) = (application().await, nobody().await);
    let url = format!("{}?port={nobody}", forward(&endpoint, &[port]));
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    say(&mut socket, 0, b"hello").await;
    let mut got = vec![Vec::new(); 4];
    while got[0].len() < 7 || got[3].len() < 3 {
        let Message::Binary(bytes) = socket.next().await.unwrap().unwrap() else {
            continue;
        };
        got[bytes[0] as usize].extend_from_slice(&bytes[1..]);
    }
    assert_eq!(got[0], [&port.to_le_bytes()[..], b"HELLO"].concat());
    assert_eq!(got[1], port.to_le_bytes());
    assert_eq!(got[2], nobody.to_le_bytes());
    assert_eq!(got[3][..2], nobody.to_le_bytes());
    assert!(String::from_utf8_lossy(&got[3][2..]).contains("refused"));
}
