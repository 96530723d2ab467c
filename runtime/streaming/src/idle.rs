//! A connection on which nothing moves is given up after a while, as a kubelet's own streaming servers do it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A transport that fails to be read, with `TimedOut`, when no byte has gone either way for some time.
///
/// One that is not read, because what it brought has not been taken yet, is not idle.
pub struct Idle<S> {
    transport: S,
    limit: Duration,
    moved: Instant,
    timer: Pin<Box<Sleep>>,
}

impl<S> Idle<S> {
    /// Watches a transport from now on.
    pub fn new(transport: S, limit: Duration) -> Self {
        Self {
            transport,
            limit,
            moved: Instant::now(),
            timer: Box::pin(tokio::time::sleep(limit)),
        }
    }

    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.timer.as_mut().poll(context));
            if self.moved.elapsed() >= self.limit {
                let seconds = self.limit.as_secs();
                let text = format!("nothing was sent either way for {seconds} s");
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            // Something has moved since the timer was set; it is not set anew for each byte.
            let end = self.moved + self.limit;
            self.timer.as_mut().reset(end);
        }
    }

    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.moved = Instant::now();
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Idle<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.transport).poll_read(context, buffer) {
            Poll::Ready(read) => {
                self.moved = Instant::now();
                Poll::Ready(read)
            }
            Poll::Pending => self.poll_idle(context).map(Err),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Idle<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.transport).poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.transport).poll_write_vectored(context, slices);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn only_a_silent_transport_is_given_up() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut idle = Idle::new(ours, LIMIT);
        let mut byte = [0];
        // Each direction keeps it for the whole time.
        let wait = Duration::from_secs(60);
        for _ in 0..5 {
            let silent = tokio::time::timeout(wait, idle.read(&mut byte));
            assert!(silent.await.is_err());
            theirs.write_all(b"x").await.unwrap();
            assert_eq!(idle.read(&mut byte).await.unwrap(), 1);
            let silent = tokio::time::timeout(wait, idle.read(&mut byte));
            assert!(silent.await.is_err());
            idle.write_all(b"y").await.unwrap();
            theirs.read_exact(&mut byte).await.unwrap();
        }
        let began = Instant::now();
        let error = idle.read(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= LIMIT);
    }
}
