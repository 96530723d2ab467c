//! The client's side over SPDY, as crictl and a kubelet have it.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{CONNECTION, HOST, UPGRADE};
use hyper::{StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::spdy::{Connection, ProtocolError, Role};
use crate::upgrade::STREAM_PROTOCOL;

/// The most bytes of a refusal that are read.
const MAX_REFUSAL: usize = 4096;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Not an http URL with a host.
    #[error("{0} is not an http URL")]
    Url(String),
    /// The server cannot be reached.
    #[error("cannot connect to {url}: {cause}")]
    Connect {
        /// The URL.
        url: String,
        /// Why.
        cause: std::io::Error,
    },
    /// The server does not speak HTTP as it should.
    #[error("the answer of {url} makes no sense: {cause}")]
    Http {
        /// The URL.
        url: String,
        /// Why.
        cause: String,
    },
    /// The server refused.
    #[error("the server refused with status {status}: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The SPDY connection cannot be set up.
    #[error(transparent)]
    Spdy(#[from] ProtocolError),
}

/// Dials a streaming URL and asks for one of the protocols, the first one first; the connection and what the
/// server chose.
///
/// # Errors
/// See [`DialError`].
pub async fn dial(url: &str, protocols: &[&str]) -> Result<(Connection, String), DialError> {
    let uri: Uri = url.parse().map_err(|_| DialError::Url(url.to_owned()))?;
    let authority = match (uri.scheme_str(), uri.authority()) {
        (Some("http"), Some(authority)) => authority.as_str(),
        _ => return Err(DialError::Url(url.to_owned())),
    };
    let http = |cause: &dyn std::fmt::Display| DialError::Http {
        url: url.to_owned(),
        cause: cause.to_string(),
    };
    let stream = TcpStream::connect(authority).await;
    let stream = stream.map_err(|cause| DialError::Connect {
        url: url.to_owned(),
        cause,
    })?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| http(&error))?;
    tokio::spawn(connection.with_upgrades());
    let mut request = hyper::Request::post(uri.path())
        .header(HOST, authority)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "SPDY/3.1");
    for protocol in protocols {
        request = request.header(STREAM_PROTOCOL, *protocol);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| http(&error))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| http(&error))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_REFUSAL)
            .collect()
            .await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let message = String::from_utf8_lossy(&body).trim().to_owned();
        return Err(DialError::Refused { status, message });
    }
    let chosen = response.headers().get(STREAM_PROTOCOL);
    let chosen = chosen
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let upgraded = hyper::upgrade::on(response)
        .await
        .map_err(|error| http(&error))?;
    let connection = Connection::new(TokioIo::new(upgraded), Role::Client)?;
    Ok((connection, chosen))
}
