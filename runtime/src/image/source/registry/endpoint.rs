//! One server: requests with authentication, tried again where that can help.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, Identity, Response, StatusCode, redirect};
use tokio::sync::Mutex;

use super::body::Body;
use super::hosts::Host;
use super::{Activity, Auth, Need};
use crate::image::error::ImageError;
use crate::image::reference::Reference;

/// How often a request is tried when the server cannot be reached or is overloaded.
const ATTEMPTS: u32 = 4;
/// Most redirects of one request.
pub(super) const MAX_REDIRECTS: usize = 5;
/// The longest that a server may ask to wait before the next request.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// How long a connection may take to come about, unless the host's `dial_timeout` says otherwise.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// A server, with what it is asked about.
pub(super) struct Endpoint {
    host: Host,
    pub(super) client: Client,
    pub(super) repository: String,
    pub(super) auth: Option<Auth>,
    /// The header that the registry took last.
    pub(super) header: Mutex<Option<HeaderValue>>,
    pub(super) stall: Duration,
    pub(super) activity: Arc<Activity>,
    /// Where everything is, in place of the paths of the API: a foreign layer's URL.
    fixed: Option<String>,
}

impl Endpoint {
    pub(super) fn new(
        host: Host,
        reference: &Reference,
        auth: Option<&Auth>,
        stall: Duration,
        activity: Arc<Activity>,
    ) -> Result<Self, ImageError> {
        Ok(Self {
            client: client(&host, stall)?,
            repository: reference.repository().to_owned(),
            auth: auth.filter(|_| host.upstream).cloned(),
            header: Mutex::new(None),
            stall,
            activity,
            fixed: None,
            host,
        })
    }

    /// A server that has one thing, at `url`, and gets no credentials.
    pub(super) fn fixed(
        host: Host,
        url: String,
        stall: Duration,
        activity: Arc<Activity>,
    ) -> Result<Self, ImageError> {
        Ok(Self {
            client: client(&host, stall)?,
            repository: url.clone(),
            auth: None,
            header: Mutex::new(None),
            stall,
            activity,
            fixed: Some(url),
            host,
        })
    }

    /// `host` or `host:port`.
    pub(super) fn name(&self) -> &str {
        &self.host.name
    }

    /// Whether it is on https.
    pub(super) fn is_secure(&self) -> bool {
        self.host.base.starts_with("https:")
    }

    pub(super) fn serves(&self, need: Need) -> bool {
        match need {
            Need::Resolve => self.host.resolve,
            Need::Pull => self.host.pull,
        }
    }

    /// A manifest's name, for messages.
    pub(super) fn what(&self, reference: &str) -> String {
        format!("{}/{}:{reference}", self.host.name, self.repository)
    }

    /// Something small, whole.
    pub(super) async fn read(
        &self,
        path: &str,
        headers: &HeaderMap,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let response = self.get(path, headers, what).await?;
        self.body(response, what).all(limit).await
    }

    pub(super) fn body(&self, response: Response, what: &str) -> Body {
        Body::new(
            response,
            self.name(),
            what,
            self.stall,
            self.activity.clone(),
        )
    }

    /// A GET request, with authentication where the registry asks for it (again when a token has expired), and once
    /// more where the server cannot be reached or is overloaded.
    pub(super) async fn get(
        &self,
        path: &str,
        headers: &HeaderMap,
        what: &str,
    ) -> Result<Response, ImageError> {
        let _waiting = self.activity.waiting();
        let url = self.fixed.clone().unwrap_or_else(|| {
            let url = format!("{}/{}/{path}", self.host.base, self.repository);
            match &self.host.namespace {
                Some(namespace) => format!("{url}?ns={namespace}"),
                None => url,
            }
        });
        let mut asked = false;
        let mut attempt = 0;
        loop {
            let (error, wait) = match self.once(&url, headers, what).await? {
                Answer::Here(response) => return Ok(response),
                Answer::Unauthorized(challenges) if !asked => {
                    asked = true;
                    self.authenticate(&challenges).await?;
                    continue;
                }
                Answer::Unauthorized(_) => {
                    return Err(self.unauthorized("it answers 401 Unauthorized".to_owned()));
                }
                Answer::Later(error, wait) => (error, wait),
            };
            attempt += 1;
            if attempt >= ATTEMPTS {
                return Err(error);
            }
            let wait = wait.unwrap_or_else(|| back_off(attempt));
            tracing::debug!(host = self.name(), what, %error, ?wait, "request is made again");
            tokio::time::sleep(wait).await;
        }
    }

    /// One request.
    async fn once(&self, url: &str, headers: &HeaderMap, what: &str) -> Result<Answer, ImageError> {
        // The host's own headers go with each request to it, and not to a token server.
        let mut request = self.client.get(url).headers(self.host.headers.clone());
        request = request.headers(headers.clone());
        if let Some(header) = self.header.lock().await.clone() {
            request = request.header(AUTHORIZATION, header);
        }
        let response = match tokio::time::timeout(self.stall, request.send()).await {
            Err(_) => return Ok(Answer::Later(self.stalled(what), None)),
            Ok(Err(error)) if error.is_redirect() || error.is_builder() => {
                return Err(self.failed(chain(&error)));
            }
            Ok(Err(error)) => return Ok(Answer::Later(self.failed(chain(&error)), None)),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        match status {
            status if status.is_success() => Ok(Answer::Here(response)),
            StatusCode::UNAUTHORIZED => {
                let challenges = response.headers().get_all(WWW_AUTHENTICATE);
                let challenges = challenges
                    .iter()
                    .take(8)
                    .filter_map(|value| value.to_str().ok().map(str::to_owned))
                    .collect();
                Ok(Answer::Unauthorized(challenges))
            }
            StatusCode::FORBIDDEN => Err(self.unauthorized(format!("it answers {status}"))),
            StatusCode::NOT_FOUND => Err(ImageError::NotFound {
                what: what.to_owned(),
                place: format!("registry {}", self.name()),
            }),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                self.later(&response, status)
            }
            status if status.is_server_error() => self.later(&response, status),
            status => Err(self.failed(format!("it answers {status} when asked for {what}"))),
        }
    }

    /// When to ask an overloaded server again. (`Retry-After` as a date, which no registry sends, counts as none.)
    fn later(&self, response: &Response, status: StatusCode) -> Result<Answer, ImageError> {
        let error = self.failed(format!("it answers {status}"));
        let after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.trim().parse().ok())
            .map(Duration::from_secs);
        match after {
            Some(wait) if wait > MAX_RETRY_AFTER => Err(self.failed(format!(
                "it answers {status}, and wants to be asked again in {} s",
                wait.as_secs()
            ))),
            wait => Ok(Answer::Later(error, wait)),
        }
    }

    pub(super) fn failed(&self, reason: String) -> ImageError {
        ImageError::Registry {
            registry: self.name().to_owned(),
            reason,
        }
    }

    pub(super) fn stalled(&self, what: &str) -> ImageError {
        ImageError::Stalled {
            registry: self.name().to_owned(),
            what: what.to_owned(),
            seconds: self.stall.as_secs(),
        }
    }

    pub(super) fn unauthorized(&self, reason: String) -> ImageError {
        ImageError::Unauthorized {
            registry: self.name().to_owned(),
            what: self.repository.clone(),
            reason,
        }
    }
}

/// How a request went.
enum Answer {
    Here(Response),
    /// What the server asks for.
    Unauthorized(Vec<String>),
    /// Asking again may help, after this time.
    Later(ImageError, Option<Duration>),
}

/// How long to wait before the next attempt: longer each time, and not all at the same moment.
pub(super) fn back_off(attempt: u32) -> Duration {
    let longest = 500u64 << attempt.min(5);
    Duration::from_millis(rand::random_range(longest / 2..=longest))
}

/// A client as the host needs it.
fn client(host: &Host, stall: Duration) -> Result<Client, ImageError> {
    // The first call in a process decides; a later one finds a provider installed, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
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
    let wrong = |error: &reqwest::Error| ImageError::Hosts {
        path: host.name.clone().into(),
        reason: chain(error),
    };
    let (authorities, identity) = host.certificates()?;
    let mut trusted = Vec::new();
    for (pem, path) in authorities.iter().zip(&host.ca) {
        let certificates = Certificate::from_pem_bundle(pem)
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or_else(|| ImageError::Hosts {
                path: path.clone(),
                reason: "it holds no certificate in PEM".to_owned(),
            })?;
        trusted.extend(certificates);
    }
    let mut builder = Client::builder()
        .user_agent(concat!("caisson/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(host.dial_timeout.unwrap_or(DIAL_TIMEOUT).min(stall))
        .tls_danger_accept_invalid_certs(host.skip_verify)
        .redirect(policy);
    if !trusted.is_empty() {
        builder = builder.tls_certs_merge(trusted);
    }
    if let Some(pem) = identity {
        builder = builder.identity(Identity::from_pem(&pem).map_err(|error| wrong(&error))?);
    }
    if !host.base.starts_with("https:") {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| wrong(&error))
}

/// An error with its causes: reqwest's own message hides why.
pub(super) fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
