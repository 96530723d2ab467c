//! The serial console's output: a bounded log that never holds a vCPU up.

use crate::threads::{self, Kind};
use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that are collected before they are written, if no line ends before.
const LINE: usize = 256;
/// Lines on their way to the file. A guest that is faster than the disk loses lines, not time.
const BACKLOG: usize = 1024;
/// How long the end of the machine waits for the last lines.
const DRAIN: Duration = Duration::from_secs(2);

/// What the serial port writes to.
pub struct Console {
    line: Vec<u8>,
    limit: u64,
    to_writer: Option<SyncSender<Vec<u8>>>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Starts the thread that writes to `file`, at most `limit` bytes.
    ///
    /// # Errors
    /// What the system says when it cannot make the thread.
    pub fn new(mut file: File, limit: u64) -> io::Result<Self> {
        let (to_writer, lines) = sync_channel::<Vec<u8>>(BACKLOG);
        let (finished, done) = sync_channel(1);
        let thread = threads::spawn(Kind::Console, "console", 0, move || {
            for line in lines {
                // A full disk must not end the pod; the console is for people.
                let _ = file.write_all(&line);
            }
            let _ = finished.send(());
        })?;
        Ok(Self {
            line: Vec::with_capacity(LINE),
            limit,
            to_writer: Some(to_writer),
            done,
            thread: Some(thread),
        })
    }

    fn pass_on(&mut self) {
        let line = std::mem::replace(&mut self.line, Vec::with_capacity(LINE));
        if let Some(to_writer) = &self.to_writer
            && !line.is_empty()
        {
            let _ = to_writer.try_send(line);
        }
    }

    /// Writes what is left and ends the thread, waiting for a bounded time.
    pub fn finish(&mut self) {
        self.pass_on();
        self.to_writer = None;
        let Some(thread) = self.thread.take() else {
            return;
        };
        let begun = Instant::now();
        match self.done.recv_timeout(DRAIN) {
            Err(RecvTimeoutError::Timeout) => {
                eprintln!(
                    "the console log did not take its last lines in {:?}",
                    begun.elapsed()
                );
            }
            _ => {
                let _ = thread.join();
            }
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if self.limit == 0 {
                break;
            }
            self.limit -= 1;
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE || self.limit == 0 {
                self.pass_on();
            }
        }
        Ok(bytes.len())
    }

    /// The serial port flushes after each byte; a line is what is worth a system call.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn output_is_cut_at_the_limit_and_complete_below_it() {
        for (limit, want) in [(100, "one\ntwo"), (5, "one\nt"), (0, "")] {
            let mut file = tempfile::tempfile().unwrap();
            let mut console = Console::new(file.try_clone().unwrap(), limit).unwrap();
            console.write_all(b"one\ntwo").unwrap();
            console.finish();
            let mut got = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut got).unwrap();
            assert_eq!(got, want);
        }
    }
}
