//! Many pods live and end beside each other while the daemon, pod processes and agents are killed at random.
//!
//! `scripts/soak` is the long form. The environment says how many lives there are (`CAISSON_SOAK_LIVES`), how many of
//! them at a time (`CAISSON_SOAK_AT_A_TIME`), and from what chance (`CAISSON_TEST_SEED`).

mod chaos;
mod life;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use caisson_tests::{Node, Random, number};
use chaos::Chaos;
use life::{Ending, Life};

const LIVES: u64 = 12;
const AT_A_TIME: u64 = 4;

/// How the daemon's memory may grow between the first hundred lives after its last start and the end.
const GROWTH: f64 = 1.1;

/// What was found in all lives together.
#[derive(Debug, Default)]
struct Found {
    /// Lives that went on to their end.
    whole: u64,
    /// Lives whose pod was killed.
    killed: u64,
    /// Lives whose guest reset itself: the KVM lab's emulated processor does that.
    reset: u64,
    /// Bytes that should be in a log and are not.
    lost: u64,
    /// What was not as it should be.
    wrong: Vec<String>,
}

impl Found {
    fn add(&mut self, number: u64, ending: Ending) {
        match ending {
            Ending::Whole => self.whole += 1,
            Ending::Killed => self.killed += 1,
            Ending::Reset => self.reset += 1,
            Ending::Wrong { what, lost } => {
                self.lost += lost;
                println!("life {number}: {what}");
                self.wrong.push(format!("life {number}: {what}"));
            }
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} whole, {} killed, {} reset, {} wrong",
            self.whole,
            self.killed,
            self.reset,
            self.wrong.len()
        )
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lives_end_as_they_should_whatever_is_killed() {
    let lives = number("CAISSON_SOAK_LIVES").unwrap_or(LIVES);
    let at_a_time = number("CAISSON_SOAK_AT_A_TIME").unwrap_or(AT_A_TIME);
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    let mut random = Random::seeded();
    let chaos = Chaos::new(node.socket(), node.state());
    let logs = node.dir().join("logs");
    let next = AtomicU64::new(0);
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let workers = (0..at_a_time).map(|_| {
        let (chaos, logs, next, tell) = (&chaos, &logs, &next, tell.clone());
        async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= lives {
                    return;
                }
                let ending = Life::new(number, chaos, logs).live().await;
                tell.send((number, ending)).unwrap();
            }
        }
    });
    let workers = futures::future::join_all(workers);
    drop(tell);

    let began = Instant::now();
    let mut found = Found::default();
    let (mut done, mut first, mut last) = (0_u64, 0, 0);
    let watch = async {
        while let Some((number, ending)) = told.recv().await {
            found.add(number, ending);
            done += 1;
            // The daemon is left alone in the second half, so that there is a memory to be measured.
            if done.is_multiple_of((at_a_time / 2).max(1)) && done + at_a_time <= lives {
                chaos.kill(&mut node, &mut random, done < lives / 2).await;
            }
            last = node.daemon_memory();
            if done <= lives / 2 + 100 {
                first = last;
            }
            if done.is_multiple_of(50) || done == lives {
                let (seconds, mb) = (began.elapsed().as_secs(), last as f64 / 1e6);
                println!(
                    "{done} of {lives} lives in {seconds} s: {found}; {chaos}; the daemon has {mb:.1} MB"
                );
            }
        }
    };
    tokio::join!(workers, watch);
    println!(
        "{} log bytes lost, {} lives wrong; memory {:.1} MB, then {:.1} MB",
        found.lost,
        found.wrong.len(),
        first as f64 / 1e6,
        last as f64 / 1e6
    );
    node.assert_nothing_left().await;
    assert!(found.wrong.is_empty(), "{:#?}", found.wrong);
    assert!(
        last as f64 <= first as f64 * GROWTH,
        "the daemon grew from {first} to {last} bytes"
    );
    // One that resets is the machine's doing; many would be ours.
    assert!(
        found.reset <= 1 + lives / 20,
        "{} guests reset",
        found.reset
    );
}
