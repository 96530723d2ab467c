//! How an HTTP/1.1 request becomes a SPDY or a WebSocket connection, and the refusals.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, HeaderName, HeaderValue, UPGRADE};
use hyper::{HeaderMap, Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The versions of a SPDY subprotocol: asked for, and answered.
pub const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// With a refusal: what would be accepted.
const ACCEPTED_PROTOCOLS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");
const WEBSOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WEBSOCKET_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");
const WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// What a client wants to go on with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// SPDY/3.1.
    Spdy,
    /// WebSocket, RFC 6455.
    WebSocket,
}

/// A request that cannot be upgraded, and why.
#[derive(Clone, Debug)]
pub struct Refusal {
    status: StatusCode,
    message: String,
    accepted: &'static [&'static str],
}

impl Refusal {
    /// A refusal with one sentence.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            accepted: &[],
        }
    }

    /// The answer.
    pub fn response(&self) -> Response<Full<Bytes>> {
        tracing::debug!(status = %self.status, "a streaming client is refused: {}", self.message);
        let mut response = Response::new(Full::new(Bytes::from(format!("{}\n", self.message))));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        // No second request follows.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        headers.insert(
            hyper::header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        for protocol in self.accepted {
            headers.append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(protocol));
        }
        response
    }
}

/// Every value of a header that is a list, each trimmed, empty ones left out.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

/// Which transport a request asks for.
///
/// # Errors
/// 400 for none that is served here.
pub fn transport(headers: &HeaderMap) -> Result<Transport, Refusal> {
    let bad = |message: &str| Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    if !values(headers, &CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade")) {
        return bad("unable to upgrade: the request has no header \"Connection: Upgrade\"");
    }
    for upgrade in values(headers, &UPGRADE) {
        if upgrade.eq_ignore_ascii_case("SPDY/3.1") {
            return Ok(Transport::Spdy);
        }
        if upgrade.eq_ignore_ascii_case("websocket") {
            let version = values(headers, &WEBSOCKET_VERSION).next();
            return match (version, headers.get(WEBSOCKET_KEY)) {
                (Some("13"), Some(_)) => Ok(Transport::WebSocket),
                _ => bad(
                    "unable to upgrade: the WebSocket handshake is not that of RFC 6455, version 13",
                ),
            };
        }
    }
    bad("unable to upgrade: the header \"Upgrade\" names neither SPDY/3.1 nor websocket")
}

/// The first protocol that the client asks for and that is served.
///
/// # Errors
/// 400 where it asks for none, 403 where none of them is served.
pub fn negotiate(
    transport: Transport,
    headers: &HeaderMap,
    served: &'static [&'static str],
) -> Result<&'static str, Refusal> {
    let name = match transport {
        Transport::Spdy => &STREAM_PROTOCOL,
        Transport::WebSocket => &WEBSOCKET_PROTOCOL,
    };
    let mut asked = values(headers, name).peekable();
    if asked.peek().is_none() {
        let message = format!("unable to upgrade: the header {name} names no protocol");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    asked
        .find_map(|asked| served.iter().find(|served| **served == asked))
        .copied()
        .ok_or_else(|| {
            let asked: Vec<_> = values(headers, name).take(16).collect();
            Refusal {
                status: StatusCode::FORBIDDEN,
                message: format!(
                    "unable to upgrade: no common protocol: the client supports {asked:?}, the server {served:?}"
                ),
                accepted: served,
            }
        })
}

/// The answer that switches protocols.
pub fn accept(
    transport: Transport,
    request: &HeaderMap,
    protocol: &'static str,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let protocol = HeaderValue::from_static(protocol);
    match transport {
        Transport::Spdy => {
            headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
            headers.insert(STREAM_PROTOCOL, protocol);
        }
        Transport::WebSocket => {
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(WEBSOCKET_PROTOCOL, protocol);
            let key = request
                .get(WEBSOCKET_KEY)
                .map_or(&b""[..], HeaderValue::as_bytes);
            // Base64, which is a header value.
            if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key)) {
                headers.insert(WEBSOCKET_ACCEPT, accept);
            }
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn a_protocol_is_agreed_on() {
        let kubectl = headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v9.channel.k8s.io"),
            (
                "x-stream-protocol-version",
                "v4.channel.k8s.io, v3.channel.k8s.io",
            ),
        ]);
        assert_eq!(transport(&kubectl).unwrap(), Transport::Spdy);
        let served = &["v3.channel.k8s.io", "v4.channel.k8s.io"];
        assert_eq!(
            negotiate(Transport::Spdy, &kubectl, served).unwrap(),
            "v4.channel.k8s.io"
        );
        let refusal = negotiate(Transport::Spdy, &kubectl, &["v5.channel.k8s.io"]).unwrap_err();
        let response = refusal.response();
        assert_eq!(response.status(), 403);
        assert_eq!(
            response.headers()["x-accepted-stream-protocol-versions"],
            "v5.channel.k8s.io"
        );
    }

    #[test]
    fn what_is_no_upgrade_is_refused() {
        for wrong in [
            headers(&[]),
            headers(&[("upgrade", "SPDY/3.1")]),
            headers(&[("connection", "upgrade"), ("upgrade", "h2c")]),
            headers(&[
                ("connection", "keep-alive, Upgrade"),
                ("upgrade", "websocket"),
            ]),
        ] {
            assert_eq!(transport(&wrong).unwrap_err().response().status(), 400);
        }
        let silent = headers(&[("connection", "upgrade"), ("upgrade", "spdy/3.1")]);
        assert_eq!(transport(&silent).unwrap(), Transport::Spdy);
        let refusal = negotiate(Transport::Spdy, &silent, &["v4.channel.k8s.io"]).unwrap_err();
        assert_eq!(refusal.response().status(), 400);
    }
}
