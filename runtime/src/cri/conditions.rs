//! The conditions of the runtime (CRI `RuntimeStatus`).

use caisson_proto::cri;

use super::{Context, CriError};

/// `RuntimeReady` and `NetworkReady`, each with its reason where it does not hold. `kvm` is what the probe said.
pub fn conditions(context: &Context, kvm: Result<(), CriError>) -> Vec<cri::RuntimeCondition> {
    let condition = |kind: &str, result: Result<(), (&str, String)>| {
        let (reason, message) = result.as_ref().err().cloned().unwrap_or_default();
        cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status: result.is_ok(),
            reason: reason.to_owned(),
            message,
        }
    };
    let parts = [
        context.config.vmm_path(),
        context.config.kernel_path(),
        context.config.initramfs_path(),
    ];
    let runtime = match parts.into_iter().find_map(Result::err) {
        Some(error) => Err(("RuntimeIncomplete", error.to_string())),
        None => kvm.map_err(|error| ("KVMNotUsable", error.message)),
    };
    let network = context
        .network
        .ready()
        .map_err(|error| ("NetworkNotReady", error.to_string()));
    vec![
        condition("RuntimeReady", runtime),
        condition("NetworkReady", network),
    ]
}
