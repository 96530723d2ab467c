//! The security profiles that a container names: AppArmor's, and seccomp's in a file.

use caisson_proto::cri;
use serde_json::Value;

use crate::cri::CriError;
use crate::cri::spec::{self, AppArmor};
use crate::sandbox::host::apparmor;

/// The most bytes of a seccomp profile.
const MAX_PROFILE: u64 = 1 << 20;

/// The name of the AppArmor profile, which is loaded if it is the runtime's own; empty: none.
///
/// # Errors
/// INVALID_ARGUMENT for a profile that cannot be had here; FAILED_PRECONDITION where the runtime's own is asked for and
/// cannot be loaded.
pub(super) async fn apparmor(
    security: &cri::LinuxContainerSecurityContext,
) -> Result<String, CriError> {
    let enabled = apparmor::enabled().await;
    match spec::apparmor(security)? {
        AppArmor::Unconfined => Ok(String::new()),
        AppArmor::Named(name) if enabled => Ok(name),
        AppArmor::Named(name) => Err(CriError::invalid(format!(
            "the container asks for the AppArmor profile {name}, and the node's kernel has no AppArmor"
        ))),
        // Without AppArmor in the kernel the runtime's default is none.
        AppArmor::Default { .. } if !enabled => Ok(String::new()),
        AppArmor::Default { asked } => match apparmor::load_default().await {
            Ok(()) => Ok(apparmor::DEFAULT_PROFILE.to_owned()),
            Err(error) if asked => Err(CriError::precondition(format!(
                "the runtime's AppArmor profile cannot be loaded: {error}"
            ))),
            Err(error) => {
                tracing::warn!(%error, "a container runs without the runtime's AppArmor profile");
                Ok(String::new())
            }
        },
    }
}

/// The seccomp profile of a file, if the container names one.
///
/// # Errors
/// INVALID_ARGUMENT for a file that cannot be read or is not JSON.
pub(super) async fn seccomp(
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Option<Value>, CriError> {
    let Some(path) = spec::seccomp_file(security).filter(|_| !security.privileged) else {
        return Ok(None);
    };
    let fail = |why: String| {
        CriError::invalid(format!("the seccomp profile {path} cannot be used: {why}"))
    };
    let meta = tokio::fs::metadata(&path)
        .await
        .map_err(|e| fail(e.to_string()))?;
    if !meta.is_file() || meta.len() > MAX_PROFILE {
        return Err(fail("it is not a file of at most 1 MiB".into()));
    }
    let text = tokio::fs::read(&path)
        .await
        .map_err(|e| fail(e.to_string()))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| fail(e.to_string()))
}
