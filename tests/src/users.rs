//! Users and groups of a pod that are others on the node (KEP-127).

use caisson_proto::cri;
use cri::NamespaceMode;

/// The first of the pod's users, and of its groups, on the node: as many of each.
pub const UIDS: u32 = 65_536;
/// See [`UIDS`].
pub const GIDS: u32 = 131_072;
/// How many they are.
pub const LENGTH: u32 = 65_536;

/// So many IDs of a container that are those from `host_id` on.
pub fn mapping(container_id: u32, host_id: u32, length: u32) -> cri::IdMapping {
    cri::IdMapping {
        host_id,
        container_id,
        length,
    }
}

/// Namespaces with a user namespace of this kind.
pub fn with(
    mode: NamespaceMode,
    uids: &[cri::IdMapping],
    gids: &[cri::IdMapping],
) -> cri::NamespaceOption {
    cri::NamespaceOption {
        userns_options: Some(cri::UserNamespace {
            mode: mode.into(),
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        }),
        ..cri::NamespaceOption::default()
    }
}

/// As a kubelet asks for a pod with `hostUsers: false`.
pub fn mapped() -> cri::NamespaceOption {
    with(
        NamespaceMode::Pod,
        &[mapping(0, UIDS, LENGTH)],
        &[mapping(0, GIDS, LENGTH)],
    )
}
