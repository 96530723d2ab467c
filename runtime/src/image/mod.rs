//! Images: pulled or loaded once, verified, and kept as one EROFS file a layer.
//!
//! ```text
//! registry · layout · archive ──▶ manifest, configuration ──▶ for each layer that is not here yet:
//!   source/      policy.rs ✓       document.rs                  blob ─▶ gunzip ─▶ tar ─▶ EROFS   (layer/, erofs/)
//!                                                                digest ✓     diff ID ✓    then it gets its name (store.rs)
//! ```
//!
//! Everything that comes from outside is bounded in size, count, depth and time, and is verified while it streams; a
//! layer has a name in the store only when it is right. [`Images`] is the way in.

mod config;
mod digest;
mod document;
mod erofs;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod images;
mod layer;
mod policy;
mod pull;
mod reference;
mod save;
mod source;
mod store;
#[cfg(test)]
mod testing;
mod verity;

pub use config::ImageConfig;
pub(crate) use digest::Hasher;
pub use digest::{DiffId, Digest};
pub use document::ContainerDefaults;
pub use error::ImageError;
pub use images::{FsInfo, Image, Images, Pruned, Removed};
pub use policy::Policy;
pub use pull::{Progress, Status};
pub use reference::Reference;
pub use source::registry::Auth;
