//! A log file, into which both streams of a container write whole lines.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How often a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The file of a log, which can be replaced.
pub struct Sink {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    file: Option<File>,
    /// A writer is in the middle of its lines.
    busy: bool,
    /// Counts replacements.
    generation: u64,
    /// Bytes at the file's end of a line whose rest could not be written.
    torn: u64,
    /// Nobody wants the log any more: what cannot be written is let go.
    abandoned: bool,
}

impl Sink {
    /// A sink for this file; without one, all is let go.
    ///
    /// # Errors
    /// What the system says when it cannot make the file append.
    pub fn new(file: Option<OwnedFd>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                file: file.map(appending).transpose()?,
                busy: false,
                generation: 0,
                torn: 0,
                abandoned: false,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is valid by itself at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a file.
    pub fn has_file(&self) -> bool {
        self.lock().file.is_some()
    }

    /// Writes whole lines, not mixed with those of another writer. While they cannot be written it waits and
    /// tries again, until there is room or another file; `failing` is told why once for each such wait, and `None` when
    /// it is over.
    pub fn write(&self, lines: &[u8], failing: &dyn Fn(Option<&io::Error>)) {
        let mut state = self.lock();
        while state.busy {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.busy = true;
        let mut done = 0;
        let (mut told, mut over) = (false, false);
        while done < lines.len() {
            let Some(file) = &mut state.file else { break };
            let error = match file.write(&lines[done..]) {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(n) => {
                    done += n;
                    over |= std::mem::take(&mut told);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => e,
            };
            if state.abandoned {
                break;
            }
            let begin = line_begin(lines, done);
            state.torn = (done - begin) as u64;
            let generation = state.generation;
            if !std::mem::replace(&mut told, true) {
                // Without the lock: whoever is told may be waiting for it.
                drop(state);
                failing(Some(&error));
                state = self.lock();
            }
            if state.generation == generation && !state.abandoned {
                state = self
                    .changed
                    .wait_timeout(state, RETRY)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            if state.generation != generation {
                // The new file gets the line that was torn as a whole.
                done = begin;
                over |= std::mem::take(&mut told);
            }
        }
        state.torn = 0;
        state.busy = false;
        drop(state);
        if over {
            failing(None);
        }
        self.changed.notify_all();
    }

    /// Goes on in another file: the next byte goes there.
    ///
    /// # Errors
    /// What the system says when it cannot make the file append; the old one is then kept.
    pub fn reopen(&self, file: OwnedFd) -> io::Result<()> {
        let file = appending(file)?;
        let mut state = self.lock();
        let torn = std::mem::take(&mut state.torn);
        if let Some(old) = state.file.replace(file)
            && torn > 0
            && let Ok(meta) = old.metadata()
        {
            // The line is written as a whole to the new file. Where this fails the old file ends with a part of
            // it, which readers of logs put up with.
            let _ = old.set_len(meta.len().saturating_sub(torn));
        }
        state.generation += 1;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Lets go of what cannot be written from now on.
    pub fn abandon(&self) {
        self.lock().abandoned = true;
        self.changed.notify_all();
    }
}

/// Where the line begins that `at` is in the middle of.
fn line_begin(lines: &[u8], at: usize) -> usize {
    lines[..at]
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |end| end + 1)
}

/// Makes sure that writes go to the file's end, whoever else truncates or writes it.
fn appending(file: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_APPEND) {
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_APPEND))?;
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, mpsc};

    fn file() -> (tempfile::NamedTempFile, OwnedFd) {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let fd = temp.as_file().try_clone().unwrap().into();
        (temp, fd)
    }

    fn text(file: &tempfile::NamedTempFile) -> String {
        std::fs::read_to_string(file.path()).unwrap()
    }

    #[test]
    fn lines_go_to_the_end_of_the_file_of_the_day() {
        let (first, fd) = file();
        let sink = Sink::new(Some(fd)).unwrap();
        let never = |e: Option<&io::Error>| panic!("{e:?}");
        sink.write(b"a\n", &never);
        std::fs::write(first.path(), "x\n").unwrap();
        sink.write(b"b\n", &never);
        let (second, fd) = file();
        sink.reopen(fd).unwrap();
        sink.write(b"c\n", &never);
        assert_eq!(
            (text(&first).as_str(), text(&second).as_str()),
            ("x\nb\n", "c\n")
        );
    }

    #[test]
    fn what_does_not_fit_goes_whole_to_the_next_file() {
        // A full disk: /dev/full refuses every byte.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let sink = Arc::new(Sink::new(Some(full.into())).unwrap());
        let (told, failures) = mpsc::channel();
        let writer = {
            let sink = Arc::clone(&sink);
            std::thread::spawn(move || {
                sink.write(b"one\ntwo\n", &|e| {
                    told.send(e.and_then(io::Error::raw_os_error)).unwrap()
                });
            })
        };
        assert_eq!(failures.recv().unwrap(), Some(libc::ENOSPC));
        // Told once, however often it is tried.
        assert!(failures.recv_timeout(Duration::from_millis(1500)).is_err());
        let (next, fd) = file();
        sink.reopen(fd).unwrap();
        writer.join().unwrap();
        assert_eq!(text(&next), "one\ntwo\n");
        assert_eq!(failures.recv().unwrap(), None, "it is over");
    }

    #[test]
    fn a_torn_line_is_cut_from_the_old_file_and_written_whole_to_the_new() {
        // A non-blocking socket takes a part and then refuses: a disk that fills up in the middle of a line.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let sink = Arc::new(Sink::new(Some(ours.into())).unwrap());
        let mut lines = b"first\n".to_vec();
        lines.extend(vec![b'x'; 4 << 20]);
        lines.push(b'\n');
        let (told, failures) = mpsc::channel();
        let writer = {
            let (sink, lines) = (Arc::clone(&sink), lines.clone());
            std::thread::spawn(move || sink.write(&lines, &|_| told.send(()).unwrap()))
        };
        failures.recv().unwrap();
        let (next, fd) = file();
        sink.reopen(fd).unwrap();
        writer.join().unwrap();
        assert_eq!(text(&next).as_bytes(), &lines[6..]);
        drop(sink);
        let mut old = Vec::new();
        theirs.read_to_end(&mut old).unwrap();
        assert!(old.starts_with(b"first\nxxx") && old.len() < lines.len());
    }

    #[test]
    fn an_abandoned_log_holds_nobody() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let sink = Arc::new(Sink::new(Some(full.as_fd().try_clone_to_owned().unwrap())).unwrap());
        let (told, failures) = mpsc::channel();
        let writer = {
            let sink = Arc::clone(&sink);
            std::thread::spawn(move || sink.write(b"x\n", &|_| told.send(()).unwrap()))
        };
        failures.recv().unwrap();
        sink.abandon();
        writer.join().unwrap();
        sink.write(b"y\n", &|_| panic!("told of an abandoned log"));
    }
}
