//! What a snapshot needs to find again.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{SnapshotError, failed};
use crate::image::{Digest, Hasher};
use crate::sandbox::microvm::MicroVmConfig;

/// What a machine was made with. Templates have the same in their name, by files' identities and the host's boot; a snapshot outlives
/// both, so here it is the content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dependencies {
    /// Caisson's version.
    pub version: String,
    /// SHA-256 of the guest's kernel.
    pub kernel: String,
    /// SHA-256 of its initramfs, in which the agent is.
    pub initramfs: String,
    /// SHA-256 of `caisson-vmm`.
    pub vmm: String,
    /// SHA-256 of what /proc/cpuinfo says of the host's processor: a guest asks once what it has.
    pub processor: String,
}

impl Dependencies {
    /// What there is here. Blocks.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn here(config: &MicroVmConfig) -> Result<Self, SnapshotError> {
        let cpuinfo = Path::new("/proc/cpuinfo");
        let text = fs::read_to_string(cpuinfo).map_err(failed("read", cpuinfo))?;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: digest(&config.kernel)?,
            initramfs: digest(&config.initramfs)?,
            vmm: digest(&config.pod.vmm)?,
            processor: Digest::of(processor(&text).as_bytes()).hex(),
        })
    }

    /// Compares a snapshot's with what is here.
    ///
    /// # Errors
    /// [`SnapshotError::Other`] with the first that differs.
    pub fn check(&self, here: &Self) -> Result<(), SnapshotError> {
        let pairs = [
            ("version of Caisson", &self.version, &here.version),
            ("guest kernel", &self.kernel, &here.kernel),
            ("agent", &self.initramfs, &here.initramfs),
            ("caisson-vmm", &self.vmm, &here.vmm),
            ("processor", &self.processor, &here.processor),
        ];
        match pairs.into_iter().find(|(_, then, now)| then != now) {
            Some((what, ..)) => Err(SnapshotError::Other(what)),
            None => Ok(()),
        }
    }
}

/// The lines on the first processor that say what it is, and not how fast it is now.
fn processor(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let lines = first.lines().filter(|line| {
        let key = line.split(':').next().unwrap_or_default().trim();
        let keys = [
            "vendor_id",
            "cpu family",
            "model",
            "model name",
            "stepping",
            "flags",
        ];
        keys.contains(&key)
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn digest(path: &Path) -> Result<String, SnapshotError> {
    let mut hasher = Hasher::default();
    let copied = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    copied.map_err(failed("read", path))?;
    Ok(hasher.finish().hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let here = Dependencies {
            version: "1".into(),
            kernel: "k".into(),
            initramfs: "i".into(),
            vmm: "v".into(),
            processor: "p".into(),
        };
        here.check(&here).unwrap();
        let other = Dependencies {
            initramfs: "j".into(),
            ..here.clone()
        };
        let error = other.check(&here).unwrap_err().to_string();
        assert!(error.contains("another agent"), "{error}");
    }

    #[test]
    fn a_processor_is_what_it_can_do() {
        let text = |mhz: &str, flags: &str| {
            format!(
                "processor\t: 0\nmodel name\t: X\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
            )
        };
        let one = processor(&text("1000", "fpu sse"));
        assert_eq!(processor(&text("2000", "fpu sse")), one);
        assert_ne!(processor(&text("1000", "fpu sse avx")), one);
    }
}
