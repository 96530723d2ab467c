//! Chance that can be repeated, and numbers that a person may set.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Values of no pattern; the same for the same seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Of the seed in `CAISSON_TEST_SEED`, or of one from the clock. Tells it, so that a run can be repeated.
    pub fn seeded() -> Self {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = number("CAISSON_TEST_SEED").unwrap_or(clock.as_nanos() as u64);
        println!("CAISSON_TEST_SEED={seed}");
        Self(seed)
    }

    /// At least 0 and less than 1.
    pub fn fraction(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A time below this one.
    pub fn below(&mut self, limit: Duration) -> Duration {
        limit.mul_f64(self.fraction())
    }

    /// An index into something with so many entries, of which there must be one.
    pub fn index(&mut self, entries: usize) -> usize {
        (self.fraction() * entries as f64) as usize
    }
}

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}
