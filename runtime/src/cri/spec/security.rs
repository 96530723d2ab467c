//! Namespaces, seccomp, hidden paths, and what a microVM cannot honour.

use caisson_proto::cri;
use cri::NamespaceMode;
use cri::security_profile::ProfileType;
use serde_json::{Value, json};

use super::super::CriError;
use super::HostPod;
use super::userns::user_ids;
use crate::sandbox::ids::UserIds;

/// The pod's shared PID namespace, in the guest.
const SHARED_PID: &str = "/run/caisson/ns/pid";

/// What nobody needs to read in /proc and /sys (as other runtimes hide it).
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What nobody needs to write in /proc.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// A seccomp profile to apply.
#[derive(Clone, Debug, PartialEq)]
pub enum Seccomp {
    /// The runtime's own.
    Default,
    /// One that the node's administrator keeps in a file.
    Given(Value),
}

/// Checks that a microVM can be what this pod asks for.
///
/// # Errors
/// INVALID_ARGUMENT or UNIMPLEMENTED that names the field; `host_hint` says how to have such a pod.
pub fn check_pod(config: &cri::PodSandboxConfig, host_hint: &str) -> Result<(), CriError> {
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let options = security.namespace_options.unwrap_or_default();
    for (mode, name) in [
        (options.network(), "hostNetwork"),
        (options.pid(), "hostPID"),
        (options.ipc(), "hostIPC"),
    ] {
        if mode == NamespaceMode::Node {
            return Err(CriError::invalid(format!(
                "a pod with {name} cannot be in a microVM; {host_hint}"
            )));
        }
    }
    if options.network() == NamespaceMode::Container {
        return Err(CriError::unimplemented(
            "a network namespace for each container of a pod is not supported; ask for POD",
        ));
    }
    user_ids(&options).map(drop)
}

/// Checks what no spec could express, in a microVM where there is no `host`. `ids` are those of the pod.
///
/// # Errors
/// INVALID_ARGUMENT or UNIMPLEMENTED that names the field.
pub fn check_container(
    config: &cri::ContainerConfig,
    security: &cri::LinuxContainerSecurityContext,
    host: Option<&HostPod>,
    ids: Option<UserIds>,
) -> Result<(), CriError> {
    if host.is_none()
        && let Some(device) = config.devices.first()
    {
        return Err(CriError::unimplemented(format!(
            "the device {} of the host cannot be given to a microVM; use a handler of kind `host`",
            device.host_path
        )));
    }
    if let Some(device) = config.cdi_devices.first() {
        return Err(CriError::unimplemented(format!(
            "the CDI device {} cannot be given to a container; CDI is not supported",
            device.name
        )));
    }
    if config.windows.is_some() {
        return Err(CriError::invalid(
            "the configuration has a windows section, and this is a Linux runtime",
        ));
    }
    let local_apparmor = security
        .apparmor
        .as_ref()
        .is_some_and(|profile| profile.profile_type() == ProfileType::Localhost);
    #[allow(deprecated)] // clients of older Kubernetes releases still set it
    let named_apparmor = security.apparmor_profile.starts_with("localhost/");
    if host.is_none() && (local_apparmor || named_apparmor) {
        return Err(CriError::unimplemented(
            "an AppArmor profile of the host has no meaning in the guest's kernel; use RuntimeDefault or Unconfined",
        ));
    }
    if user_ids(&security.namespace_options.clone().unwrap_or_default())? != ids {
        return Err(CriError::invalid(
            "the container and its pod do not agree on the user namespace; give both the same userns_options",
        ));
    }
    Ok(())
}

/// `linux.namespaces`. The pod's network, IPC and UTS namespaces are the guest's own, or the agent's on the host, and
/// not listed.
///
/// # Errors
/// INVALID_ARGUMENT for a namespace mode that is not possible.
pub fn namespaces(
    security: &cri::LinuxContainerSecurityContext,
    shared_pid: bool,
    target_pid: Option<i32>,
    host: Option<&HostPod>,
    ids: Option<UserIds>,
) -> Result<Vec<Value>, CriError> {
    let options = security.namespace_options.clone().unwrap_or_default();
    let mut all = vec![json!({ "type": "mount" })];
    // The root of a user namespace can do nothing with the groups of others.
    if !security.privileged || ids.is_some() {
        all.push(json!({ "type": "cgroup" }));
    } else if host.is_some() {
        // Else it would have the pod's, which is the agent's own.
        all.push(json!({ "type": "cgroup", "path": "/proc/1/ns/cgroup" }));
    }
    let of_pod = host.map(|host| &host.namespaces);
    for (mode, pods, name) in [
        (options.network(), of_pod.map(|o| o.network()), "network"),
        (options.pid(), of_pod.map(|o| o.pid()), "pid"),
        (options.ipc(), of_pod.map(|o| o.ipc()), "ipc"),
    ] {
        let node = NamespaceMode::Node;
        match pods {
            None if mode == node => {
                return Err(CriError::invalid(format!(
                    "a container in a microVM cannot have the node's {name} namespace; use a handler of kind `host`"
                )));
            }
            Some(pods) if mode == node && pods != node => {
                return Err(CriError::invalid(format!(
                    "the container asks for the node's {name} namespace and its pod does not; ask for NODE in both"
                )));
            }
            _ => {}
        }
    }
    let pod_has_nodes = of_pod.is_some_and(|o| o.pid() == NamespaceMode::Node);
    match options.pid() {
        // POD is what the pod has, be it the node's.
        NamespaceMode::Pod if pod_has_nodes => {}
        NamespaceMode::Pod if shared_pid => {
            all.push(json!({ "type": "pid", "path": SHARED_PID }));
        }
        NamespaceMode::Pod => {
            return Err(CriError::invalid(
                "the container asks for the pod's PID namespace, but the pod was made without one; ask for CONTAINER",
            ));
        }
        NamespaceMode::Target => {
            let pid = target_pid.ok_or_else(|| {
                CriError::invalid(
                    "the PID namespace mode TARGET needs the ID of a running container",
                )
            })?;
            all.push(json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") }));
        }
        NamespaceMode::Container => all.push(json!({ "type": "pid" })),
        NamespaceMode::Node => {}
    }
    if options.ipc() == NamespaceMode::Container {
        all.push(json!({ "type": "ipc" }));
    }
    if options.network() == NamespaceMode::Container {
        return Err(CriError::unimplemented(
            "a network namespace of the container's own is not supported; ask for POD",
        ));
    }
    Ok(all)
}

/// The paths hidden from the container: those asked for, or else the usual ones.
pub fn masked_paths(security: &cri::LinuxContainerSecurityContext) -> Vec<String> {
    chosen(&security.masked_paths, &MASKED)
}

/// The paths read-only to the container: those asked for, or else the usual ones.
pub fn readonly_paths(security: &cri::LinuxContainerSecurityContext) -> Vec<String> {
    chosen(&security.readonly_paths, &READ_ONLY)
}

fn chosen(asked: &[String], usual: &[&str]) -> Vec<String> {
    if asked.is_empty() {
        usual.iter().map(|path| (*path).to_owned()).collect()
    } else {
        asked.to_vec()
    }
}

/// The path of the seccomp profile file that the configuration names, if it names one.
pub fn seccomp_file(security: &cri::LinuxContainerSecurityContext) -> Option<String> {
    if let Some(profile) = &security.seccomp {
        return (profile.profile_type() == ProfileType::Localhost)
            .then(|| profile.localhost_ref.clone());
    }
    #[allow(deprecated)] // clients of older Kubernetes releases still set it
    let path = &security.seccomp_profile_path;
    path.strip_prefix("localhost/").map(str::to_owned)
}

/// Which seccomp profile holds; `None`: none. As CRI has it, a configuration that says nothing is unconfined; a kubelet
/// with `seccompDefault` asks for RuntimeDefault by name, and so does `caisson run`.
///
/// # Errors
/// INVALID_ARGUMENT for a profile that is named and not there, or a type that is not known.
pub fn seccomp_choice(
    security: &cri::LinuxContainerSecurityContext,
    file: Option<&Value>,
) -> Result<Option<Seccomp>, CriError> {
    if security.privileged {
        return Ok(None);
    }
    if seccomp_file(security).is_some() {
        let profile = file
            .ok_or_else(|| CriError::invalid("the seccomp profile that is named was not read"))?;
        return Ok(Some(Seccomp::Given(profile.clone())));
    }
    #[allow(deprecated)] // clients of older Kubernetes releases still set it
    let path = security.seccomp_profile_path.as_str();
    match &security.seccomp {
        Some(profile) => match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Unconfined) => Ok(None),
            Ok(_) => Ok(Some(Seccomp::Default)),
            Err(_) => Err(CriError::invalid(format!(
                "the seccomp profile type {} is not known",
                profile.profile_type
            ))),
        },
        None if path.is_empty() || path == "unconfined" => Ok(None),
        None if path == "runtime/default" || path == "docker/default" => Ok(Some(Seccomp::Default)),
        None => Err(CriError::invalid(format!(
            "the seccomp profile {path} is not known; use runtime/default, unconfined or localhost/PATH"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, config, with_security};
    use super::*;

    fn pod(options: cri::NamespaceOption) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn pods_of_the_node_are_refused_and_told_where_to_go() {
        let node = NamespaceMode::Node as i32;
        for (options, name) in [
            (
                cri::NamespaceOption {
                    network: node,
                    ..Default::default()
                },
                "hostNetwork",
            ),
            (
                cri::NamespaceOption {
                    pid: node,
                    ..Default::default()
                },
                "hostPID",
            ),
            (
                cri::NamespaceOption {
                    ipc: node,
                    ..Default::default()
                },
                "hostIPC",
            ),
        ] {
            let error = check_pod(&pod(options), "use `host`").unwrap_err();
            assert!(error.message.contains(name), "{error}");
            assert!(error.message.contains("`host`"), "{error}");
        }
        check_pod(&cri::PodSandboxConfig::default(), "").unwrap();
    }

    fn pid_of(mode: NamespaceMode, shared: bool, target: Option<i32>) -> Result<Value, CriError> {
        let security = cri::LinuxContainerSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                pid: mode as i32,
                ..Default::default()
            }),
            ..Default::default()
        };
        let all = namespaces(&security, shared, target, None, None)?;
        Ok(all.into_iter().find(|n| n["type"] == "pid").unwrap())
    }

    #[test]
    fn pid_namespaces() {
        assert_eq!(
            pid_of(NamespaceMode::Pod, true, None).unwrap()["path"],
            SHARED_PID
        );
        assert!(pid_of(NamespaceMode::Pod, false, None).is_err());
        assert!(
            pid_of(NamespaceMode::Container, true, None)
                .unwrap()
                .get("path")
                .is_none()
        );
        assert_eq!(
            pid_of(NamespaceMode::Target, false, Some(42)).unwrap()["path"],
            "/proc/42/ns/pid"
        );
        assert!(pid_of(NamespaceMode::Target, false, None).is_err());
        let error = pid_of(NamespaceMode::Node, true, None).unwrap_err();
        assert!(error.message.contains("`host`"));
    }

    #[test]
    fn namespaces_of_the_node_go_with_a_pod_that_has_them() {
        let of = |container: NamespaceMode, pod: NamespaceMode| {
            let option = |mode: NamespaceMode| cri::NamespaceOption {
                network: mode as i32,
                pid: mode as i32,
                ipc: mode as i32,
                ..Default::default()
            };
            let security = cri::LinuxContainerSecurityContext {
                namespace_options: Some(option(container)),
                ..Default::default()
            };
            let host = HostPod {
                namespaces: option(pod),
                ..Default::default()
            };
            namespaces(
                &security,
                pod == NamespaceMode::Pod,
                None,
                Some(&host),
                None,
            )
        };
        let node = of(NamespaceMode::Node, NamespaceMode::Node).unwrap();
        let pods = of(NamespaceMode::Pod, NamespaceMode::Node).unwrap();
        assert_eq!(pods, node, "what the pod has is the node's");
        assert_eq!(node.len(), 2, "a mount and a cgroup namespace: {node:?}");
        let error = of(NamespaceMode::Node, NamespaceMode::Pod).unwrap_err();
        assert!(error.message.contains("network"), "{error}");
    }

    #[test]
    fn devices_of_the_host_are_refused_by_name() {
        let mut config = config();
        config.devices = vec![cri::Device {
            container_path: "/dev/nvme0".into(),
            host_path: "/dev/nvme0n1".into(),
            permissions: "rw".into(),
        }];
        let error = built(&config).unwrap_err();
        assert!(error.message.contains("/dev/nvme0n1"), "{error}");
    }

    #[test]
    fn profiles() {
        let of = |kind: ProfileType| cri::LinuxContainerSecurityContext {
            seccomp: Some(cri::SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: "/x.json".into(),
            }),
            ..Default::default()
        };
        let choice = |kind, file| seccomp_choice(&of(kind), file);
        assert_eq!(
            choice(ProfileType::RuntimeDefault, None).unwrap(),
            Some(Seccomp::Default)
        );
        assert_eq!(choice(ProfileType::Unconfined, None).unwrap(), None);
        assert!(choice(ProfileType::Localhost, None).is_err());
        let given = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
        assert_eq!(
            choice(ProfileType::Localhost, Some(&given)).unwrap(),
            Some(Seccomp::Given(given))
        );
        let plain = cri::LinuxContainerSecurityContext::default();
        assert_eq!(seccomp_choice(&plain, None).unwrap(), None);
        let error = built(&with_security(cri::LinuxContainerSecurityContext {
            apparmor: Some(cri::SecurityProfile {
                profile_type: ProfileType::Localhost as i32,
                localhost_ref: "p".into(),
            }),
            ..Default::default()
        }))
        .unwrap_err();
        assert!(error.message.contains("AppArmor"), "{error}");
    }
}
