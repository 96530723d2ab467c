//! A blob's download as a blocking reader, which goes on after a broken connection.

use std::io::{self, Read};

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::endpoint::{Endpoint, back_off};
use super::{Need, Session};
use crate::image::digest::Digest;
use crate::image::error::ImageError;

/// Parts (of some ten KiB each) that are in memory between the network and the reader.
const PARTS: usize = 64;
/// How often in a row a download is taken up again without anything new arriving.
const RESUMES: u32 = 4;
/// What counts as something, in bytes.
const MIN_RESUMED: u64 = 64 << 10;

/// The reader. Dropping it ends the download.
pub(in crate::image) struct BlobStream {
    /// A part; an error; or, as the last message, `None` for the end.
    parts: mpsc::Receiver<Result<Option<Bytes>, ImageError>>,
    current: Bytes,
    ended: bool,
    digest: Digest,
    task: JoinHandle<()>,
}

impl BlobStream {
    pub(super) fn start(
        session: Session,
        foreign: Vec<Endpoint>,
        digest: Digest,
        size: u64,
    ) -> Self {
        let (sender, parts) = mpsc::channel(PARTS);
        let task = tokio::spawn(async move {
            let last = tokio::select! {
                result = download(&session, &foreign, &digest, size, &sender) => result.map(|()| None),
                // The reader waits, and cannot be told otherwise.
                () = session.0.activity.cancelled() => Err(ImageError::Cancelled { what: digest.to_string() }),
            };
            // The reader may be gone, and then nobody asks.
            let _ = sender.send(last).await;
        });
        Self {
            parts,
            current: Bytes::new(),
            ended: false,
            digest,
            task,
        }
    }
}

impl Drop for BlobStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Read for BlobStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.parts.blocking_recv() {
                Some(Ok(Some(part))) => self.current = part,
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Err(error.into()),
                None => {
                    return Err(ImageError::Cancelled {
                        what: self.digest.to_string(),
                    }
                    .into());
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

type Sender = mpsc::Sender<Result<Option<Bytes>, ImageError>>;

/// Fetches the blob from the first server that gives it. One that breaks off is asked for the rest, again and again while
/// something comes; then the next server is.
async fn download(
    session: &Session,
    foreign: &[Endpoint],
    digest: &Digest,
    size: u64,
    sender: &Sender,
) -> Result<(), ImageError> {
    let mut offset = 0;
    let mut failure = None;
    for endpoint in foreign.iter().chain(session.endpoints(Need::Pull)) {
        match from(endpoint, digest, size, &mut offset, sender).await {
            Ok(()) => return Ok(()),
            Err(error @ ImageError::Cancelled { .. }) => return Err(error),
            Err(error) => {
                tracing::debug!(host = endpoint.name(), %digest, offset, %error, "download failed");
                failure = Some(error);
            }
        }
    }
    Err(failure.unwrap_or_else(|| session.nobody(Need::Pull)))
}

/// The blob from `offset` on, from one server.
async fn from(
    endpoint: &Endpoint,
    digest: &Digest,
    size: u64,
    offset: &mut u64,
    sender: &Sender,
) -> Result<(), ImageError> {
    let what = digest.to_string();
    let mut failures = 0;
    loop {
        let before = *offset;
        let error = match part(endpoint, digest, size, offset, sender).await {
            Ok(()) if *offset == size => return Ok(()),
            Ok(()) => {
                let host = endpoint.name();
                let reason = format!("registry {host} ends it after {offset} of {size} bytes");
                ImageError::corrupt(&*what, reason)
            }
            Err(error @ (ImageError::Registry { .. } | ImageError::Stalled { .. })) => error,
            Err(error) => return Err(error),
        };
        if *offset - before >= MIN_RESUMED {
            failures = 0;
        } else if !matches!(error, ImageError::Stalled { .. }) {
            // How long nothing may come is the pull's time-out to say.
            failures += 1;
        }
        if failures >= RESUMES || sender.is_closed() {
            return Err(error);
        }
        tracing::debug!(host = endpoint.name(), %digest, offset, %error, "download is taken up again");
        let _waiting = endpoint.activity.waiting();
        tokio::time::sleep(back_off(failures)).await;
    }
}

/// One request: what comes of the blob from `offset` on.
async fn part(
    endpoint: &Endpoint,
    digest: &Digest,
    size: u64,
    offset: &mut u64,
    sender: &Sender,
) -> Result<(), ImageError> {
    let what = digest.to_string();
    let host = endpoint.name();
    let wrong = |reason: String| Err(ImageError::corrupt(&*what, reason));
    let mut headers = HeaderMap::new();
    if *offset > 0 {
        let range = HeaderValue::try_from(format!("bytes={offset}-"));
        let range = range.map_err(|error| endpoint.failed(error.to_string()))?;
        headers.insert(RANGE, range);
    }
    let response = endpoint
        .get(&format!("blobs/{digest}"), &headers, &what)
        .await?;
    // A registry may leave the range out of account, and begin again.
    let mut skip = *offset;
    if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response.headers().get(CONTENT_RANGE);
        let range = range.and_then(|range| range.to_str().ok());
        let expected = format!("bytes {offset}-");
        if !range.is_some_and(|range| range.starts_with(&expected)) {
            return wrong(format!(
                "registry {host} answers with another range than asked for"
            ));
        }
        skip = 0;
    }
    let expected = if skip > 0 { size } else { size - *offset };
    if response
        .content_length()
        .is_some_and(|length| length != expected)
    {
        return wrong(format!(
            "registry {host} has another size for it than the manifest's {size} bytes"
        ));
    }
    let mut body = endpoint.body(response, &what);
    while let Some(mut bytes) = body.next().await? {
        if skip > 0 {
            let passed = bytes.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
            let _ = bytes.split_to(passed);
            skip -= passed as u64;
        }
        if bytes.len() as u64 > size - *offset {
            return wrong(format!(
                "registry {host} sends more than the {size} bytes that the manifest says"
            ));
        }
        *offset += bytes.len() as u64;
        // What was here before is no progress.
        endpoint.activity.arrived(bytes.len() as u64);
        if !bytes.is_empty() && sender.send(Ok(Some(bytes))).await.is_err() {
            return Err(ImageError::Cancelled { what });
        }
    }
    Ok(())
}
