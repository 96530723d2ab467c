//! The pipes and terminals of a process, both ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::engine;
use crate::streams::{Endpoint, Kind};

/// Which standard streams a process gets; those it does not are `/dev/null`.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// A pipe for standard input.
    pub stdin: bool,
    /// A pipe for standard output.
    pub stdout: bool,
    /// A pipe for standard error.
    pub stderr: bool,
}

/// The agent's ends.
#[derive(Default)]
pub struct Streams {
    ends: Vec<Arc<Endpoint>>,
}

impl Streams {
    /// Makes the pipes: the agent's ends, and the process's.
    pub fn pipes(wanted: Wanted) -> io::Result<(Self, engine::Stdio)> {
        let mut streams = Self::default();
        let mut pipe = |kind| -> io::Result<OwnedFd> {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            let (ours, theirs) = match kind {
                Kind::Stdin => (writer, reader),
                _ => (reader, writer),
            };
            streams.ends.push(Endpoint::new(kind, ours)?);
            Ok(theirs)
        };
        let stdio = engine::Stdio {
            stdin: wanted.stdin.then(|| pipe(Kind::Stdin)).transpose()?,
            stdout: wanted.stdout.then(|| pipe(Kind::Stdout)).transpose()?,
            stderr: wanted.stderr.then(|| pipe(Kind::Stderr)).transpose()?,
        };
        Ok((streams, stdio))
    }

    /// The streams of a process with a terminal: the terminal itself, and its input by itself. The one who
    /// writes the log holds the terminal; whoever attaches later still can type.
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        let input = master.try_clone()?;
        Ok(Self {
            ends: vec![
                Endpoint::new(Kind::Tty, master)?,
                Endpoint::new(Kind::Stdin, input)?,
            ],
        })
    }

    /// All of them.
    pub fn all(&self) -> &[Arc<Endpoint>] {
        &self.ends
    }

    /// A stream, or a sentence that says why there is none.
    pub fn get(&self, kind: Kind) -> Result<Arc<Endpoint>, String> {
        if let Some(end) = self.ends.iter().find(|end| end.kind() == kind) {
            return Ok(end.clone());
        }
        let has_terminal = self.ends.iter().any(|end| end.kind() == Kind::Tty);
        Err(match (kind, has_terminal) {
            (Kind::Tty, _) => "the process has no terminal".into(),
            (_, true) => "the process has a terminal: connect tty".into(),
            (kind, false) => format!(
                "{} was not asked for when the process was made",
                kind.name()
            ),
        })
    }
}
