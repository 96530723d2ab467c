//! One line per notable event on standard error, which in the guest is the console.
//!
//! The host keeps the console in the pod's serial log. Each byte there is an exit to the VMM, so that the
//! default level is low. A full tracing subscriber would be a tenth of the binary.

use std::fmt::{Arguments, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// How notable a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Something failed that somebody asked for.
    Error = 0,
    /// Something is not as it should be, and the agent goes on.
    Warn = 1,
    /// A step in a pod's life.
    Info = 2,
    /// What helps to find out why.
    Debug = 3,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

impl Level {
    /// Parses the value of the kernel's command line parameter `caisson.log`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "error" => Self::Error,
            "warn" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Warn => "WARN",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
        }
    }
}

/// Lines above this level are dropped from now on.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Writes a line if its level is on. Use the macros [`error!`](crate::error), [`warn!`](crate::warn),
/// [`info!`](crate::info) and [`debug!`](crate::debug).
pub fn write(level: Level, message: Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    // One write a line, so that lines of several threads and of the kernel do not mix.
    let line = format!(
        "caisson-agent {}.{:03} {} {}\n",
        now.as_secs(),
        now.subsec_millis(),
        level.name(),
        message
    );
    // A console that is gone is no reason to stop.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Where a sequence of steps spends its time, in one debug line at the end: a line a step would cost more than most
/// steps.
pub struct Timing {
    since: Instant,
    text: String,
}

impl Timing {
    /// Starts the clock.
    pub fn start() -> Self {
        Self {
            since: Instant::now(),
            text: String::new(),
        }
    }

    /// The step of this name has ended.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        let _ = write!(self.text, " {name} {}", (now - self.since).as_micros());
        self.since = now;
    }

    /// Writes the line.
    pub fn tell(&self, what: &str) {
        write(Level::Debug, format_args!("{what}, in us:{}", self.text));
    }
}

/// Logs what failed.
#[macro_export]
macro_rules! error { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) } }
/// Logs what is not as it should be.
#[macro_export]
macro_rules! warn { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warn, format_args!($($arg)*)) } }
/// Logs a step in the pod's life.
#[macro_export]
macro_rules! info { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) } }
/// Logs a detail.
#[macro_export]
macro_rules! debug { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Debug, format_args!($($arg)*)) } }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_unknown_names_refused() {
        assert!(Level::Error < Level::Debug);
        assert_eq!(Level::parse("warn"), Some(Level::Warn));
        assert_eq!(Level::parse("WARN"), None);
        assert_eq!(Level::parse(""), None);
    }
}
