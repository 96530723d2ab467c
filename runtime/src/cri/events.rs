//! What happens to containers and pods, for any number of watchers (CRI `GetContainerEvents`).
//!
//! There is one log. Each watcher has a place in it, so that many cost no more memory than the slowest, and what every
//! watcher has read is forgotten. A watcher misses nothing while it reads: only one that is [`MAX_EVENTS`] or
//! [`MAX_BYTES`] behind is given up, and is told so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use caisson_proto::cri;
use prost::Message as _;
use tokio::sync::watch;

use super::registry::{lock, now};

/// How many events a watcher may be behind.
const MAX_EVENTS: usize = 100_000;
/// How many bytes of events a watcher may be behind.
const MAX_BYTES: usize = 64 << 20;

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// What.
    pub kind: cri::ContainerEventType,
    /// The container, or the pod sandbox.
    pub id: String,
    /// The pod sandbox.
    pub sandbox_id: String,
    /// Unix time in nanoseconds; never before that of an earlier event.
    pub at: i64,
    /// Of a sandbox that is gone: what it was last. A kubelet knows by it whose sandbox that was.
    pub last: Option<cri::PodSandboxStatus>,
}

impl Event {
    fn bytes(&self) -> usize {
        let last = self
            .last
            .as_ref()
            .map_or(0, cri::PodSandboxStatus::encoded_len);
        size_of::<Self>() + self.id.len() + self.sandbox_id.len() + last
    }
}

/// A watcher has not read for so long that events were forgotten which it had not seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "the watcher of events is {0} events behind, and the oldest of them are forgotten; list everything anew and watch again"
)]
pub struct Behind(u64);

/// The log.
#[derive(Default)]
pub struct Events {
    log: Mutex<Log>,
    /// The number of the next event.
    next: watch::Sender<u64>,
}

#[derive(Default)]
struct Log {
    kept: VecDeque<Arc<Event>>,
    bytes: usize,
    /// The number of the next event; the last one kept has the number before.
    next: u64,
    /// How many watchers read next the event of each number.
    places: BTreeMap<u64, usize>,
    last_at: i64,
}

impl Log {
    fn first(&self) -> u64 {
        self.next - self.kept.len() as u64
    }

    fn forget_one(&mut self) {
        if let Some(event) = self.kept.pop_front() {
            self.bytes -= event.bytes();
        }
    }

    /// Forgets what no watcher will read.
    fn trim(&mut self) {
        let needed = self.places.keys().next().copied().unwrap_or(self.next);
        while self.first() < needed {
            self.forget_one();
        }
    }

    fn push(&mut self, mut event: Event) {
        self.last_at = self.last_at.max(now());
        event.at = self.last_at;
        self.next += 1;
        if self.places.is_empty() {
            return;
        }
        self.bytes += event.bytes();
        self.kept.push_back(Arc::new(event));
        while self.kept.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            self.forget_one();
            // For a watcher whose next event is forgotten nothing is kept any more.
            self.places = self.places.split_off(&self.first());
            self.trim();
        }
    }

    fn enter(&mut self, place: u64) {
        *self.places.entry(place).or_default() += 1;
    }

    fn leave(&mut self, place: u64) {
        if let Some(count) = self.places.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.places.remove(&place);
            }
        }
    }
}

impl Events {
    /// Tells watchers what happened to a container (or to a sandbox, whose ID then is both).
    pub fn emit(&self, event: Event) {
        let mut log = lock(&self.log);
        log.push(event);
        // Under the lock, so that numbers only grow.
        self.next.send_replace(log.next);
    }

    /// Whether anybody watches.
    pub fn is_watched(&self) -> bool {
        !lock(&self.log).places.is_empty()
    }

    /// Watches what happens from now on.
    pub fn watch(self: &Arc<Self>) -> Watcher {
        let mut log = lock(&self.log);
        let place = log.next;
        log.enter(place);
        Watcher {
            events: self.clone(),
            next: self.next.subscribe(),
            place,
        }
    }
}

/// A watcher's place in the log.
pub struct Watcher {
    events: Arc<Events>,
    next: watch::Receiver<u64>,
    place: u64,
}

impl Watcher {
    /// The next event, as soon as there is one. Can be dropped without losing one.
    ///
    /// # Errors
    /// [`Behind`], from then on for ever.
    pub async fn next(&mut self) -> Result<Arc<Event>, Behind> {
        loop {
            // The sender is in the log that this watcher holds: it does not go.
            let _ = self.next.wait_for(|next| *next > self.place).await;
            if let Some(event) = self.take()? {
                return Ok(event);
            }
        }
    }

    fn take(&mut self) -> Result<Option<Arc<Event>>, Behind> {
        let mut log = lock(&self.events.log);
        let Some(index) = self.place.checked_sub(log.first()) else {
            return Err(Behind(log.next - self.place));
        };
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(event) = log.kept.get(index).cloned() else {
            return Ok(None);
        };
        log.leave(self.place);
        self.place += 1;
        log.enter(self.place);
        log.trim();
        Ok(Some(event))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut log = lock(&self.events.log);
        log.leave(self.place);
        log.trim();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> Event {
        Event {
            kind: cri::ContainerEventType::ContainerStartedEvent,
            id: number.to_string(),
            sandbox_id: "p".to_owned(),
            at: 0,
            last: None,
        }
    }

    fn kept(events: &Events) -> (usize, usize) {
        let log = lock(&events.log);
        (log.kept.len(), log.bytes)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn two_hundred_watchers_miss_nothing_and_cost_what_one_does() {
        const COUNT: usize = 5000;
        let events = Arc::new(Events::default());
        events.emit(event(0)); // before anybody watches
        let mut slow = events.watch();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let mut watcher = events.watch();
            tasks.spawn(async move {
                let mut last = 0;
                for number in 1..=COUNT {
                    let event = watcher.next().await.unwrap();
                    assert_eq!(event.id, number.to_string());
                    assert!(event.at >= last);
                    last = event.at;
                }
            });
        }
        for number in 1..=COUNT {
            events.emit(event(number));
            if number % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        // One that has not read yet holds each event once, and then gets them all.
        assert_eq!(kept(&events).0, COUNT);
        for number in 1..=COUNT {
            assert_eq!(slow.next().await.unwrap().id, number.to_string());
        }
        assert_eq!(kept(&events), (0, 0));
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(10), slow.next());
        assert!(quiet.await.is_err());
    }

    #[tokio::test]
    async fn one_that_never_reads_is_given_up_and_holds_nothing_for_it() {
        let events = Arc::new(Events::default());
        let (mut stuck, mut reads) = (events.watch(), events.watch());
        for number in 0..MAX_EVENTS + 10 {
            events.emit(event(number));
            assert_eq!(reads.next().await.unwrap().id, number.to_string());
        }
        // Nobody else is behind, so that nothing is kept for one that is lost anyway.
        let behind = Behind(MAX_EVENTS as u64 + 10);
        assert_eq!(stuck.next().await.unwrap_err(), behind);
        assert_eq!(stuck.next().await.unwrap_err(), behind);
        assert!(kept(&events).0 <= 1, "{:?}", kept(&events));
        drop(stuck);
        events.emit(event(1));
        assert_eq!(reads.next().await.unwrap().id, "1");
        drop(reads);
        events.emit(event(2));
        assert_eq!(kept(&events), (0, 0));
    }

    #[tokio::test]
    async fn large_events_are_bounded_by_their_bytes() {
        let events = Arc::new(Events::default());
        let mut stuck = events.watch();
        let status = cri::PodSandboxStatus {
            id: "x".repeat(1 << 20),
            ..Default::default()
        };
        for number in 0..70 {
            let last = Some(status.clone());
            events.emit(Event {
                last,
                ..event(number)
            });
            assert!(kept(&events).1 <= MAX_BYTES);
        }
        assert_eq!(stuck.next().await.unwrap_err(), Behind(70));
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_loses_no_event() {
        let events = Arc::new(Events::default());
        let mut watcher = events.watch();
        let wait = tokio::time::timeout(std::time::Duration::from_millis(1), watcher.next());
        assert!(wait.await.is_err());
        events.emit(event(7));
        assert_eq!(watcher.next().await.unwrap().id, "7");
    }
}
