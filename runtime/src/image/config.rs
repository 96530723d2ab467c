//! The image service's part of the configuration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How images are fetched and what they may cost. Every key has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Registries (`host` or `host:port`) that are asked over plain HTTP. `localhost` and loopback addresses always
    /// are. Default: none.
    pub insecure_registries: Vec<String>,
    /// Mirrors of a registry, tried in order before the registry itself: host to `host`, `http://host` or
    /// `https://host`. They get no credentials. Default: none.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Most bytes that an image's layers may have together, unpacked; also the most that a layer may have packed.
    /// Default: 64 GiB.
    pub max_unpacked_bytes: u64,
    /// Most bytes that a layer may unpack to for each byte that it has, above 1 GiB. Default: 200.
    pub max_unpack_ratio: u64,
    /// Seconds after which a registry that sends nothing is given up. Default: 30.
    pub stall_timeout_seconds: u64,
    /// Layers that are fetched and converted at once, by all pulls together. Default: 3.
    pub parallel_layers: usize,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            insecure_registries: Vec::new(),
            mirrors: BTreeMap::new(),
            max_unpacked_bytes: 64 << 30,
            max_unpack_ratio: 200,
            stall_timeout_seconds: 30,
            parallel_layers: 3,
        }
    }
}
