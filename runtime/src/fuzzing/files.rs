//! One input of the fuzz target `config_files`: what an administrator writes, and what is found in directories.

use std::path::Path;

use crate::config::Config;
use crate::{image, network, snapshot};

/// The configuration, a registry's hosts.toml, a CNI network, or a snapshot's manifest.
pub fn config_files(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let refused = match kind % 4 {
        0 => Config::parse(text, Path::new("config.toml"))
            .err()
            .map(|error| error.to_string()),
        1 => image::fuzzing::hosts(text),
        2 => network::fuzz_list(text),
        _ => snapshot::fuzzing::manifest(text),
    };
    if let Some(sentence) = refused {
        assert!(!sentence.is_empty());
    }
}
