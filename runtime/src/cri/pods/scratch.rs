//! Where a pod's writable layers go, and how much they may hold.
//!
//! CRI has no field for a pod's `ephemeral-storage`: a kubelet measures and evicts. What is known of a pod beside the
//! configuration is in its annotations.

use caisson_proto::cri;

use super::super::CriError;
use crate::config::{HostSettings, MicroVmConfig, ScratchKind};
use crate::sandbox::Scratch;

/// A pod's annotation that says how much its containers may write to their root file systems together, as Kubernetes
/// states quantities: "512Mi", "2G". At most what the configuration allows.
pub const SIZE_ANNOTATION: &str = "caisson.dev/ephemeral-storage";
/// A pod's annotation that says where its writable layers go: "disk" or "memory".
pub const KIND_ANNOTATION: &str = "caisson.dev/scratch";

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The least that an annotation can ask for.
const LEAST: u64 = 16 * MIB;

/// The scratch space of a pod whose machine has so much memory.
///
/// # Errors
/// INVALID_ARGUMENT for an annotation that cannot be honoured.
pub fn of(
    config: &cri::PodSandboxConfig,
    defaults: &MicroVmConfig,
    memory_mib: u32,
) -> Result<Scratch, CriError> {
    let kind = match annotation(config, KIND_ANNOTATION) {
        None => defaults.scratch,
        Some("disk") => ScratchKind::Disk,
        Some("memory") => ScratchKind::Memory,
        Some(other) => {
            return Err(CriError::invalid(format!(
                "the annotation {KIND_ANNOTATION} is {other} and must be disk or memory"
            )));
        }
    };
    let (bytes, usual) = size(config, defaults.scratch_gib, "microvm.scratch_gib")?;
    Ok(match kind {
        ScratchKind::Disk => Scratch::Disk { bytes, usual },
        // What is written there is missing elsewhere: half of the memory, as any tmpfs has it.
        ScratchKind::Memory => Scratch::Memory {
            bytes: bytes.min(u64::from(memory_mib) * MIB / 2),
        },
    })
}

/// The scratch space of a pod on the host, which is always on disk.
///
/// # Errors
/// INVALID_ARGUMENT for an annotation that cannot be honoured.
pub fn on_host(
    config: &cri::PodSandboxConfig,
    settings: &HostSettings,
) -> Result<Scratch, CriError> {
    if let Some(other) = annotation(config, KIND_ANNOTATION).filter(|kind| *kind != "disk") {
        return Err(CriError::invalid(format!(
            "the annotation {KIND_ANNOTATION} is {other} and must be disk for a pod on the host"
        )));
    }
    let (bytes, usual) = size(config, settings.scratch_gib, "host.scratch_gib")?;
    Ok(Scratch::Disk { bytes, usual })
}

fn annotation<'a>(config: &'a cri::PodSandboxConfig, name: &str) -> Option<&'a str> {
    config.annotations.get(name).map(String::as_str)
}

/// The bytes that a pod asks for, or what the configuration's `key` says; whether it is that.
fn size(config: &cri::PodSandboxConfig, gib: u32, key: &str) -> Result<(u64, bool), CriError> {
    let most = u64::from(gib) * GIB;
    let Some(text) = annotation(config, SIZE_ANNOTATION) else {
        return Ok((most, true));
    };
    let bytes = quantity(text).filter(|bytes| (LEAST..=most).contains(bytes));
    bytes.map(|bytes| (bytes, false)).ok_or_else(|| {
        CriError::invalid(format!(
            "the annotation {SIZE_ANNOTATION} is {text}; it must be a quantity from 16Mi to {gib}Gi, which is {key} of the configuration"
        ))
    })
}

/// Bytes of a Kubernetes quantity: a whole number and a suffix.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => MIB,
        "Gi" => GIB,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(kind: Option<&str>, size: Option<&str>) -> Result<Scratch, CriError> {
        let mut config = cri::PodSandboxConfig::default();
        for (name, value) in [(KIND_ANNOTATION, kind), (SIZE_ANNOTATION, size)] {
            if let Some(value) = value {
                config.annotations.insert(name.into(), value.into());
            }
        }
        of(&config, &MicroVmConfig::default(), 512)
    }

    #[test]
    fn a_pod_gets_what_is_configured_or_less() {
        let disk = |bytes, usual| Scratch::Disk { bytes, usual };
        assert_eq!(plan(None, None).unwrap(), disk(8 * GIB, true));
        assert_eq!(plan(None, Some("512Mi")).unwrap(), disk(512 * MIB, false));
        assert_eq!(
            plan(Some("disk"), Some("8Gi")).unwrap(),
            disk(8 * GIB, false)
        );
        let memory = |bytes| Scratch::Memory { bytes };
        assert_eq!(plan(Some("memory"), None).unwrap(), memory(256 * MIB));
        assert_eq!(
            plan(Some("memory"), Some("64Mi")).unwrap(),
            memory(64 * MIB)
        );
        for (kind, size) in [
            (Some("ram"), None),
            (None, Some("9Gi")),
            (None, Some("1Mi")),
            (None, Some("")),
            (None, Some("1.5Gi")),
            (None, Some("-1Gi")),
            (None, Some("18446744073709551615Ti")),
            (None, Some("Gi")),
        ] {
            let error = plan(kind, size).unwrap_err();
            assert_eq!(
                error.code,
                tonic::Code::InvalidArgument,
                "{kind:?} {size:?}"
            );
        }
    }

    #[test]
    fn a_pod_on_the_host_writes_to_its_disk() {
        let on_host = |name: &str, value: &str| {
            let mut config = cri::PodSandboxConfig::default();
            config.annotations.insert(name.into(), value.into());
            on_host(&config, &HostSettings::default())
        };
        let disk = |bytes, usual| Scratch::Disk { bytes, usual };
        assert_eq!(on_host("other", "x").unwrap(), disk(8 * GIB, true));
        assert_eq!(on_host(SIZE_ANNOTATION, "1Gi").unwrap(), disk(GIB, false));
        let error = on_host(SIZE_ANNOTATION, "9Gi").unwrap_err();
        assert!(error.message.contains("host.scratch_gib"), "{error}");
        assert!(on_host(KIND_ANNOTATION, "memory").is_err());
    }

    #[test]
    fn quantities() {
        assert_eq!(quantity("20000000"), Some(20_000_000));
        assert_eq!(quantity("20M"), Some(20_000_000));
        assert_eq!(quantity("3Ki"), Some(3072));
        assert_eq!(quantity("2Tb"), None);
    }
}
