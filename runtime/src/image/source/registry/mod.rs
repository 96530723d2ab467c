//! Images from a registry: OCI distribution specification 1.1, "Pull".
//!
//! `oci-client` reads manifests, tokens and error bodies whole, whatever their size, and has no time-out for an
//! answer that stalls: hence plain requests, everything bounded in size and time.

mod activity;
mod auth;
mod body;
mod endpoint;
mod foreign;
mod hosts;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};

use crate::image::ImageConfig;
use crate::image::digest::Digest;
use crate::image::document::{self, Descriptor, MAX_MANIFEST};
use crate::image::error::ImageError;
use crate::image::reference::Reference;
pub(in crate::image) use activity::{Activity, EndOnDrop};
pub use auth::Auth;
use endpoint::Endpoint;
pub(super) use stream::BlobStream;

/// A registry's hosts.toml, for the fuzz target `config_files`; the sentence of what is wrong with it.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz_hosts(text: &str) -> Option<String> {
    hosts::fuzz(text)
}

/// A registry's challenge, for the fuzz target `image_documents`.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz_challenge(text: &str) {
    auth::fuzz(text);
}

/// A repository in a registry, for one pull. Clones share the connections and the tokens.
#[derive(Clone)]
pub(in crate::image) struct Session(Arc<Inner>);

struct Inner {
    /// The registry's mirrors, and the registry itself, in the order in which they are asked.
    endpoints: Vec<Endpoint>,
    /// The registry's name, for messages.
    registry: String,
    /// How long nothing may come of one answer until it is asked for again.
    stall: Duration,
    activity: Arc<Activity>,
}

/// What a server is asked for.
#[derive(Clone, Copy)]
enum Need {
    /// What a tag means.
    Resolve,
    /// Content.
    Pull,
}

impl Session {
    /// The registry of `reference`, and its mirrors. Credentials go to the registry alone.
    pub(in crate::image) fn open(
        reference: &Reference,
        auth: Option<&Auth>,
        config: &ImageConfig,
        activity: Arc<Activity>,
    ) -> Result<Self, ImageError> {
        let stall = Duration::from_secs(config.stall_timeout_seconds);
        let endpoints = hosts::hosts(&config.certs_dir, reference.host())?
            .into_iter()
            .map(|host| Endpoint::new(host, reference, auth, stall, activity.clone()))
            .collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Inner {
            endpoints,
            registry: reference.host().to_owned(),
            stall,
            activity,
        })))
    }

    /// The manifest or index that a tag or a digest names, with the digest of what came: of the first server that
    /// has it, and has it right. What counts if none has is what the last one says, the registry itself.
    pub(in crate::image) async fn manifest(
        &self,
        reference: &str,
    ) -> Result<(Digest, Vec<u8>), ImageError> {
        let expected: Option<Digest> = if reference.contains(':') {
            Some(reference.parse()?)
        } else {
            None
        };
        let need = if expected.is_some() {
            Need::Pull
        } else {
            Need::Resolve
        };
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(document::ACCEPT));
        let mut failure = None;
        for endpoint in self.endpoints(need) {
            let what = endpoint.what(reference);
            let path = format!("manifests/{reference}");
            match endpoint.read(&path, &headers, MAX_MANIFEST, &what).await {
                Ok(bytes) => {
                    let found = Digest::of(&bytes);
                    match expected.filter(|expected| *expected != found) {
                        None => return Ok((found, bytes)),
                        Some(expected) => {
                            let reason = format!("{} sends {found} for it", endpoint.name());
                            failure = Some(ImageError::corrupt(expected.to_string(), reason));
                        }
                    }
                }
                Err(error) => failure = Some(error),
            }
            if let Some(error) = &failure {
                tracing::debug!(host = endpoint.name(), reference, %error, "no manifest");
            }
        }
        Err(failure.unwrap_or_else(|| self.nobody(need)))
    }

    /// A blob in memory, with the size and the digest that are stated.
    pub(in crate::image) async fn small(&self, blob: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let mut failure = None;
        let what = blob.digest.to_string();
        for endpoint in self.endpoints(Need::Pull) {
            let path = format!("blobs/{what}");
            match endpoint
                .read(&path, &HeaderMap::new(), blob.size, &what)
                .await
            {
                Ok(bytes) if Digest::of(&bytes) == blob.digest => return Ok(bytes),
                Ok(bytes) => {
                    let (name, count) = (endpoint.name(), bytes.len());
                    let reason = format!("{name} sends {count} bytes with another digest for it");
                    failure = Some(ImageError::corrupt(&*what, reason));
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| self.nobody(Need::Pull)))
    }

    /// A blob as a reader. The download runs as a task, and ends when the reader is dropped. With `urls`, it comes
    /// from there.
    pub(in crate::image) fn stream(
        &self,
        digest: Digest,
        size: u64,
        urls: &[String],
    ) -> Result<BlobStream, ImageError> {
        let endpoints = if urls.is_empty() {
            Vec::new()
        } else {
            foreign::endpoints(&digest, urls, self.0.stall, &self.0.activity)?
        };
        Ok(BlobStream::start(self.clone(), endpoints, digest, size))
    }

    fn endpoints(&self, need: Need) -> impl Iterator<Item = &Endpoint> {
        self.0
            .endpoints
            .iter()
            .filter(move |endpoint| endpoint.serves(need))
    }

    fn nobody(&self, need: Need) -> ImageError {
        let capability = match need {
            Need::Resolve => "resolve",
            Need::Pull => "pull",
        };
        ImageError::Registry {
            registry: self.0.registry.clone(),
            reason: format!("no host in its hosts.toml has the capability {capability:?}"),
        }
    }
}

#[cfg(test)]
mod tests;
