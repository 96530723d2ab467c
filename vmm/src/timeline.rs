//! How long each step of the start took.

use std::time::Instant;

use caisson_vmm_protocol::Span;

/// The steps of the start, measured from the process's begin.
pub struct Timeline {
    origin: Instant,
    spans: Vec<Span>,
}

impl Timeline {
    /// A timeline that begins now.
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            spans: Vec::new(),
        }
    }

    /// Runs one step and notes when it was.
    pub fn measure<T>(&mut self, step: &str, run: impl FnOnce() -> T) -> T {
        let start = self.origin.elapsed();
        let result = run();
        self.spans.push(Span {
            step: step.to_owned(),
            start_us: start.as_micros() as u64,
            duration_us: (self.origin.elapsed() - start).as_micros() as u64,
        });
        result
    }

    /// Notes an event without length.
    pub fn mark(&mut self, step: &str) {
        self.measure(step, || ());
    }

    /// The steps so far.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}
