//! How much a queue does in a second.

use std::time::{Duration, Instant};

use caisson_vmm_protocol::RateLimit;

/// What may be done at once after a rest: as much as in this time.
const BURST: Duration = Duration::from_millis(100);

/// Keeps a queue to its limit. What is done costs time; the queue is closed while more time was spent than has passed, but
/// for [`BURST`]. What was begun is done whole, whatever it costs, so a request larger than the burst is no deadlock.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    limit: RateLimit,
    /// Until when bytes have spent the time.
    bytes: Instant,
    /// Until when requests have.
    operations: Instant,
}

impl Rate {
    /// A rate of which nothing was spent.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            limit,
            bytes: now,
            operations: now,
        }
    }

    /// Whether there is a limit at all.
    pub fn is_limited(&self) -> bool {
        self.limit != RateLimit::default()
    }

    /// Accounts for one request with so many bytes of data.
    pub fn spend(&mut self, bytes: usize, now: Instant) {
        let later = |from: &mut Instant, units: u64, limit: u64| {
            if let Some(cost) = cost(units, limit) {
                let from_now = (*from).max(now);
                *from = from_now.checked_add(cost).unwrap_or(from_now);
            }
        };
        later(&mut self.bytes, bytes as u64, self.limit.bytes);
        later(&mut self.operations, 1, self.limit.operations);
    }

    /// When more may be done; `None`: now.
    pub fn closed_until(&self, now: Instant) -> Option<Instant> {
        let spent = self.bytes.max(self.operations);
        spent
            .checked_sub(BURST)
            .filter(|open_again| *open_again > now)
    }
}

/// The time that so many units take; `None` without a limit.
fn cost(units: u64, limit: u64) -> Option<Duration> {
    let nanoseconds = (u128::from(units) * 1_000_000_000).checked_div(u128::from(limit))?;
    // More than a day is as good as for ever, and cannot overflow a clock.
    let most = Duration::from_secs(86_400);
    Some(u64::try_from(nanoseconds).map_or(most, |n| Duration::from_nanos(n).min(most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much is done in some seconds by a driver that always has more.
    fn done(limit: RateLimit, bytes: usize, seconds: u64) -> u64 {
        let begin = Instant::now();
        let mut now = begin;
        let mut rate = Rate::new(limit, now);
        let mut count = 0;
        while now < begin + Duration::from_secs(seconds) {
            match rate.closed_until(now) {
                Some(until) => now = until,
                None => {
                    rate.spend(bytes, now);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn a_limit_is_met_and_not_passed() {
        let limit = RateLimit {
            bytes: 1_000_000,
            operations: 0,
        };
        // Ten seconds, and the burst; one more that was begun.
        let requests = done(limit, 4096, 10);
        let most = 10_100_000 / 4096 + 1;
        assert!((most - 1..=most + 1).contains(&requests), "{requests}");
        let limit = RateLimit {
            bytes: 0,
            operations: 50,
        };
        assert!((505..=506).contains(&done(limit, 1 << 20, 10)));
        // The narrower of two counts.
        let limit = RateLimit {
            bytes: 1_000_000,
            operations: 50,
        };
        assert!((505..=506).contains(&done(limit, 512, 10)));
        assert!((100..=103).contains(&done(limit, 100_000, 10)));
    }

    #[test]
    fn a_rest_is_not_saved_up_beyond_the_burst() {
        let now = Instant::now();
        let limit = RateLimit {
            bytes: 0,
            operations: 10,
        };
        let mut rate = Rate::new(limit, now);
        let later = now + Duration::from_secs(3600);
        assert_eq!(rate.closed_until(later), None);
        rate.spend(0, later);
        assert_eq!(rate.closed_until(later), None);
        rate.spend(0, later);
        assert_eq!(rate.closed_until(later), Some(later + BURST));
    }

    #[test]
    fn without_a_limit_nothing_waits_and_the_largest_request_overflows_nothing() {
        let now = Instant::now();
        let mut rate = Rate::new(RateLimit::default(), now);
        rate.spend(usize::MAX, now);
        assert_eq!(rate.closed_until(now), None);
        let mut rate = Rate::new(
            RateLimit {
                bytes: 1,
                operations: 1,
            },
            now,
        );
        rate.spend(usize::MAX, now);
        let until = rate.closed_until(now).unwrap();
        assert!(until <= now + Duration::from_secs(86_400));
    }
}
