//! What the fuzz targets of this crate do with one input (see `tests/fuzz`). The tests of the crate do it with the
//! targets' seeds, so that whatever a fuzzer has found is tried with every run of them.

mod agent;
mod files;
#[cfg(test)]
mod tests;

pub use crate::image::fuzzing::{image_documents, layer};
pub use agent::agent_replies;
pub use files::config_files;
