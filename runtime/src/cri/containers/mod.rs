//! Containers: create, start, stop, remove, run more in them, show them, and find them again.

mod create;
pub mod exec;
pub mod exits;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod image_volumes;
pub mod log;
mod memory_volumes;
mod propagation;
mod recover;
mod remove;
mod start;
pub mod stats;
mod stop;
mod update;
pub mod view;
mod volumes;

pub use create::create;
pub use recover::{recover, recover_dead, recover_half_made};
pub use remove::remove;
pub use start::{Copies, start};
pub use stop::stop;
pub use update::update;
pub use view::{cri_state, is_visible, item, status, verbose};

/// The exit code of a process that was killed with its sandbox (128 + SIGKILL).
const KILLED_CODE: i32 = 137;
/// The exit code of a container that could not be started.
const START_FAILED_CODE: i32 = 128;
