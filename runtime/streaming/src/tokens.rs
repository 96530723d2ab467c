//! What a URL stands for: a request that a token opens once, within a minute.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a URL may be used.
const LIFETIME: Duration = Duration::from_secs(60);
/// The most URLs that wait to be used.
const MAX_WAITING: usize = 1000;

/// What a client was given a URL for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// A further process in a container.
    Exec {
        /// The container.
        container: String,
        /// The program and its arguments.
        command: Vec<String>,
        /// Which streams.
        wants: Wants,
    },
    /// The container's own process.
    Attach {
        /// The container.
        container: String,
        /// Which streams.
        wants: Wants,
    },
    /// Ports of a pod.
    PortForward {
        /// The pod sandbox.
        pod: String,
        /// The ports, where the client names them beforehand (WebSocket channels).
        ports: Vec<u16>,
    },
}

impl Request {
    /// The first part of its URL's path.
    pub fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// Which streams a client wants.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Wants {
    /// Standard input.
    pub stdin: bool,
    /// Standard output, or a terminal's.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// There are too many URLs that nobody used yet.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{MAX_WAITING} streaming URLs wait to be used; use one, or wait a minute")]
pub struct TooMany;

/// The requests that wait for their clients.
#[derive(Default)]
pub struct Tokens(Mutex<HashMap<String, (Instant, Request)>>);

impl Tokens {
    /// A new token for a request: 256 random bits in hexadecimal.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn issue(&self, request: Request) -> Result<String, TooMany> {
        let mut waiting = self.waiting();
        let now = Instant::now();
        if waiting.len() >= MAX_WAITING {
            waiting.retain(|_, (expiry, _)| *expiry > now);
        }
        if waiting.len() >= MAX_WAITING {
            return Err(TooMany);
        }
        let mut token = String::with_capacity(64);
        for byte in rand::random::<[u8; 32]>() {
            let _ = write!(token, "{byte:02x}");
        }
        waiting.insert(token.clone(), (now + LIFETIME, request));
        Ok(token)
    }

    /// The request of a token, which cannot be used again.
    pub fn redeem(&self, token: &str) -> Option<Request> {
        let (expiry, request) = self.waiting().remove(token)?;
        (expiry > Instant::now()).then_some(request)
    }

    /// A panic elsewhere leaves the table whole: each change is one call.
    fn waiting(&self) -> MutexGuard<'_, HashMap<String, (Instant, Request)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(n: u16) -> Request {
        Request::PortForward {
            pod: "p".into(),
            ports: vec![n],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_opens_once_and_expires() {
        let tokens = Tokens::default();
        let one = tokens.issue(request(1)).unwrap();
        let two = tokens.issue(request(2)).unwrap();
        assert_eq!(one.len(), 64);
        assert_eq!(tokens.redeem(&one), Some(request(1)));
        assert_eq!(tokens.redeem(&one), None);
        assert_eq!(tokens.redeem("no such token"), None);
        tokio::time::advance(LIFETIME - Duration::from_secs(1)).await;
        let three = tokens.issue(request(3)).unwrap();
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(tokens.redeem(&two), None);
        assert_eq!(tokens.redeem(&three), Some(request(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn their_number_is_bounded() {
        let tokens = Tokens::default();
        let all: Vec<_> = (0..1000)
            .map(|_| tokens.issue(request(0)).unwrap())
            .collect();
        assert!(tokens.issue(request(0)).is_err());
        tokens.redeem(&all[500]).unwrap();
        tokens.issue(request(0)).unwrap();
        assert!(tokens.issue(request(0)).is_err());
        tokio::time::advance(LIFETIME + Duration::from_secs(1)).await;
        for _ in 0..1000 {
            tokens.issue(request(0)).unwrap();
        }
        assert_eq!(tokens.waiting().len(), 1000);
    }
}
