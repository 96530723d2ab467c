//! Layers that registries do not distribute: the manifest says by URL where they are (OCI "descriptor.md", `urls`).

use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;

use super::Activity;
use super::endpoint::Endpoint;
use super::hosts::Host;
use crate::image::digest::Digest;
use crate::image::error::ImageError;

/// Most addresses that are tried for one layer.
const MAX_URLS: usize = 8;

/// The places of a foreign layer. A manifest is anybody's: these get no credentials, and only https is spoken to them, but for
/// the machine itself.
pub(super) fn endpoints(
    digest: &Digest,
    urls: &[String],
    stall: Duration,
    activity: &Arc<Activity>,
) -> Result<Vec<Endpoint>, ImageError> {
    let what = format!("the foreign layer {digest}");
    let mut endpoints = Vec::new();
    for url in urls.iter().take(MAX_URLS) {
        let parsed = Url::parse(url).ok();
        let Some(parsed) = parsed.filter(|url| matches!(url.scheme(), "http" | "https")) else {
            continue;
        };
        let base = parsed.origin().ascii_serialization();
        let Ok(host) = Host::of_url(&base) else {
            continue;
        };
        endpoints.push(Endpoint::fixed(
            host,
            parsed.into(),
            stall,
            activity.clone(),
        )?);
    }
    if endpoints.is_empty() {
        return Err(ImageError::unsupported(
            what,
            "the manifest names no https address from which it can be fetched",
        ));
    }
    Ok(endpoints)
}
