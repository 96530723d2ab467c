//! A container's mounts: what every container has, then its volumes.

use caisson_proto::cri;
use serde_json::{Value, json};

use super::super::CriError;
use super::{Input, userns};
use crate::sandbox::host::HOST_PATH;

/// Where the agent keeps what the containers of a pod share.
const SANDBOX_DIR: &str = "/run/caisson/sandbox";
/// Mounts in the place of which a privileged container on the host has the host's.
const CGROUP_DIR: &str = "/sys/fs/cgroup";
const SHM_DIR: &str = "/dev/shm";

/// `mounts` of the spec, in the order in which they are made.
///
/// # Errors
/// INVALID_ARGUMENT for a destination that cannot be.
pub fn mounts(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Vec<Value>, CriError> {
    let own_ipc = security
        .namespace_options
        .as_ref()
        .is_some_and(|options| options.ipc() == cri::NamespaceMode::Container);
    let mut all = defaults(security.privileged, own_ipc);
    if let Some(host) = input.host {
        // A new mount of the host's whole hierarchy would set its options anew.
        if security.privileged && input.ids.is_none() {
            all.retain(|mount| mount["destination"] != CGROUP_DIR);
            all.push(of_host(CGROUP_DIR, &["nosuid", "noexec", "nodev", "rw"]));
        }
        if host.namespaces.ipc() == cri::NamespaceMode::Node && !own_ipc {
            all.retain(|mount| mount["destination"] != SHM_DIR);
            all.push(of_host(SHM_DIR, &["nosuid", "noexec", "nodev"]));
        }
    }
    for name in ["hostname", "hosts", "resolv.conf"] {
        let access = if security.readonly_rootfs { "ro" } else { "rw" };
        all.push(json!({
            "destination": format!("/etc/{name}"),
            "type": "bind",
            "source": format!("{SANDBOX_DIR}/{name}"),
            "options": ["rbind", "rprivate", access],
        }));
    }
    for volume in input.volumes {
        let destination = normalize(&volume.destination)?;
        // A volume in the place of what every container has replaces it.
        all.retain(|mount| mount["destination"] != destination.as_str());
        let access = match (volume.read_only, volume.recursive_read_only) {
            (true, true) => "rro",
            (true, false) => "ro",
            (false, _) => "rw",
        };
        let mut mount = json!({
            "destination": destination,
            "type": "bind",
            "source": volume.source,
            "options": ["rbind", propagation(volume.propagation), access],
        });
        if let Some(ids) = &volume.ids {
            (mount["uidMappings"], mount["gidMappings"]) = userns::oci(ids);
        }
        all.push(mount);
    }
    // What lies deeper is mounted later, or it would be hidden.
    all.sort_by_key(|mount| depth(mount["destination"].as_str().unwrap_or_default()));
    Ok(all)
}

/// A bind mount of a directory of the host at the same path.
fn of_host(path: &str, more: &[&str]) -> Value {
    let options: Vec<_> = ["rbind", "rprivate"].iter().chain(more).collect();
    json!({
        "destination": path,
        "type": "bind",
        "source": format!("{HOST_PATH}{path}"),
        "options": options,
    })
}

fn propagation(asked: cri::MountPropagation) -> &'static str {
    match asked {
        cri::MountPropagation::PropagationPrivate => "rprivate",
        cri::MountPropagation::PropagationHostToContainer => "rslave",
        cri::MountPropagation::PropagationBidirectional => "rshared",
    }
}

fn defaults(privileged: bool, own_ipc: bool) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        json!({
            "destination": destination,
            "type": kind,
            "source": source,
            "options": options,
        })
    };
    let access = if privileged { "rw" } else { "ro" };
    let shm = if own_ipc {
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        )
    } else {
        mount(
            "/dev/shm",
            "bind",
            &format!("{SANDBOX_DIR}/shm"),
            &["rbind", "rprivate", "nosuid", "noexec", "nodev"],
        )
    };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        shm,
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

/// An absolute path without `.`, `..`, doubled or trailing slashes.
fn normalize(path: &str) -> Result<String, CriError> {
    let invalid = |why: &str| {
        Err(CriError::invalid(format!(
            "the mount destination {path:?} {why}"
        )))
    };
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return invalid("is not an absolute path");
    }
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if parts.contains(&"..") {
        return invalid("contains ..");
    }
    if parts.is_empty() {
        return invalid("is the root file system itself");
    }
    Ok(format!("/{}", parts.join("/")))
}

fn depth(path: &str) -> usize {
    path.split('/').filter(|part| !part.is_empty()).count()
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::super::{ImageDefaults, Volume};
    use super::*;

    fn with(volumes: &[Volume]) -> Result<Vec<Value>, CriError> {
        let config = config();
        mounts(
            &Input {
                config: &config,
                image: &ImageDefaults::default(),
                hostname: "",
                shared_pid: false,
                target_pid: None,
                volumes,
                seccomp_profile: None,
                host: None,
                ids: None,
            },
            &cri::LinuxContainerSecurityContext::default(),
        )
    }

    fn volume(destination: &str) -> Volume {
        Volume {
            source: "/run/caisson/share/v1".into(),
            destination: destination.into(),
            read_only: true,
            recursive_read_only: false,
            propagation: cri::MountPropagation::PropagationPrivate,
            ids: None,
        }
    }

    #[test]
    fn a_volume_replaces_a_default_and_deeper_mounts_come_later() {
        let all = with(&[volume("/a/b/"), volume("/etc/hosts"), volume("//a")]).unwrap();
        let at = |destination: &str| {
            let found: Vec<_> = all
                .iter()
                .enumerate()
                .filter(|(_, m)| m["destination"] == destination)
                .collect();
            assert_eq!(found.len(), 1, "{destination}");
            found[0]
        };
        assert_eq!(at("/etc/hosts").1["source"], "/run/caisson/share/v1");
        assert!(at("/a").0 < at("/a/b").0);
        assert!(at("/dev").0 < at("/dev/shm").0);
        assert!(at("/sys").0 < at("/sys/fs/cgroup").0);
        assert_eq!(at("/a").1["options"], json!(["rbind", "rprivate", "ro"]));
    }

    #[test]
    fn destinations_that_cannot_be_are_refused() {
        for path in ["relative", "/", "/a/../b", "", "/a\0b"] {
            assert!(with(&[volume(path)]).is_err(), "{path:?}");
        }
    }
}
