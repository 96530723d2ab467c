//! Whether a pull moves.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// What must arrive within the time-out, in bytes: a byte now and then is not progress.
const MIN_PROGRESS: u64 = 64 << 10;

/// What the requests of a pull do, all together.
#[derive(Debug, Default)]
pub(in crate::image) struct Activity {
    /// Bytes that have arrived.
    bytes: AtomicU64,
    /// Answers that have come to their end.
    answers: AtomicU64,
    /// Requests that wait for the network now.
    waiting: AtomicUsize,
    /// Whether nobody wants the pull any more.
    cancelled: watch::Sender<bool>,
}

/// Ends a pull's downloads when it is dropped.
pub(in crate::image) struct EndOnDrop<'a>(pub(in crate::image) &'a Activity);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancelled.send_replace(true);
    }
}

/// One request waits while this lives.
pub(super) struct Waiting<'a>(&'a Activity);

impl Activity {
    pub(super) fn waiting(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    pub(super) fn arrived(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends when nobody wants the pull any more.
    pub(super) async fn cancelled(&self) {
        // The sender is here, so it cannot be gone.
        let _ = self
            .cancelled
            .subscribe()
            .wait_for(|cancelled| *cancelled)
            .await;
    }

    /// Ends when requests have waited for `limit` and next to nothing has come. Time in which nothing is asked for (the
    /// layer is another pull's, the disk is slow) does not count.
    pub(in crate::image) async fn stalled(&self, limit: Duration) {
        let tick = (limit / 16).clamp(Duration::from_millis(10), Duration::from_secs(1));
        let mark = || {
            (
                self.bytes.load(Ordering::Relaxed),
                self.answers.load(Ordering::Relaxed),
            )
        };
        let (mut last, mut since) = (mark(), Instant::now());
        loop {
            tokio::time::sleep(tick).await;
            let now = mark();
            let moved = now.1 != last.1 || now.0 - last.0 >= MIN_PROGRESS;
            if moved || self.waiting.load(Ordering::Relaxed) == 0 {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() >= limit {
                return;
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_waiting_in_vain_counts() {
        let activity = Activity::default();
        let limit = Duration::from_secs(60);
        let ends = |seconds| {
            let limit = Duration::from_secs(seconds);
            tokio::time::timeout(limit, activity.stalled(Duration::from_secs(60)))
        };
        assert!(ends(600).await.is_err(), "nobody waits");
        let _one = activity.waiting();
        assert!(ends(50).await.is_err());
        assert!(ends(70).await.is_ok());
        for count in [MIN_PROGRESS, 10] {
            let feed = async {
                loop {
                    tokio::time::sleep(limit / 3).await;
                    activity.arrived(count);
                }
            };
            let ended = tokio::select! {
                ended = ends(300) => ended,
                () = feed => unreachable!(),
            };
            assert_eq!(ended.is_ok(), count < MIN_PROGRESS, "{count}");
        }
    }
}
