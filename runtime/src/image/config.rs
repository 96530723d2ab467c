//! The image service's part of the configuration.

use std::path::PathBuf;

use super::policy::Policy;
use super::reference::Reference;

/// How images are fetched and what they may cost.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    /// Which servers are asked for a registry's images: containerd's `certs.d`, `HOST/hosts.toml` below it.
    pub certs_dir: PathBuf,
    /// Most bytes that an image's layers may have together, unpacked; also the most that a layer may have packed.
    pub max_unpacked_bytes: u64,
    /// Most bytes that a layer may unpack to for each byte that it has, above 1 GiB.
    pub max_unpack_ratio: u64,
    /// Seconds after which a request that brings nothing is made again.
    pub stall_timeout_seconds: u64,
    /// Seconds after which a pull that brings nothing is given up.
    pub progress_timeout_seconds: u64,
    /// Layers that are fetched and converted at once, by all pulls together, 1 to 64.
    pub parallel_layers: usize,
    /// Whether layers that registries do not distribute are fetched from the addresses in their manifest.
    pub foreign_layers: bool,
    /// Whether layers get fs-verity, and are used only with the digest that they got.
    pub verity: bool,
    /// Images that nothing but a person removes.
    pub pinned: Vec<Reference>,
    /// Registries whose images must be signed.
    pub policies: Vec<Policy>,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            certs_dir: "/etc/caisson/certs.d".into(),
            max_unpacked_bytes: 64 << 30,
            max_unpack_ratio: 200,
            stall_timeout_seconds: 30,
            progress_timeout_seconds: 300,
            parallel_layers: 3,
            foreign_layers: false,
            verity: false,
            pinned: Vec::new(),
            policies: Vec::new(),
        }
    }
}
