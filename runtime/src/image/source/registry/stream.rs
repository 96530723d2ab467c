//! A blob's download as a blocking reader, which goes on after a broken connection.

use std::io::{self, Read};

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::body::Body;
use super::{Session, back_off};
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
    pub(super) fn start(session: Session, digest: Digest, size: u64) -> Self {
        let (sender, parts) = mpsc::channel(PARTS);
        let task = tokio::spawn(async move {
            let last = download(&session, &digest, size, &sender)
                .await
                .map(|()| None);
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

async fn download(
    session: &Session,
    digest: &Digest,
    size: u64,
    sender: &Sender,
) -> Result<(), ImageError> {
    let what = digest.to_string();
    let (mut offset, mut failures) = (0u64, 0);
    loop {
        let before = offset;
        let error = match part(session, digest, size, &mut offset, sender).await {
            Ok(()) if offset == size => return Ok(()),
            Ok(()) => ImageError::corrupt(
                &*what,
                format!(
                    "registry {} ends it after {offset} of {size} bytes",
                    session.0.host
                ),
            ),
            Err(error @ (ImageError::Registry { .. } | ImageError::Stalled { .. })) => error,
            Err(error) => return Err(error),
        };
        let moved = offset - before >= MIN_RESUMED;
        if !moved && matches!(error, ImageError::Stalled { .. }) {
            return Err(error);
        }
        failures = if moved { 0 } else { failures + 1 };
        if failures >= RESUMES || sender.is_closed() {
            return Err(error);
        }
        tracing::debug!(%digest, offset, %error, "download is taken up again");
        tokio::time::sleep(back_off(failures)).await;
    }
}

/// One request: what comes of the blob from `offset` on.
async fn part(
    session: &Session,
    digest: &Digest,
    size: u64,
    offset: &mut u64,
    sender: &Sender,
) -> Result<(), ImageError> {
    let what = digest.to_string();
    let response = session.blob(digest, *offset).await?;
    // A registry may leave the range out of account, and begin again.
    let mut skip = *offset;
    if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|range| range.to_str().ok());
        let expected = format!("bytes {offset}-");
        if !range.is_some_and(|range| range.starts_with(&expected)) {
            return Err(ImageError::corrupt(
                what,
                format!(
                    "registry {} answers with another range than asked for",
                    session.0.host
                ),
            ));
        }
        skip = 0;
    }
    let expected = if skip > 0 { size } else { size - *offset };
    if response
        .content_length()
        .is_some_and(|length| length != expected)
    {
        return Err(ImageError::corrupt(
            what,
            format!(
                "registry {} has another size for it than the manifest's {size} bytes",
                session.0.host
            ),
        ));
    }
    let mut body = Body::new(response, &session.0.host, &what, session.0.stall);
    while let Some(mut bytes) = body.next().await? {
        if skip > 0 {
            let passed = bytes.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
            let _ = bytes.split_to(passed);
            skip -= passed as u64;
        }
        if bytes.len() as u64 > size - *offset {
            return Err(ImageError::corrupt(
                what,
                format!(
                    "registry {} sends more than the {size} bytes that the manifest says",
                    session.0.host
                ),
            ));
        }
        *offset += bytes.len() as u64;
        if !bytes.is_empty() && sender.send(Ok(Some(bytes))).await.is_err() {
            return Err(ImageError::Cancelled { what });
        }
    }
    Ok(())
}
