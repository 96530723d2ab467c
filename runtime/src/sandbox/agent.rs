//! Connections to the agent: through the pod's vsock socket, by the `CONNECT <port>` convention, or to its own sockets
//! where it runs on the host.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use caisson_proto::agent::agent_client::AgentClient;
use caisson_proto::{AGENT_PROTOCOL, agent as proto};
use caisson_vmm_protocol::{AGENT_PORT, STREAM_PORT};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::ids::{self, UserIds};
use crate::network::PodNetwork;

/// How long the guest may take to accept a connection or to answer a header line.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the agent may take to set up the sandbox.
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// The most characters of an agent's version.
const MAX_VERSION: usize = 64;
/// The longest answer line, in bytes.
const MAX_LINE: usize = 512;
/// The most bytes of one answer of the agent.
pub(crate) const MAX_ANSWER: usize = 4 << 20;

/// Where an agent listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// In a guest: behind the socket of its vsock device.
    Guest {
        /// That socket.
        vsock: PathBuf,
    },
    /// On the host: a socket for each port.
    Host {
        /// In place of [`AGENT_PORT`].
        agent: PathBuf,
        /// In place of [`STREAM_PORT`].
        streams: PathBuf,
    },
}

/// A client that connects when it is first used and again when the connection breaks.
pub fn client(address: Address) -> AgentClient<Channel> {
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let address = address.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(connect(&address, AGENT_PORT).await?)) }
    });
    // The address is never dialled: the connector above is.
    let channel = Endpoint::from_static("http://agent").connect_with_connector_lazy(connector);
    AgentClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// Why an agent cannot be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// It did not answer.
    #[error("{}", .0.message())]
    Silent(#[from] tonic::Status),
    /// Its connection broke, or it answered something else.
    #[error(transparent)]
    Broken(#[from] io::Error),
    /// It speaks another protocol.
    #[error(
        "its agent (version {version}) speaks agent protocol {theirs}, this daemon speaks {AGENT_PROTOCOL}; install both from one release"
    )]
    Other {
        /// What it speaks.
        theirs: u32,
        /// Its build's version.
        version: String,
    },
}

/// Asks an agent which protocol it speaks, and whether it has the stream that [`Echo`] needs.
///
/// # Errors
/// It does not answer, or it is another than the daemon's.
pub async fn check_protocol(client: &mut AgentClient<Channel>) -> Result<bool, ProtocolError> {
    let answer = client.version(proto::VersionRequest {}).await?;
    understands(answer.into_inner())
}

fn understands(agent: proto::VersionResponse) -> Result<bool, ProtocolError> {
    if agent.protocol == AGENT_PROTOCOL {
        return Ok(agent.health_stream);
    }
    // It is the guest's word.
    let printable = agent.agent_version.chars().filter(|c| !c.is_control());
    Err(ProtocolError::Other {
        theirs: agent.protocol,
        version: printable.take(MAX_VERSION).collect(),
    })
}

/// Lets an agent set up its pod, after it was made sure that it understands the request: both at once.
///
/// # Errors
/// It speaks another protocol, refused, or did not answer in time.
pub async fn set_up(
    client: AgentClient<Channel>,
    request: proto::SetupSandboxRequest,
) -> io::Result<()> {
    let (mut asked, mut told) = (client.clone(), client);
    let check = async { check_protocol(&mut asked).await.map_err(io::Error::other) };
    let set_up = async {
        let answer = told.setup_sandbox(request).await;
        answer.map_err(|status| io::Error::other(status.message().to_owned()))
    };
    // A request that another agent may not understand fails with the better reason.
    tokio::time::timeout(SETUP_TIMEOUT, async {
        let (checked, answered) = tokio::join!(check, set_up);
        checked.and(answered.map(drop))
    })
    .await
    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Lets an agent go on with its pod, in the machine that it finds itself in.
///
/// # Errors
/// It refused, or did not answer in time.
pub async fn resume(
    mut client: AgentClient<Channel>,
    request: proto::ResumeRequest,
) -> io::Result<()> {
    tokio::time::timeout(SETUP_TIMEOUT, client.resume(request))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map(drop)
        .map_err(|status| io::Error::other(status.message().to_owned()))
}

/// The IDs of a pod as its agent is told them.
pub fn user_namespace(ids: Option<&UserIds>) -> Option<proto::UserNamespace> {
    let range = |range: ids::IdRange| {
        Some(proto::IdRange {
            first: range.first,
            length: range.length,
        })
    };
    ids.map(|ids| proto::UserNamespace {
        uids: range(ids.uids),
        gids: range(ids.gids),
    })
}

/// The pod's interface as the agent is told it.
pub fn interfaces(network: Option<&PodNetwork>, current_mac: &str) -> Vec<proto::Interface> {
    let own = network.map(|network| &network.interface);
    own.into_iter()
        .map(|own| proto::Interface {
            mac: own.mac.clone(),
            current_mac: current_mac.to_owned(),
            name: own.name.clone(),
            mtu: own.mtu,
            addresses: own
                .addresses
                .iter()
                .map(|(ip, prefix)| format!("{ip}/{prefix}"))
                .collect(),
        })
        .collect()
}

/// Connects to a port of the agent.
async fn connect(address: &Address, port: u32) -> io::Result<UnixStream> {
    bounded(async {
        let vsock = match address {
            Address::Host { agent, streams } => {
                let socket = if port == STREAM_PORT { streams } else { agent };
                return UnixStream::connect(socket).await;
            }
            Address::Guest { vsock } => vsock,
        };
        let mut stream = UnixStream::connect(vsock).await?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        let answer = read_line(&mut stream).await?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::other(format!(
                "guest port {port} is answered with {answer:?}"
            )));
        }
        Ok(stream)
    })
    .await
}

/// Opens a raw stream: connects, sends the header line and takes its answer.
pub async fn stream(address: &Address, header: &str) -> io::Result<UnixStream> {
    let mut stream = connect(address, STREAM_PORT).await?;
    bounded(async {
        stream.write_all(header.as_bytes()).await?;
        match read_line(&mut stream).await?.as_str() {
            "OK" => Ok(stream),
            answer => Err(io::Error::other(
                answer.strip_prefix("ERR ").unwrap_or(answer).to_owned(),
            )),
        }
    })
    .await
}

/// Asks an agent again and again whether it goes on.
#[derive(Default)]
pub struct Echo {
    stream: Option<UnixStream>,
    asked: u8,
}

impl Echo {
    /// Waits for an answer, for as long as it takes. Who gives this up asks on another connection the next time.
    ///
    /// # Errors
    /// The connection's, or a wrong answer; the next question gets another connection.
    pub async fn ask(&mut self, address: &Address) -> io::Result<()> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => stream(address, "HEALTH\n").await?,
        };
        self.asked = self.asked.wrapping_add(1);
        stream.write_u8(self.asked).await?;
        let answer = stream.read_u8().await?;
        if answer != self.asked {
            return Err(io::Error::other(format!(
                "the agent was asked {} and answered {answer}",
                self.asked
            )));
        }
        self.stream = Some(stream);
        Ok(())
    }
}

async fn bounded<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(CONNECT_TIMEOUT, work)
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "the agent did not answer within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ),
            )
        })?
}

/// Reads a line byte by byte: what follows it belongs to the stream.
pub(super) async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE {
        match stream.read_u8().await {
            Ok(b'\n') => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Ok(byte) => line.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the agent refused the connection",
                ));
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other(format!(
        "the agent's answer is longer than {MAX_LINE} bytes"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answer(answers: &'static [&'static str]) -> io::Result<UnixStream> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for answer in answers {
                read_line(&mut stream).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let address = Address::Guest { vsock: path };
        let result = stream(&address, "STREAM c - stdout\n").await;
        server.await.unwrap();
        result
    }

    #[test]
    fn an_agent_of_another_protocol_is_refused_by_name() {
        let agent = |protocol| proto::VersionResponse {
            protocol,
            agent_version: "9.9\n".into(),
            kernel_release: String::new(),
            health_stream: true,
        };
        assert!(understands(agent(AGENT_PROTOCOL)).unwrap());
        let refused = understands(agent(AGENT_PROTOCOL + 1)).unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.contains("(version 9.9) speaks agent protocol 3, this daemon speaks 2"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn bytes_behind_the_answer_belong_to_the_stream() {
        let mut stream = answer(&["OK 5\n", "OK\nfirst"]).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first");
    }

    #[tokio::test]
    async fn refusals_are_told() {
        let say = |r: io::Result<UnixStream>| r.unwrap_err().to_string();
        assert!(say(answer(&["OK 5\n", "ERR no such container\n"]).await).contains("no such"));
        assert!(say(answer(&["NO\n"]).await).contains("port 1025"));
        assert!(say(answer(&[""]).await).contains("refused"));
    }

    #[tokio::test]
    async fn an_answer_is_to_the_question() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Host {
            agent: dir.path().join("a"),
            streams: dir.path().join("s"),
        };
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let server = tokio::spawn(async move {
            // The second answer is one that nobody has asked for.
            for answers in [&[1, 1][..], &[3]] {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert_eq!(read_line(&mut stream).await.unwrap(), "HEALTH");
                stream.write_all(b"OK\n").await.unwrap();
                for answer in answers {
                    stream.read_u8().await.unwrap();
                    stream.write_u8(*answer).await.unwrap();
                }
            }
        });
        let mut echo = Echo::default();
        echo.ask(&address).await.unwrap();
        let wrong = echo.ask(&address).await.unwrap_err().to_string();
        assert!(wrong.contains("asked 2 and answered 1"), "{wrong}");
        echo.ask(&address).await.unwrap();
        server.await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_on_the_host_needs_no_detour() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Host {
            agent: dir.path().join("a"),
            streams: dir.path().join("s"),
        };
        assert!(connect(&address, AGENT_PORT).await.is_err());
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let line = read_line(&mut stream).await.unwrap();
            stream.write_all(b"OK\n").await.unwrap();
            line
        });
        stream(&address, "STREAM c - stdout\n").await.unwrap();
        assert_eq!(server.await.unwrap(), "STREAM c - stdout");
    }
}
