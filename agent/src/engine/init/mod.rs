//! The process that becomes a container's.
//!
//! The agent starts its own program anew, with [`super::INIT`] for its argument. That process, the first stage, joins the
//! namespaces that exist, makes the container's process beside itself in the new ones and in the control group,
//! and ends. The process it made, the second stage, is a child of the agent; it prepares everything from within,
//! reports that it is ready, waits for the word to start, and executes the container's program.
//!
//! Each step that fails ends the process with a sentence that says which step it was.

mod apparmor;
pub(crate) mod capabilities;
mod console;
mod container;
mod devices;
mod hooks;
pub(crate) mod mount_options;
mod mounts;
mod namespaces;
pub(crate) mod process;
pub(crate) mod resolve;
mod root;
mod sources;
mod stage;
pub(crate) mod sysctl;
mod user;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use caisson_proto::Unexecutable;

use super::channel::{Channel, Message};
use super::launch::{CGROUP, CHANNEL, HOST, PLAN, TARGET};
use super::plan::Plan;
use super::sys;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub(crate) struct Step {
    what: String,
    source: io::Error,
    /// The step was to execute the container's program.
    execute: bool,
}

impl Step {
    pub fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            what: what.into(),
            source: source.into(),
            execute: false,
        }
    }

    /// The step that executes the container's program, or looks for it.
    pub fn execute(program: &str, source: impl Into<io::Error>) -> Self {
        Self {
            execute: true,
            ..Self::new(format!("execute {program}"), source)
        }
    }

    fn unexecutable(&self) -> Option<Unexecutable> {
        self.execute.then(|| match self.source.kind() {
            io::ErrorKind::NotFound => Unexecutable::Missing,
            _ => Unexecutable::Refused,
        })
    }

    pub fn other(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::new(what, io::Error::other(reason.into()))
    }
}

/// Gives an error of the system the name of the step.
trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Step>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Step> {
        self.map_err(|error| Step::new(what(), error))
    }
}

/// What a stage may end as, apart from an error.
enum Done {
    /// Nothing more to do.
    Ended,
}

/// The main function of a process the engine started: its first argument is [`super::INIT`].
///
/// It expects the descriptors that the engine places, and ends with status 1 without them.
pub fn init_main() -> ! {
    // SAFETY: the engine placed these descriptors before it executed this program, and nothing has used them yet.
    let inherited = |number: RawFd| unsafe { OwnedFd::from_raw_fd(number) };
    // Somebody who runs the program this way by hand has no such descriptors.
    let placed = (CHANNEL..=HOST).all(|number| {
        // SAFETY: only asks for the flags of a number.
        unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
    });
    if !placed {
        eprintln!(
            "{} is started by the agent, not by hand",
            super::launch::INIT
        );
        std::process::exit(1);
    }
    let channel = Channel::from_descriptor(inherited(CHANNEL));
    let result = run(
        &channel,
        inherited(PLAN).into(),
        inherited(CGROUP),
        inherited(TARGET),
        inherited(HOST),
    );
    if let Err(step) = result {
        // Nobody is left to tell if this fails.
        let _ = channel.send(&Message::Failed {
            reason: step.to_string(),
            unexecutable: step.unexecutable(),
        });
        std::process::exit(1);
    }
    std::process::exit(0);
}

fn run(
    channel: &Channel,
    plan: File,
    cgroup: OwnedFd,
    target: OwnedFd,
    host: OwnedFd,
) -> Result<Done, Step> {
    sys::close_on_exec_from(3).during(|| "mark descriptors".into())?;
    // What a container joins must not be able to look into this process or trace it.
    nix::sys::prctl::set_dumpable(false).during(|| "hide from ptrace".into())?;
    let plan: Plan = serde_json::from_reader(io::BufReader::new(plan))
        .map_err(io::Error::from)
        .during(|| "read the plan".into())?;
    match plan {
        Plan::Create(plan) => {
            let sources = sources::open(&plan.spec, host, target.as_fd())?;
            stage::create(channel, *plan, cgroup.as_fd(), target.as_fd(), sources)
        }
        Plan::Exec(plan) => {
            drop(host);
            stage::exec(channel, *plan, cgroup.as_fd(), target.as_fd())
        }
        Plan::Hooks(list, state) => {
            hooks::run(&list, &state)?;
            channel
                .send(&Message::Ready(None))
                .during(|| "report".into())?;
            Ok(Done::Ended)
        }
        Plan::Namespaces { pod } => {
            namespaces::make(pod)?;
            channel
                .send(&Message::Ready(None))
                .during(|| "report".into())?;
            // Until the agent has what it wants of them.
            let _ = channel.receive(None);
            Ok(Done::Ended)
        }
    }
}
