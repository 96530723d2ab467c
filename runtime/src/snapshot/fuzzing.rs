//! What is read of a snapshot and of a pod process that writes one, for the fuzz targets `config_files` and `agent_replies`.

use std::path::PathBuf;

use super::files::{MOST_STATE, receive};
use super::{Manifest, SnapshotError};

/// The most memory that the machine of [`machine`] has, in bytes.
const MEMORY: u64 = 1 << 20;

/// A manifest; why it is refused, if so.
pub(crate) fn manifest(text: &str) -> Option<String> {
    let damaged = |reason| SnapshotError::Damaged {
        path: PathBuf::from("manifest.json"),
        reason,
    };
    match Manifest::parse(text.as_bytes(), damaged) {
        Ok(manifest) => {
            // Names of files are made of it.
            let ids = manifest.containers.iter().map(|container| &container.id);
            assert!(ids.chain([&manifest.pod.id]).all(|id| id.len() == 64));
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// What a pod process sends as its machine.
pub(crate) fn machine(said: &[u8]) {
    let file = || tempfile::tempfile().expect("a file");
    let length = |file: &std::fs::File| file.metadata().expect("a file").len();
    let (memory, state) = (file(), file());
    if let Err(error) = receive(said, MEMORY, &memory, &state) {
        assert!(!error.to_string().is_empty());
    }
    assert!(length(&memory) <= MEMORY && length(&state) <= MOST_STATE);
}
