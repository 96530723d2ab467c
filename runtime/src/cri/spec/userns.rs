//! User namespaces (KEP-127): the IDs that a kubelet has chosen for a pod.
//!
//! A pod's containers share one user namespace, and its IDs are one range of users and one of groups, from 0 on. With it
//! the pod has namespaces of network, IPC and hostname that belong to it.

use caisson_proto::cri;
use cri::NamespaceMode;
use serde_json::{Value, json};

use super::super::CriError;
use crate::sandbox::ids::{IdRange, UserIds};

/// Where the agent keeps the namespaces of a pod with IDs of its own, by the kind that the OCI specification has.
const NAMESPACES: [(&str, &str); 4] = [
    ("user", "/run/caisson/ns/user"),
    ("network", "/run/caisson/ns/net"),
    ("ipc", "/run/caisson/ns/ipc"),
    ("uts", "/run/caisson/ns/uts"),
];

/// The IDs of the user namespace that is asked for; `None`: none is.
///
/// # Errors
/// INVALID_ARGUMENT for a mode or IDs that are not possible.
pub fn user_ids(options: &cri::NamespaceOption) -> Result<Option<UserIds>, CriError> {
    let Some(asked) = &options.userns_options else {
        return Ok(None);
    };
    let none = asked.uids.is_empty() && asked.gids.is_empty();
    match NamespaceMode::try_from(asked.mode) {
        Ok(NamespaceMode::Node) if none => return Ok(None),
        Ok(NamespaceMode::Node) => {
            return Err(CriError::invalid(
                "userns_options have the mode NODE and ID mappings; ask for POD, or leave the mappings out",
            ));
        }
        Ok(NamespaceMode::Pod) => {}
        _ => {
            return Err(CriError::invalid(format!(
                "userns_options have the mode {}, and user namespaces are a pod's or the node's; ask for POD or NODE",
                NamespaceMode::try_from(asked.mode).map_or_else(
                    |_| asked.mode.to_string(),
                    |mode| mode.as_str_name().to_owned()
                )
            )));
        }
    }
    for (mode, name) in [
        (options.network(), "network"),
        (options.pid(), "pid"),
        (options.ipc(), "ipc"),
    ] {
        if mode == NamespaceMode::Node {
            return Err(CriError::invalid(format!(
                "a pod with a user namespace cannot have the node's {name} namespace; ask for POD, or for the mode NODE in userns_options"
            )));
        }
    }
    let ids = mappings(&asked.uids, &asked.gids)
        .map_err(|why| CriError::invalid(format!("userns_options {why}")))?;
    Ok(Some(ids))
}

/// The IDs of a volume, which are none or the pod's.
///
/// # Errors
/// INVALID_ARGUMENT that names the mount.
pub fn mount_ids(mount: &cri::Mount, pod: Option<UserIds>) -> Result<Option<UserIds>, CriError> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(None);
    }
    let invalid =
        |why: String| CriError::invalid(format!("the mount at {} {why}", mount.container_path));
    let ids = mappings(&mount.uid_mappings, &mount.gid_mappings).map_err(invalid)?;
    if pod != Some(ids) {
        return Err(invalid(
            "has ID mappings that are not those of the pod's user namespace".into(),
        ));
    }
    Ok(Some(ids))
}

fn mappings(uids: &[cri::IdMapping], gids: &[cri::IdMapping]) -> Result<UserIds, String> {
    Ok(UserIds {
        uids: range(uids, "user")?,
        gids: range(gids, "group")?,
    })
}

fn range(mappings: &[cri::IdMapping], what: &str) -> Result<IdRange, String> {
    let [mapping] = mappings else {
        return Err(format!(
            "must have one mapping of {what} IDs, and has {}",
            mappings.len()
        ));
    };
    let (first, length) = (mapping.host_id, mapping.length);
    if mapping.container_id != 0 {
        return Err(format!(
            "map {what} IDs from {} on, and must from 0 on",
            mapping.container_id
        ));
    }
    // The last number there is means none.
    if length == 0 || first.checked_add(length).is_none() {
        return Err(format!(
            "map {length} {what} IDs from {first} of the host on, which are no range of IDs"
        ));
    }
    Ok(IdRange { first, length })
}

/// Adds the pod's user namespace and those that belong to it to a spec's `linux`; a namespace of the container's own
/// stays.
pub fn add(linux: &mut Value, ids: &UserIds) {
    let (uids, gids) = oci(ids);
    linux["uidMappings"] = uids;
    linux["gidMappings"] = gids;
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        for (kind, path) in NAMESPACES {
            if !namespaces.iter().any(|one| one["type"] == kind) {
                namespaces.push(json!({ "type": kind, "path": path }));
            }
        }
    }
}

/// As the OCI specification has them: users and groups.
pub fn oci(ids: &UserIds) -> (Value, Value) {
    let range =
        |range: IdRange| json!([{ "containerID": 0, "hostID": range.first, "size": range.length }]);
    (range(ids.uids), range(ids.gids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> cri::IdMapping {
        cri::IdMapping {
            container_id,
            host_id,
            length,
        }
    }

    fn asked(
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
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_has_one_range_of_each_kind() {
        let (uids, gids) = (mapping(0, 65_536, 65_536), mapping(0, 131_072, 10));
        let ids = user_ids(&asked(NamespaceMode::Pod, &[uids], &[gids])).unwrap();
        assert_eq!(
            ids,
            Some(UserIds {
                uids: IdRange {
                    first: 65_536,
                    length: 65_536
                },
                gids: IdRange {
                    first: 131_072,
                    length: 10
                },
            })
        );
        assert_eq!(user_ids(&Default::default()).unwrap(), None);
        assert_eq!(
            user_ids(&asked(NamespaceMode::Node, &[], &[])).unwrap(),
            None
        );
    }

    #[test]
    fn what_is_no_user_namespace_of_a_pod_is_refused() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let good = [mapping(0, 1000, 100)];
        for (mode, uids, gids, part) in [
            (Container, &good[..], &good[..], "CONTAINER"),
            (Container, &[], &[], "CONTAINER"),
            (Target, &[], &[], "TARGET"),
            (Node, &good, &good, "NODE"),
            (Pod, &[], &[], "one mapping of user IDs"),
            (Pod, &good, &[], "one mapping of group IDs"),
            (Pod, &[good[0], mapping(100, 5000, 1)], &good, "and has 2"),
            (Pod, &[mapping(1, 1000, 100)], &good, "from 0 on"),
            (Pod, &good, &[mapping(0, 1000, 0)], "no range"),
            (Pod, &[mapping(0, u32::MAX, 1)], &good, "no range"),
        ] {
            let error = user_ids(&asked(mode, uids, gids)).unwrap_err();
            assert_eq!(error.code, tonic::Code::InvalidArgument);
            assert!(error.message.contains(part), "{error}");
        }
        let mut on_node = asked(Pod, &good, &good);
        on_node.network = Node.into();
        let error = user_ids(&on_node).unwrap_err();
        assert!(error.message.contains("network"), "{error}");
    }

    #[test]
    fn a_volume_has_the_pods_ids_or_none() {
        let good = [mapping(0, 1000, 100)];
        let pod = user_ids(&asked(NamespaceMode::Pod, &good, &good)).unwrap();
        let mount = |uids: &[cri::IdMapping]| cri::Mount {
            container_path: "/data".into(),
            uid_mappings: uids.to_vec(),
            gid_mappings: uids.to_vec(),
            ..Default::default()
        };
        assert_eq!(mount_ids(&mount(&good), pod).unwrap(), pod);
        assert_eq!(mount_ids(&mount(&[]), pod).unwrap(), None);
        for (mount, pod) in [
            (mount(&good), None),
            (mount(&[mapping(0, 1001, 100)]), pod),
            (mount(&[good[0], good[0]]), pod),
        ] {
            let error = mount_ids(&mount, pod).unwrap_err();
            assert!(error.message.contains("/data"), "{error}");
        }
    }
}
