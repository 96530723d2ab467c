//! Images from a registry: OCI distribution specification 1.1, "Pull".
//!
//! `oci-client` reads manifests, tokens and error bodies whole, whatever their size, and has no time-out for an
//! answer that stalls: hence plain requests, everything bounded in size and time.

mod auth;
mod body;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, redirect};
use tokio::sync::Mutex;

use crate::image::ImageConfig;
use crate::image::digest::Digest;
use crate::image::document::{self, Descriptor, MAX_MANIFEST};
use crate::image::error::ImageError;
use crate::image::reference::Reference;
pub use auth::Auth;
pub(super) use stream::BlobStream;

/// How often a request is tried when the registry cannot be reached or is overloaded.
const ATTEMPTS: u32 = 3;
/// Most redirects of one request.
const MAX_REDIRECTS: usize = 5;

/// A repository in a registry, for one pull. Clones share the connection and the token.
#[derive(Clone)]
pub(in crate::image) struct Session(Arc<Inner>);

struct Inner {
    client: Client,
    /// `https://host`, or `http://host`.
    base: String,
    host: String,
    repository: String,
    auth: Option<Auth>,
    /// The header that the registry took last.
    header: Mutex<Option<HeaderValue>>,
    stall: Duration,
}

impl Session {
    /// The registry of `reference` behind its mirrors, in the order in which they are to be tried. Credentials go to
    /// the registry alone.
    pub(in crate::image) fn open(
        reference: &Reference,
        auth: Option<&Auth>,
        config: &ImageConfig,
    ) -> Result<Vec<Self>, ImageError> {
        let mut sessions = Vec::new();
        for mirror in config.mirrors.get(reference.host()).into_iter().flatten() {
            let (scheme, host) = match mirror.trim_end_matches('/').split_once("://") {
                Some((scheme, host)) => (Some(scheme), host),
                None => (None, mirror.as_str()),
            };
            sessions.push(Self::new(scheme, host, reference, None, config)?);
        }
        let host = match reference.host() {
            "docker.io" => "registry-1.docker.io",
            host => host,
        };
        sessions.push(Self::new(None, host, reference, auth.cloned(), config)?);
        Ok(sessions)
    }

    fn new(
        scheme: Option<&str>,
        host: &str,
        reference: &Reference,
        auth: Option<Auth>,
        config: &ImageConfig,
    ) -> Result<Self, ImageError> {
        let failed = |reason: String| ImageError::Registry {
            registry: host.to_owned(),
            reason,
        };
        let plain = match scheme {
            Some("http") => true,
            Some("https") => false,
            Some(other) => {
                return Err(failed(format!(
                    "the configuration gives it the scheme {other:?}; use http or https"
                )));
            }
            None => {
                is_local(host)
                    || config
                        .insecure_registries
                        .iter()
                        .any(|listed| listed == host)
            }
        };
        // The first call in a process decides; a later one finds a provider installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let stall = Duration::from_secs(config.stall_timeout_seconds);
        let policy = redirect::Policy::custom(|attempt| {
            let downgrade = attempt
                .previous()
                .first()
                .is_some_and(|first| first.scheme() == "https");
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("it redirects too often")
            } else if downgrade && attempt.url().scheme() != "https" {
                attempt.error("it redirects from https to http")
            } else {
                attempt.follow()
            }
        });
        let mut builder = Client::builder()
            .user_agent(concat!("caisson/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(stall.min(Duration::from_secs(30)))
            .redirect(policy);
        if plain {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| failed(chain(&error)))?;
        Ok(Self(Arc::new(Inner {
            client,
            base: format!("{}://{host}", if plain { "http" } else { "https" }),
            host: host.to_owned(),
            repository: reference.repository().to_owned(),
            auth,
            header: Mutex::new(None),
            stall,
        })))
    }

    /// The manifest or index that a tag or a digest names, with the digest of what came.
    pub(in crate::image) async fn manifest(
        &self,
        reference: &str,
    ) -> Result<(Digest, Vec<u8>), ImageError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(document::ACCEPT));
        let what = format!("{}/{}:{reference}", self.0.host, self.0.repository);
        let response = self
            .get(&format!("manifests/{reference}"), headers, &what)
            .await?;
        let bytes = body::read(response, MAX_MANIFEST, &self.0.host, &what, self.0.stall).await?;
        Ok((Digest::of(&bytes), bytes))
    }

    /// A blob, up to its stated size; the caller checks it.
    pub(in crate::image) async fn small(&self, blob: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let what = blob.digest.to_string();
        let response = self
            .get(&format!("blobs/{}", blob.digest), HeaderMap::new(), &what)
            .await?;
        body::read(response, blob.size, &self.0.host, &what, self.0.stall).await
    }

    /// A blob as a reader. The download runs as a task, and ends when the reader is dropped.
    pub(in crate::image) fn stream(&self, digest: Digest, size: u64) -> BlobStream {
        BlobStream::start(self.clone(), digest, size)
    }

    /// The blob from the byte `offset` on.
    async fn blob(&self, digest: &Digest, offset: u64) -> Result<Response, ImageError> {
        let mut headers = HeaderMap::new();
        if offset > 0 {
            let range = HeaderValue::try_from(format!("bytes={offset}-"));
            headers.insert(
                RANGE,
                range.map_err(|error| self.failed(error.to_string()))?,
            );
        }
        self.get(&format!("blobs/{digest}"), headers, &digest.to_string())
            .await
    }

    /// A GET request, with authentication where the registry asks for it, and again where it is overloaded.
    async fn get(
        &self,
        path: &str,
        headers: HeaderMap,
        what: &str,
    ) -> Result<Response, ImageError> {
        let url = format!("{}/v2/{}/{path}", self.0.base, self.0.repository);
        let mut asked = false;
        let mut attempt = 0;
        loop {
            let mut request = self.0.client.get(&url).headers(headers.clone());
            if let Some(header) = self.0.header.lock().await.clone() {
                request = request.header(AUTHORIZATION, header);
            }
            let response = match tokio::time::timeout(self.0.stall, request.send()).await {
                Err(_) => return Err(self.stalled(what)),
                Ok(Err(error)) if error.is_redirect() => return Err(self.failed(chain(&error))),
                Ok(Err(error)) => Err(self.failed(chain(&error))),
                Ok(Ok(response)) => {
                    let status = response.status();
                    match status {
                        StatusCode::UNAUTHORIZED if !asked => {
                            asked = true;
                            let challenges = response.headers().get_all(WWW_AUTHENTICATE);
                            let challenges: Vec<String> = challenges
                                .iter()
                                .take(8)
                                .filter_map(|value| value.to_str().ok().map(str::to_owned))
                                .collect();
                            drop(response);
                            self.authenticate(&challenges).await?;
                            continue;
                        }
                        status if status.is_success() => return Ok(response),
                        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                            return Err(self.unauthorized(format!("it answers {status}")));
                        }
                        StatusCode::NOT_FOUND => {
                            return Err(ImageError::NotFound {
                                what: what.to_owned(),
                                place: format!("registry {}", self.0.host),
                            });
                        }
                        StatusCode::TOO_MANY_REQUESTS => {
                            Err(self.failed(format!("it answers {status}")))
                        }
                        status if status.is_server_error() => {
                            Err(self.failed(format!("it answers {status}")))
                        }
                        status => {
                            return Err(
                                self.failed(format!("it answers {status} when asked for {what}"))
                            );
                        }
                    }
                }
            };
            attempt += 1;
            match response {
                Err(error) if attempt >= ATTEMPTS => return Err(error),
                Err(_) => tokio::time::sleep(back_off(attempt)).await,
                Ok(response) => return Ok(response),
            }
        }
    }

    fn failed(&self, reason: String) -> ImageError {
        ImageError::Registry {
            registry: self.0.host.clone(),
            reason,
        }
    }

    fn stalled(&self, what: &str) -> ImageError {
        ImageError::Stalled {
            registry: self.0.host.clone(),
            what: what.to_owned(),
            seconds: self.0.stall.as_secs(),
        }
    }

    fn unauthorized(&self, reason: String) -> ImageError {
        ImageError::Unauthorized {
            registry: self.0.host.clone(),
            what: self.0.repository.clone(),
            reason,
        }
    }
}

fn back_off(attempt: u32) -> Duration {
    Duration::from_millis(250 << attempt.min(5))
}

/// Plain HTTP is the custom of registries on the machine itself.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// An error with its causes: reqwest's own message hides why.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
