//! Answers of a registry, bounded in size and time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;
use tokio::time::Instant;

use super::Activity;
use super::endpoint::chain;
use crate::image::error::ImageError;

/// What must arrive within the stall time-out, in bytes: a byte now and then is not progress.
const MIN_PROGRESS: u64 = 1024;

/// Reads an answer's body in parts, and gives up on one that stops moving. The time that the reader takes between
/// the parts does not count.
pub(super) struct Body {
    response: Response,
    host: String,
    what: String,
    stall: Duration,
    activity: Arc<Activity>,
    /// Of the current window: the waiting that is left, and what has arrived.
    left: Duration,
    arrived: u64,
}

impl Body {
    pub(super) fn new(
        response: Response,
        host: &str,
        what: &str,
        stall: Duration,
        activity: Arc<Activity>,
    ) -> Self {
        Self {
            response,
            host: host.to_owned(),
            what: what.to_owned(),
            stall,
            activity,
            left: stall,
            arrived: 0,
        }
    }

    /// The next part; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ImageError> {
        let begin = Instant::now();
        let part = {
            let _waiting = self.activity.waiting();
            tokio::time::timeout(self.left, self.response.chunk()).await
        };
        self.left = self.left.saturating_sub(begin.elapsed());
        let Ok(part) = part else {
            return Err(ImageError::Stalled {
                registry: self.host.clone(),
                what: self.what.clone(),
                seconds: self.stall.as_secs(),
            });
        };
        let part = part.map_err(|error| ImageError::Registry {
            registry: self.host.clone(),
            reason: chain(&error),
        })?;
        match &part {
            Some(part) => self.arrived += part.len() as u64,
            None => self.activity.answered(),
        }
        if self.arrived >= MIN_PROGRESS {
            (self.left, self.arrived) = (self.stall, 0);
        }
        Ok(part)
    }

    /// The whole body, of at most `limit` bytes.
    pub(super) async fn all(mut self, limit: u64) -> Result<Vec<u8>, ImageError> {
        let too_large = |body: &Self| {
            ImageError::too_large(
                &*body.what,
                format!(
                    "registry {} sends more than the {limit} bytes that it may have",
                    body.host
                ),
            )
        };
        let stated = self.response.content_length();
        if stated.is_some_and(|length| length > limit) {
            return Err(too_large(&self));
        }
        let mut bytes = Vec::new();
        while let Some(part) = self.next().await? {
            if (bytes.len() + part.len()) as u64 > limit {
                return Err(too_large(&self));
            }
            self.activity.arrived(part.len() as u64);
            bytes.extend_from_slice(&part);
        }
        Ok(bytes)
    }
}
