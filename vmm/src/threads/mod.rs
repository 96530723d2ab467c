//! The process's threads: each is of a kind, and may make only the system calls that its kind needs (seccomp(2)).
//!
//! A filter is inherited and can only be narrowed. A thread that a guest talks to would hence need, in its own
//! filter, all that the threads need that it starts. So it starts none: a starter, which hears of nothing but what to
//! start, does it for all. Whoever breaks a filter ends the process, and with it the pod.

mod filters;

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};

pub use filters::Kind;

/// Why the process's threads could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The filters.
    #[error(
        "the system call filters cannot be installed: {0}; the host's kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Filter(#[from] seccompiler::Error),
    /// The starter.
    #[error("the thread that starts the others cannot be started: {0}")]
    Starter(#[from] io::Error),
    /// Done twice.
    #[error("this process is confined already")]
    Twice,
}

type Start = Box<dyn FnOnce() + Send>;

/// Where wishes for threads go once the process is confined.
static STARTER: OnceLock<Sender<Start>> = OnceLock::new();

/// From here on each thread that [`spawn`] starts is confined by the filter of its kind, and by the one of all kinds
/// together. This thread is not: see [`confine_self`].
///
/// # Errors
/// [`ConfineError`]; the process must end then.
pub fn confine() -> Result<(), ConfineError> {
    one_heap();
    let (wishes, wished) = channel::<Start>();
    let (tell, told) = channel();
    Builder::new().name("starter".into()).spawn(move || {
        let confined = filters::install(Kind::Starter);
        let failed = confined.is_err();
        let _ = tell.send(confined);
        if failed {
            return;
        }
        for start in wished {
            start();
        }
    })?;
    told.recv().map_err(io::Error::other)??;
    STARTER.set(wishes).map_err(|_| ConfineError::Twice)
}

/// Has all threads share one heap. A thread with a heap of its own makes it smaller now and then, for which the C library
/// opens a file of `/proc`: no thread but the file server's may open one. It also takes less memory.
fn one_heap() {
    // SAFETY: takes numbers only, and there are no other threads yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Confines this thread, if the process is confined.
///
/// # Errors
/// [`ConfineError::Filter`]; the process must end then.
pub fn confine_self(kind: Kind) -> Result<(), ConfineError> {
    match STARTER.get() {
        Some(_) => Ok(filters::install(kind)?),
        None => Ok(()),
    }
}

/// Starts a thread of this kind. Its stack has `stack` bytes; 0 is the system's usual size.
///
/// # Errors
/// What the system says when it cannot make the thread.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    name: &str,
    stack: usize,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let mut builder = Builder::new().name(name.to_owned());
    if stack > 0 {
        builder = builder.stack_size(stack);
    }
    let Some(starter) = STARTER.get() else {
        return builder.spawn(run);
    };
    let (tell, told) = channel();
    let start = move || {
        let started = builder.spawn(move || {
            if let Err(error) = filters::install(kind) {
                // It went well for the starter. A thread without its filter must not run.
                eprintln!("a thread cannot be confined: {error}");
                std::process::abort();
            }
            run()
        });
        let _ = tell.send(started);
    };
    // Where the starter has ended the wish is dropped with its end of the answer, so that is noticed below.
    let _ = starter.send(Box::new(start));
    told.recv().map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
