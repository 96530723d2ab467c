//! The control protocol between the daemon and a pod's `caisson-vmm` process.
//!
//! A stream unix socket carries frames: a 32-bit little-endian length, then that many bytes of JSON
//! (at most [`MAX_FRAME`]). Descriptors travel beside the first byte of a frame (`SCM_RIGHTS`); a message
//! names them by [`FdIndex`], the place in that list. Every [`Request`] is answered by one [`Reply`], in order.
//! After [`Request::Watch`] the connection carries only [`Event`]s, from the VMM to the daemon.
//!
//! The daemon starts `caisson-vmm` with one end of a socket pair as descriptor 3 and sends
//! [`Request::Boot`] there (or [`Request::Join`], for a pod that has no machine). A daemon that comes later connects to the listener that `Boot` handed over.
//! The VMM opens nothing by itself: everything it works on is in `Boot` or a later message.

mod channel;
mod messages;
mod saved;

pub use channel::{Channel, ChannelError, Frame, MAX_FDS, MAX_FRAME};
pub use messages::*;
pub use saved::Part;

/// The version of this protocol. A side that is told another one refuses with a sentence that names both.
pub const PROTOCOL_VERSION: u32 = 2;

/// The descriptor on which a new `caisson-vmm` finds its control socket.
pub const CONTROL_FD: i32 = 3;
