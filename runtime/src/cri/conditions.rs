//! The conditions of the runtime (CRI `RuntimeStatus`).

use caisson_proto::cri;

use super::{Context, CriError};
use crate::config::HandlerKind;

/// `RuntimeReady` and `NetworkReady`, each with its reason where it does not hold. `kvm` is what the probe said.
pub async fn conditions(
    context: &Context,
    kvm: Result<(), CriError>,
) -> Vec<cri::RuntimeCondition> {
    let condition = |kind: &str, result: Result<(), (&str, String)>| {
        let (reason, message) = result.as_ref().err().cloned().unwrap_or_default();
        cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status: result.is_ok(),
            reason: reason.to_owned(),
            message,
        }
    };
    let config = &context.config;
    let mut parts = vec![config.vmm_path()];
    if config.uses(HandlerKind::MicroVm) {
        parts.extend([config.kernel_path(), config.initramfs_path()]);
    }
    if config.uses(HandlerKind::Host) {
        parts.push(config.agent_path());
    }
    let runtime = match parts.into_iter().find_map(Result::err) {
        Some(error) => Err(("RuntimeIncomplete", error.to_string())),
        // A node whose pods are on the host unless they ask for more is ready without KVM.
        None if config.handler("") == Some(HandlerKind::Host) => Ok(()),
        None => kvm.map_err(|error| ("KVMNotUsable", error.message)),
    };
    let network = context
        .network
        .ready()
        .await
        .map_err(|error| ("NetworkNotReady", error.to_string()));
    vec![
        condition("RuntimeReady", runtime),
        condition("NetworkReady", network),
    ]
}
