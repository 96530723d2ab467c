//! Clients of streaming URLs.

use bytes::Bytes;
use caisson_streaming::client::dial;
use caisson_streaming::spdy::{Connection, Headers, Stream};
use caisson_streaming::status::Status;
use caisson_streaming::{Input, Wants};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
pub use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{WebSocketStream, client_async};

/// The protocol that the SPDY client asks for.
pub const V4: &[&str] = &["v4.channel.k8s.io"];

/// A client over SPDY with the streams that it asked for.
pub struct Spdy {
    /// How it ended.
    pub error: Stream,
    /// Standard input.
    pub stdin: Option<Stream>,
    /// Standard output.
    pub stdout: Option<Stream>,
    /// Standard error.
    pub stderr: Option<Stream>,
    /// Sizes of a terminal.
    pub resize: Option<Stream>,
    _connection: Connection,
}

impl Spdy {
    /// Dials a URL and opens each stream.
    pub async fn connect(url: &str, wants: Wants) -> Self {
        let (connection, protocol) = dial(url, V4).await.unwrap();
        assert_eq!(protocol, V4[0]);
        let open = async |kind, wanted| {
            let headers = Headers::new([("streamType", kind)]);
            match wanted {
                true => Some(connection.open(headers).await.unwrap()),
                false => None,
            }
        };
        Self {
            error: open("error", true).await.unwrap(),
            stdin: open("stdin", wants.stdin).await,
            stdout: open("stdout", wants.stdout).await,
            stderr: open("stderr", wants.stderr).await,
            resize: open("resize", wants.tty).await,
            _connection: connection,
        }
    }

    /// Types.
    pub async fn say(&self, text: &str) {
        let stdin = self.stdin.as_ref().unwrap();
        let text = Bytes::from(text.to_owned());
        stdin.output.write(text).await.unwrap();
    }

    /// Half-closes standard input.
    pub async fn close_stdin(&self) {
        self.stdin.as_ref().unwrap().output.finish().await;
    }

    /// Standard output to its end.
    pub async fn stdout(&mut self) -> String {
        all(&mut self.stdout.as_mut().unwrap().input).await
    }

    /// Standard error to its end.
    pub async fn stderr(&mut self) -> String {
        all(&mut self.stderr.as_mut().unwrap().input).await
    }

    /// Reads standard output until it has said something.
    pub async fn hears(&mut self, text: &str) {
        let input = &mut self.stdout.as_mut().unwrap().input;
        let mut said = String::new();
        while !said.contains(text) {
            let chunk = input.next().await.unwrap();
            let chunk = chunk.unwrap_or_else(|| panic!("only {said:?} was said"));
            said.push_str(&String::from_utf8_lossy(&chunk.bytes));
        }
    }

    /// The status at the end.
    pub async fn status(&mut self) -> Status {
        let text = all(&mut self.error.input).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// A stream to its end, as text.
pub async fn all(input: &mut Input) -> String {
    let mut bytes = Vec::new();
    while let Some(chunk) = input.next().await.unwrap() {
        bytes.extend_from_slice(&chunk.bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a WebSocket client sends.
pub type Sending = SplitSink<WebSocketStream<TcpStream>, Message>;
/// What a WebSocket client gets.
pub type Receiving = SplitStream<WebSocketStream<TcpStream>>;

/// A client over WebSocket channels.
pub struct Channels(WebSocketStream<TcpStream>);

impl Channels {
    /// Dials a URL.
    pub async fn connect(url: &str, protocol: &str) -> Self {
        let mut request = url
            .replace("http://", "ws://")
            .into_client_request()
            .unwrap();
        let protocol = protocol.parse().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        let authority = request.uri().authority().unwrap().to_string();
        let stream = TcpStream::connect(authority).await.unwrap();
        Self(client_async(request, stream).await.unwrap().0)
    }

    /// Both directions apart: messages, each beginning with its channel.
    pub fn split(self) -> (Sending, Receiving) {
        self.0.split()
    }

    /// Sends a message on a channel.
    pub async fn say(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.0.send(Message::Binary(message.into())).await.unwrap();
    }

    /// The channels' bytes until the server closes, or until `enough`.
    pub async fn hear(&mut self, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
        let mut channels = vec![String::new(); 8];
        while let Some(message) = self.0.next().await {
            match message.unwrap() {
                Message::Binary(bytes) => {
                    let text = String::from_utf8_lossy(&bytes[1..]);
                    channels[usize::from(bytes[0])].push_str(&text);
                }
                Message::Close(_) | Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
            if enough(&channels) {
                break;
            }
        }
        channels
    }
}
