//! Whether a pod answers: its process on the host, and its agent behind it. Who asks holds no lock, and asks each pod by
//! itself, so that one that is silent delays nobody.
//!
//! What is silent is not ended: it may have been stopped by hand and go on. Its pod is not ready meanwhile.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use caisson_proto::agent as proto;
use tokio::sync::watch;

use super::control::{ControlError, Ping};
use super::{PodProcess, process};
use crate::sandbox::agent::{self, Echo, ProtocolError};

/// The pause between an answer and the next question. Each question wakes a guest that may be idle, and there are hundreds.
const EVERY: Duration = Duration::from_secs(2);
/// How long an answer may take: with the pause before it, less than 5 s pass until a silence is noticed.
const LIMIT: Duration = Duration::from_millis(2500);
/// In such portions the time is counted.
const PORTION: Duration = Duration::from_millis(500);
/// The longest that a pod which gets no CPU may take.
const LONGEST: Duration = Duration::from_secs(30);
/// The pause before a question that could not be asked is asked again.
const AGAIN: Duration = Duration::from_millis(200);

/// How a pod does.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Health {
    /// Nobody has asked yet.
    #[default]
    Unknown,
    /// It answers.
    Well,
    /// It does not answer, or nothing that is understood; why, as far as is known.
    Silent(String),
}

impl Health {
    /// The reason of a silence.
    pub fn silence(&self) -> Option<&str> {
        match self {
            Self::Silent(reason) => Some(reason),
            Self::Unknown | Self::Well => None,
        }
    }
}

/// Waits until a pod is silent.
pub async fn silent(mut health: watch::Receiver<Health>) {
    let _ = health.wait_for(|health| health.silence().is_some()).await;
}

/// Waits until a pod answers.
pub async fn well(mut health: watch::Receiver<Health>) {
    let _ = health.wait_for(|health| *health == Health::Well).await;
}

/// Asks a pod again and again until it has ended, and notes in its [`Health`] what it hears.
pub async fn tend(pod: &PodProcess) {
    let mut ended = pod.ended();
    let ask = async {
        let mut asker = Asker::default();
        loop {
            asker.ask(pod).await;
            tokio::time::sleep(EVERY).await;
        }
    };
    tokio::select! {
        _ = ended.wait_for(Option::is_some) => {}
        () = ask => {}
    }
}

/// What is kept from one question to the next.
#[derive(Default)]
struct Asker {
    ping: Ping,
    way: Way,
}

impl Asker {
    /// Asks both until both have answered, and notes a silence meanwhile. The question stays the same all the time: one
    /// that is asked again would pile up where nobody takes it.
    async fn ask(&mut self, pod: &PodProcess) {
        let (process, agent) = (Party::default(), Party::default());
        let answer = async {
            tokio::try_join!(
                ask_process(pod, &mut self.ping, &process),
                ask_agent(pod, &mut self.way, &agent),
            )
        };
        tokio::pin!(answer);
        let mut patience = Patience::new();
        loop {
            match tokio::time::timeout(PORTION, &mut answer).await {
                Ok(Ok(_)) => return note(pod, Health::Well),
                Ok(Err(reason)) => return note(pod, Health::Silent(reason)),
                Err(_) if pod.resting.load(Ordering::Relaxed) => {
                    patience = Patience::new();
                    continue;
                }
                Err(_) => {}
            }
            let waited = pod.pid().map(process::waited_for_cpu);
            if patience.is_over(waited.unwrap_or_default()) {
                note(pod, Health::Silent(silence(pod, &process, &agent)));
            }
        }
    }
}

fn note(pod: &PodProcess, health: Health) {
    pod.health.send_if_modified(|before| {
        // The first reason of a silence stays; what is heard later follows from it.
        let news = match (&*before, &health) {
            (Health::Silent(_), Health::Silent(_)) => false,
            (before, after) => before != after,
        };
        if news {
            *before = health;
        }
        news
    });
}

/// Who is asked.
#[derive(Default)]
struct Party {
    answered: AtomicBool,
    /// What was in the way last.
    trouble: Mutex<String>,
}

impl Party {
    fn note(&self, trouble: &impl ToString) {
        if let Ok(mut last) = self.trouble.lock() {
            *last = trouble.to_string();
        }
    }
}

async fn ask_process(pod: &PodProcess, ping: &mut Ping, party: &Party) -> Result<(), String> {
    loop {
        match ping.ask(&pod.control).await {
            Ok(()) => {
                party.answered.store(true, Ordering::Relaxed);
                return Ok(());
            }
            // It answers, in another language.
            Err(ControlError::Refused(sentence)) => return Err(sentence),
            Err(error) => party.note(&error),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn ask_agent(pod: &PodProcess, way: &mut Way, party: &Party) -> Result<(), String> {
    loop {
        match way.ask(pod).await {
            Ok(()) => {
                party.answered.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Err(error @ ProtocolError::Other { .. }) => return Err(error.to_string()),
            Err(error) => party.note(&error),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// How an agent is asked.
#[derive(Default)]
enum Way {
    /// It has not said yet which protocol it speaks.
    #[default]
    Unknown,
    /// By a byte.
    Echo(Echo),
    /// By a call: it is of a release that has no other way.
    Call,
}

impl Way {
    async fn ask(&mut self, pod: &PodProcess) -> Result<(), ProtocolError> {
        match self {
            Self::Unknown => {
                *self = match agent::check_protocol(&mut pod.agent()).await? {
                    true => Self::Echo(Echo::default()),
                    false => Self::Call,
                };
            }
            Self::Echo(echo) => echo.ask(&pod.address).await?,
            Self::Call => drop(pod.agent().health(proto::HealthRequest {}).await?),
        }
        Ok(())
    }
}

/// The reason of a silence, for people.
fn silence(pod: &PodProcess, process: &Party, agent: &Party) -> String {
    let stopped = pod.pid().filter(|pid| process::is_stopped(*pid));
    let (who, party) = if process.answered.load(Ordering::Relaxed) {
        ("agent", agent)
    } else {
        ("pod process", process)
    };
    if let Some(pid) = stopped {
        return format!("its pod process {pid} was stopped by a signal; SIGCONT lets it go on");
    }
    let trouble = party.trouble.lock().map(|t| t.clone()).unwrap_or_default();
    if trouble.is_empty() {
        format!("its {who} does not answer")
    } else {
        format!("its {who} does not answer: {trouble}")
    }
}

/// How long an answer is waited for. Time in which the pod had no CPU, because the node or the pod's limit has none to
/// spare, is no silence.
struct Patience {
    begun: Instant,
    counted: Duration,
    waited: Option<Duration>,
}

impl Patience {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            counted: Duration::ZERO,
            waited: None,
        }
    }

    /// Counts one more portion of time; `waited` is how long the pod process has waited for a CPU in all.
    fn is_over(&mut self, waited: Duration) -> bool {
        let starved = self
            .waited
            .map_or(Duration::ZERO, |before| waited.saturating_sub(before));
        self.waited = Some(waited);
        self.counted += PORTION.saturating_sub(starved);
        self.counted >= LIMIT || self.begun.elapsed() >= LONGEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_cpu_is_no_silence() {
        let portions = (LIMIT.as_millis() / PORTION.as_millis()) as u32;
        let mut patience = Patience::new();
        let over = |patience: &mut Patience, portions: u32, waits: Duration| {
            let mut waited = patience.waited.unwrap_or_default();
            (0..portions).any(|_| {
                waited += waits;
                patience.is_over(waited)
            })
        };
        assert!(!over(&mut patience, portions - 1, Duration::ZERO));
        assert!(!over(&mut patience, 20, PORTION), "it had no CPU");
        assert!(over(&mut patience, 1, Duration::ZERO));

        let mut for_ever = Patience::new();
        for_ever.begun = Instant::now().checked_sub(LONGEST).unwrap();
        assert!(over(&mut for_ever, 1, PORTION), "there is an end to it");
    }
}
