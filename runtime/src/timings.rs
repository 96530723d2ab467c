//! How long each step of a pod's start took.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// One step.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// When it began, since the pod's start began.
    pub start: Duration,
    /// Its length.
    pub duration: Duration,
}

/// The steps of one pod's start, shared by those who take part in it.
#[derive(Clone, Debug)]
pub struct Timings {
    began: Instant,
    began_at: SystemTime,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Timings {
    /// The start begins now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
            began_at: SystemTime::now(),
            steps: Arc::default(),
        }
    }

    /// Runs a step and notes how long it took, whether it succeeded or not.
    pub async fn step<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let start = self.began.elapsed();
        let result = work.await;
        self.note(name, start, self.began.elapsed().saturating_sub(start));
        result
    }

    /// Notes a step that was measured elsewhere.
    pub fn note(&self, name: &str, start: Duration, duration: Duration) {
        self.steps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Step {
                name: name.to_owned(),
                start,
                duration,
            });
    }

    /// When the start began, by the clock on the wall.
    pub fn began_at(&self) -> SystemTime {
        self.began_at
    }

    /// The time since the start began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The steps so far, by their beginning.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = self
            .steps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        steps.sort_by_key(|step| step.start);
        steps
    }
}
