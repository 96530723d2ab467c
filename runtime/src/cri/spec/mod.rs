//! From a CRI container configuration and an image's configuration to an OCI runtime spec (version 1.2).
//!
//! The spec is for the pod's agent. Network, IPC and UTS namespaces of a pod are the guest's own, or the agent's on the
//! host, so they do not appear in it. A host path does not appear as such either: volumes come as the agent's paths.

mod capabilities;
mod host;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod security;
pub mod signal;
mod userns;

use caisson_proto::cri;
use serde_json::{Value, json};

pub use host::{AppArmor, HostPod, apparmor, check_host_pod, devices};
pub use process::{ImageDefaults, exec_process};
pub use resources::{linux_resources, merge};
pub use security::{check_pod, seccomp_file};
pub use userns::{mount_ids, user_ids};

use super::CriError;
use crate::sandbox::ids::UserIds;

/// The version of the OCI runtime spec that is written.
const OCI_VERSION: &str = "1.2.0";

/// A volume, already shared with the guest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Volume {
    /// Its path in the guest.
    pub source: String,
    /// Where it is mounted in the container.
    pub destination: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether writes are refused in mounts below it too.
    pub recursive_read_only: bool,
    /// How mounts pass between the container and the host.
    pub propagation: cri::MountPropagation,
    /// The IDs that the agent has to map.
    pub ids: Option<UserIds>,
}

/// What a spec is made from.
#[derive(Debug)]
pub struct Input<'a> {
    /// The container as asked for.
    pub config: &'a cri::ContainerConfig,
    /// The image's configuration.
    pub image: &'a ImageDefaults,
    /// The pod's hostname.
    pub hostname: &'a str,
    /// Whether the pod has a PID namespace that containers share.
    pub shared_pid: bool,
    /// The process of the container whose PID namespace is asked for, in the guest.
    pub target_pid: Option<i32>,
    /// The volumes, one for each mount of the configuration, in its order.
    pub volumes: &'a [Volume],
    /// The text of the seccomp profile that the configuration names by path.
    pub seccomp_profile: Option<Value>,
    /// For a pod on the host; `None` for a microVM.
    pub host: Option<&'a HostPod>,
    /// The IDs of the pod's user namespace; `None`: it has none.
    pub ids: Option<UserIds>,
}

/// Makes the spec.
///
/// # Errors
/// INVALID_ARGUMENT or UNIMPLEMENTED that names the field which is wrong or cannot be honoured.
pub fn build(input: &Input<'_>) -> Result<Value, CriError> {
    let linux = input.config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    let privileged = security.privileged;
    security::check_container(input.config, &security, input.host, input.ids)?;

    let mut resources = linux_resources(&linux.resources.clone().unwrap_or_default())?;
    // The engine adds what every container may use (null, zero, tty, …) to a refusal of everything.
    let mut rules = vec![json!({ "allow": privileged, "access": "rwm" })];
    let devices = input.host.map_or(&[][..], |host| &host.devices);
    if !privileged {
        rules.extend(devices.iter().map(host::HostDevice::rule));
    }
    resources["devices"] = rules.into();
    let mut oci_linux = json!({
        "namespaces":
            security::namespaces(&security, input.shared_pid, input.target_pid, input.host, input.ids)?,
        "resources": resources,
        // Of the root alone: volumes have their own.
        "rootfsPropagation": "private",
    });
    if !devices.is_empty() {
        oci_linux["devices"] = devices.iter().map(host::HostDevice::node).collect();
    }
    if !privileged {
        oci_linux["maskedPaths"] = security::masked_paths(&security).into();
        oci_linux["readonlyPaths"] = security::readonly_paths(&security).into();
    }
    if let Some(ids) = &input.ids {
        userns::add(&mut oci_linux, ids);
    }
    let mut process = process::container_process(input, &security)?;
    if let Some(host) = input.host.filter(|host| !host.apparmor.is_empty()) {
        process["apparmorProfile"] = host.apparmor.clone().into();
    }
    if let Some(profile) = security::seccomp_choice(&security, input.seccomp_profile.as_ref())? {
        oci_linux["seccomp"] = match profile {
            security::Seccomp::Default => {
                seccomp::default_profile(&capabilities::bounding(&security)?)
            }
            security::Seccomp::Given(profile) => profile,
        };
    }
    Ok(json!({
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": { "path": "rootfs", "readonly": security.readonly_rootfs },
        "mounts": mounts::mounts(input, &security)?,
        "linux": oci_linux,
    }))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn config() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            command: vec!["true".into()],
            ..Default::default()
        }
    }

    pub fn with_security(security: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
        cri::ContainerConfig {
            linux: Some(cri::LinuxContainerConfig {
                resources: None,
                security_context: Some(security),
            }),
            ..config()
        }
    }

    pub fn built(config: &cri::ContainerConfig) -> Result<Value, CriError> {
        built_in(config, None)
    }

    fn built_in(config: &cri::ContainerConfig, host: Option<&HostPod>) -> Result<Value, CriError> {
        build(&Input {
            config,
            image: &ImageDefaults::default(),
            hostname: "web",
            shared_pid: true,
            target_pid: None,
            volumes: &[],
            seccomp_profile: None,
            host,
            ids: None,
        })
    }

    /// The agent refuses a field that the OCI runtime specification does not have; so must nothing of ours be lost when
    /// the specification's types read it.
    #[test]
    fn specs_are_what_the_specification_says() {
        let privileged = with_security(cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        });
        let host = HostPod {
            devices: devices(&cri::ContainerConfig {
                devices: vec![cri::Device {
                    container_path: "/dev/x".into(),
                    host_path: "/dev/null".into(),
                    permissions: "rw".into(),
                }],
                ..config()
            })
            .unwrap(),
            apparmor: "p".into(),
            ..HostPod::default()
        };
        let on_host = |config: &cri::ContainerConfig| built_in(config, Some(&host));
        let all = [
            built(&config()),
            built(&confined()),
            built(&privileged),
            on_host(&config()),
            on_host(&confined()),
            on_host(&privileged),
        ];
        for ours in all {
            let ours = ours.unwrap();
            let theirs: oci_spec::runtime::Spec = serde_json::from_value(ours.clone()).unwrap();
            assert_subset(&ours, &serde_json::to_value(theirs).unwrap(), "spec");
        }
    }

    fn assert_subset(part: &Value, whole: &Value, path: &str) {
        match part {
            Value::Object(fields) => {
                for (name, value) in fields {
                    assert_subset(value, &whole[name], &format!("{path}.{name}"));
                }
            }
            Value::Array(items) => {
                assert_eq!(items.len(), whole.as_array().map_or(0, Vec::len), "{path}");
            }
            _ => assert_eq!(part, whole, "{path}"),
        }
    }

    /// As a kubelet with `seccompDefault` asks.
    fn confined() -> cri::ContainerConfig {
        with_security(cri::LinuxContainerSecurityContext {
            seccomp: Some(cri::SecurityProfile {
                profile_type: cri::security_profile::ProfileType::RuntimeDefault as i32,
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    #[test]
    fn a_plain_container_is_confined() {
        let spec = built(&confined()).unwrap();
        assert_eq!(spec["root"]["path"], "rootfs");
        assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert!(
            spec["linux"]["maskedPaths"]
                .as_array()
                .unwrap()
                .contains(&json!("/proc/kcore"))
        );
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([{ "allow": false, "access": "rwm" }])
        );
        let kinds: Vec<_> = spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n["type"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(kinds, ["mount", "cgroup", "pid"]);
        assert_eq!(
            spec["linux"]["namespaces"][2]["path"],
            "/run/caisson/ns/pid"
        );
    }

    #[test]
    fn a_container_of_a_pod_with_ids_of_its_own() {
        let mapping = |host_id| {
            vec![cri::IdMapping {
                container_id: 0,
                host_id,
                length: 65_536,
            }]
        };
        let options = cri::NamespaceOption {
            ipc: cri::NamespaceMode::Container.into(),
            userns_options: Some(cri::UserNamespace {
                mode: cri::NamespaceMode::Pod.into(),
                uids: mapping(65_536),
                gids: mapping(131_072),
            }),
            ..Default::default()
        };
        let ids = user_ids(&options).unwrap();
        let config = with_security(cri::LinuxContainerSecurityContext {
            namespace_options: Some(options),
            privileged: true,
            ..Default::default()
        });
        let volume = Volume {
            source: "/run/caisson/host/x".into(),
            destination: "/x".into(),
            read_only: false,
            recursive_read_only: false,
            propagation: cri::MountPropagation::PropagationPrivate,
            ids,
        };
        let host = HostPod::default();
        let of = |ids| {
            build(&Input {
                config: &config,
                image: &ImageDefaults::default(),
                hostname: "web",
                shared_pid: true,
                target_pid: None,
                volumes: std::slice::from_ref(&volume),
                seccomp_profile: None,
                host: Some(&host),
                ids,
            })
        };
        let spec = of(ids).unwrap();
        let uids = json!([{ "containerID": 0, "hostID": 65_536, "size": 65_536 }]);
        assert_eq!(spec["linux"]["uidMappings"], uids);
        assert_eq!(spec["linux"]["gidMappings"][0]["hostID"], 131_072);
        let path = |kind: &str| {
            let all = spec["linux"]["namespaces"].as_array().unwrap();
            let mut found = all.iter().filter(|one| one["type"] == kind);
            let path = found.next().unwrap()["path"].clone();
            assert!(found.next().is_none(), "{kind}");
            path
        };
        assert_eq!(path("user"), "/run/caisson/ns/user");
        assert_eq!(path("network"), "/run/caisson/ns/net");
        assert_eq!(path("uts"), "/run/caisson/ns/uts");
        // Of its own, privileged as it is.
        assert_eq!(path("ipc"), Value::Null);
        assert_eq!(path("cgroup"), Value::Null);
        let mounts = spec["mounts"].as_array().unwrap();
        let mapped: Vec<_> = mounts
            .iter()
            .filter(|mount| mount.get("uidMappings").is_some())
            .collect();
        assert_eq!(mapped.len(), 1);
        assert_eq!(mapped[0]["uidMappings"], uids);

        let theirs: oci_spec::runtime::Spec = serde_json::from_value(spec.clone()).unwrap();
        assert_subset(&spec, &serde_json::to_value(theirs).unwrap(), "spec");
        let error = of(None).unwrap_err();
        assert!(error.message.contains("user namespace"), "{error}");
    }

    #[test]
    fn a_privileged_container_has_the_whole_guest() {
        let spec = built(&with_security(cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }))
        .unwrap();
        assert!(spec["linux"].get("maskedPaths").is_none());
        assert!(spec["linux"].get("seccomp").is_none());
        assert_eq!(
            spec["process"]["capabilities"]["bounding"]
                .as_array()
                .unwrap()
                .len(),
            41
        );
        let sys = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .find(|m| m["destination"] == "/sys")
            .unwrap();
        assert!(sys["options"].as_array().unwrap().contains(&json!("rw")));
    }
}
