//! The HTTP server: it turns a URL that was issued into the streams it stands for.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::ALLOW;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::idle::Idle;
use crate::tokens::{Request, Tokens, TooMany};
use crate::upgrade::{self, Refusal, Transport};
use crate::{Backend, portforward, remotecommand, websocket};

/// The most connections at the same time; more wait.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// The most bytes of a request's headers.
const MAX_HEADERS: usize = 32 << 10;

/// Issues URLs.
#[derive(Clone)]
pub struct Endpoint {
    address: SocketAddr,
    tokens: Arc<Tokens>,
}

impl Endpoint {
    /// The URL at which a client can dial this request, once, within a minute.
    ///
    /// # Errors
    /// Too many URLs have not been used yet.
    pub fn issue(&self, request: Request) -> Result<String, TooMany> {
        let path = request.path();
        let token = self.tokens.issue(request)?;
        Ok(format!("http://{}/{path}/{token}", self.address))
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A server that listens.
pub struct Listener {
    listener: TcpListener,
    endpoint: Endpoint,
    idle_timeout: Duration,
}

impl Listener {
    /// Listens on an address; port 0 takes one that is free. A client is cut off when no byte has gone either way for
    /// `idle_timeout`.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn bind(address: SocketAddr, idle_timeout: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let endpoint = Endpoint {
            address: listener.local_addr()?,
            tokens: Arc::default(),
        };
        Ok(Self {
            listener,
            endpoint,
            idle_timeout,
        })
    }

    /// What issues this server's URLs.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Serves for ever.
    pub async fn serve<B: Backend>(self, backend: Arc<B>) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // The semaphore is never closed.
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((client, _)) => {
                    let server = Server {
                        tokens: self.endpoint.tokens.clone(),
                        backend: backend.clone(),
                        idle_timeout: self.idle_timeout,
                        slot: Arc::new(slot),
                    };
                    tokio::spawn(server.connection(client));
                }
                Err(error) => {
                    // Out of descriptors or memory: other connections must end first.
                    tracing::warn!(%error, "a streaming connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

struct Server<B> {
    tokens: Arc<Tokens>,
    backend: Arc<B>,
    idle_timeout: Duration,
    /// Held until the connection, upgraded or not, has ended.
    slot: Arc<OwnedSemaphorePermit>,
}

/// What goes on after the upgrade.
enum Session {
    Remote(Transport, Request, &'static str),
    Forward(Transport, String, Vec<u16>, &'static str),
}

impl<B: Backend> Server<B> {
    async fn connection(self, client: TcpStream) {
        let _ = client.set_nodelay(true);
        let service = service_fn(|request| {
            let answer = self.answer(request);
            async { Ok::<_, std::convert::Infallible>(answer) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_TIME)
            .max_buf_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(client), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a streaming request was not served");
        }
    }

    fn answer(&self, mut request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        match self.agree(&request) {
            Ok((session, response)) => {
                let upgrade = hyper::upgrade::on(&mut request);
                let (backend, slot) = (self.backend.clone(), self.slot.clone());
                let idle_timeout = self.idle_timeout;
                tokio::spawn(async move {
                    match upgrade.await {
                        Ok(upgraded) => {
                            let transport = Idle::new(TokioIo::new(upgraded), idle_timeout);
                            serve(session, transport, backend).await;
                        }
                        Err(error) => tracing::debug!(%error, "a streaming client did not upgrade"),
                    }
                    drop(slot);
                });
                response
            }
            Err(refusal) => {
                let mut response = refusal.response();
                if response.status() == StatusCode::METHOD_NOT_ALLOWED {
                    let allowed = hyper::header::HeaderValue::from_static("GET, POST");
                    response.headers_mut().insert(ALLOW, allowed);
                }
                response
            }
        }
    }

    /// What a request stands for, and the answer that begins it.
    fn agree(
        &self,
        request: &hyper::Request<Incoming>,
    ) -> Result<(Session, Response<Full<Bytes>>), Refusal> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            let message = "a streaming URL is dialled with GET or POST";
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message));
        }
        let issued = issued(&self.tokens, request.uri().path()).ok_or_else(|| {
            let message =
                "404: this streaming URL is unknown, was used before, or is older than a minute";
            Refusal::new(StatusCode::NOT_FOUND, message)
        })?;
        let headers = request.headers();
        let transport = upgrade::transport(headers)?;
        let served = match (&issued, transport) {
            (Request::PortForward { .. }, Transport::Spdy) => portforward::SPDY_PROTOCOLS,
            (Request::PortForward { .. }, Transport::WebSocket) => portforward::WEBSOCKET_PROTOCOLS,
            (_, Transport::Spdy) => remotecommand::SPDY_PROTOCOLS,
            (_, Transport::WebSocket) => remotecommand::WEBSOCKET_PROTOCOLS,
        };
        let protocol = upgrade::negotiate(transport, headers, served)?;
        let session = match issued {
            Request::PortForward { pod, mut ports } => {
                if protocol == portforward::CHANNELS {
                    ports.extend(ports_of(request.uri().query().unwrap_or_default())?);
                    if ports.is_empty() || ports.len() > portforward::MAX_PORTS {
                        let message = "unable to upgrade: 1 to 64 ports must be named with the query parameter \"port\"";
                        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
                    }
                }
                Session::Forward(transport, pod, ports, protocol)
            }
            other => Session::Remote(transport, other, protocol),
        };
        Ok((session, upgrade::accept(transport, headers, protocol)))
    }
}

/// The request that a path of the form /<kind>/<token> was issued for.
fn issued(tokens: &Tokens, path: &str) -> Option<Request> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    tokens
        .redeem(token)
        .filter(|request| request.path() == kind)
}

/// The ports of a query such as `port=80&port=443,8080`.
fn ports_of(query: &str) -> Result<Vec<u16>, Refusal> {
    let ports = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("port="))
        .flat_map(|value| value.split(','));
    let parse = |text: &str| {
        text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
            let message =
                "unable to upgrade: the query parameter \"port\" is not a number from 1 to 65535";
            Refusal::new(StatusCode::BAD_REQUEST, message)
        })
    };
    ports.map(parse).collect()
}

async fn serve<B: Backend>(session: Session, transport: Idle<TokioIo<Upgraded>>, backend: Arc<B>) {
    let socket = |transport| {
        WebSocketStream::from_raw_socket(transport, Role::Server, Some(websocket::config()))
    };
    match session {
        Session::Remote(Transport::Spdy, request, protocol) => {
            remotecommand::serve_spdy(transport, request, protocol, &*backend).await;
        }
        Session::Remote(Transport::WebSocket, request, protocol) => {
            let socket = socket(transport).await;
            remotecommand::serve_websocket(socket, request, protocol, &*backend).await;
        }
        Session::Forward(Transport::Spdy, pod, ..) => {
            portforward::serve_spdy(transport, pod, backend).await;
        }
        Session::Forward(Transport::WebSocket, pod, _, portforward::TUNNEL) => {
            let tunnel = websocket::Tunnel::new(socket(transport).await);
            portforward::serve_spdy(tunnel, pod, backend).await;
        }
        Session::Forward(Transport::WebSocket, pod, ports, _) => {
            portforward::serve_channels(socket(transport).await, pod, ports, backend).await;
        }
    }
}
