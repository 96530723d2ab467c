//! The commented default file, made from the defaults themselves.

use std::fmt::Write as _;

use super::Config;

/// Table, key and what the key means, in the file's order.
const KEYS: &[(&str, &str, &str)] = &[
    (
        "",
        "root",
        "Durable state: images, records, the pods' writable layers.",
    ),
    (
        "",
        "state",
        "Run-time state: sockets and mounts; on a tmpfs.",
    ),
    (
        "",
        "socket",
        "The unix socket of CRI and of the `caisson` command (root only).",
    ),
    (
        "",
        "log_level",
        "What is logged: error, warn, info, debug, trace, or a filter such as \"info,caisson::image=debug\".",
    ),
    (
        "",
        "cgroup_parent",
        "The cgroup under which pods are accounted for when the client names none.",
    ),
    (
        "",
        "allow_host",
        "Whether pods may have handlers of kind \"host\": no VM, for node agents with hostNetwork and the like.",
    ),
    (
        "",
        "default_handler",
        "The handler of a pod that asks for none; one of the names in [handlers].",
    ),
    (
        "handlers",
        "microvm",
        "Runtime handler names (RuntimeClass) and their kind: \"microvm\" or \"host\".",
    ),
    (
        "handlers",
        "host",
        "A handler of kind \"host\"; of use only with allow_host.",
    ),
    (
        "host",
        "agent",
        "The caisson-agent program for pods on the host. Empty: beside the caisson executable, then in /usr/lib/caisson.",
    ),
    (
        "host",
        "scratch_gib",
        "The most GiB that a pod's writable layers may hold on the host's disk.",
    ),
    (
        "microvm",
        "vmm",
        "The caisson-vmm program. Empty: beside the caisson executable, then in /usr/lib/caisson.",
    ),
    (
        "microvm",
        "kernel",
        "The guest kernel (vmlinux or bzImage). Empty: searched as above.",
    ),
    (
        "microvm",
        "initramfs",
        "The guest's initramfs (initramfs.cpio). Empty: searched as above.",
    ),
    (
        "microvm",
        "vcpus",
        "Virtual CPUs of a pod without a CPU limit, 1 to 32.",
    ),
    (
        "microvm",
        "memory_mib",
        "Memory in MiB of a pod without a memory limit, guest kernel included.",
    ),
    (
        "microvm",
        "overhead_mib",
        "MiB added to a pod's memory limit for the guest kernel and the agent.",
    ),
    (
        "microvm",
        "scratch",
        "Where a pod's writable layers go: \"disk\", a sparse file on the host, or \"memory\", at most half of the guest's. A pod's annotation caisson.dev/scratch overrides it.",
    ),
    (
        "microvm",
        "scratch_gib",
        "The most GiB that a pod's writable layers may hold. A pod's annotation caisson.dev/ephemeral-storage can ask for less.",
    ),
    (
        "microvm",
        "first_user",
        "The first host user ID of pod processes, and the first group ID: each pod has one of its own. Nobody else may have IDs of this range.",
    ),
    (
        "microvm",
        "users",
        "How many user IDs, from first_user on, are for pod processes: the most pods.",
    ),
    (
        "microvm",
        "disk_bytes_per_second",
        "Bytes that each disk of a pod reads and writes in a second at most; 0: no limit.",
    ),
    (
        "microvm",
        "disk_operations_per_second",
        "Requests that each disk of a pod serves in a second at most; 0: no limit.",
    ),
    (
        "microvm",
        "net_bytes_per_second",
        "Bytes that a pod sends in a second at most, and as many that it receives; 0: no limit. What is more waits, or is dropped by the tap.",
    ),
    (
        "microvm",
        "net_packets_per_second",
        "Frames (of up to 64 KiB) that a pod sends in a second at most, and as many that it receives; 0: no limit.",
    ),
    (
        "microvm",
        "vhost_net",
        "Who carries a pod's frames: \"off\": the pod's own process; \"on\": the node's kernel (vhost-net), which a hostile guest then reaches with its rings; \"auto\": the kernel where it has vhost-net and the pod has no limits, else the process.",
    ),
    (
        "microvm",
        "kernel_cmdline_extra",
        "Words added to the guest's kernel command line.",
    ),
    (
        "microvm",
        "start_timeout_seconds",
        "Seconds that a guest may take from power-on until its agent answers, 1 to 3600.",
    ),
    (
        "microvm",
        "templates",
        "Whether pods are clones of machines that were booted once: of their own size, or small ones that grow. They share what their kernels have in memory until they change it.",
    ),
    (
        "microvm",
        "ready_clones",
        "How many clones of the usual size are started before their pods are known, which then need not wait for that; 0: none. Each holds some 15 MiB. Of use only with templates.",
    ),
    (
        "cni",
        "conf_dir",
        "CNI network configurations; the first file by name counts.",
    ),
    (
        "cni",
        "bin_dirs",
        "Where CNI plugins are looked for, in order.",
    ),
    (
        "cni",
        "timeout_seconds",
        "Seconds that one call of a CNI plugin may take before it is killed, 1 to 600.",
    ),
    (
        "images",
        "certs_dir",
        "How registries are reached: HOST/hosts.toml (or _default/hosts.toml) in containerd's format, with mirrors and certificates.",
    ),
    (
        "images",
        "max_unpacked_gib",
        "The most GiB that one image may have when it is unpacked.",
    ),
    (
        "images",
        "parallel_layers",
        "Layers that are fetched and unpacked at once, by all pulls together, 1 to 64.",
    ),
    (
        "images",
        "progress_timeout_seconds",
        "Seconds after which a pull that brings nothing is given up.",
    ),
    (
        "images",
        "foreign_layers",
        "Whether layers that registries do not distribute are fetched from the addresses in their manifest.",
    ),
    (
        "images",
        "verity",
        "Whether layers get fs-verity, so that one that is changed on the disk is noticed. The file system must have it.",
    ),
    (
        "images",
        "pinned",
        "Names of images that garbage collection and `caisson prune` leave alone: [\"registry.example/app:v1\"].",
    ),
    (
        "images",
        "policy",
        "Registries whose images must be signed: [{ registry = \"registry.example/team\", cosign_key = \"/etc/caisson/team.pub\" }].",
    ),
    (
        "streaming",
        "address",
        "Where exec, attach and port-forward are served (host:port); port 0 takes a free one. The URLs name it.",
    ),
    (
        "streaming",
        "idle_timeout_seconds",
        "Seconds without a byte either way after which a client is cut off, 1 to 2592000.",
    ),
    (
        "telemetry",
        "endpoint",
        "An OpenTelemetry collector that takes OTLP over gRPC, such as \"http://127.0.0.1:4317\": each pod's start is a trace. Empty: none.",
    ),
];

/// The default configuration as a commented TOML file.
pub fn default_file() -> String {
    let mut text = String::from(
        "# The configuration of Caisson, with every key at its default. A file needs only the keys it changes.\n",
    );
    let Ok(values) = toml::Table::try_from(Config::default()) else {
        return text; // the defaults are plain data, which always serializes: see the test
    };
    let mut table = "";
    for (section, key, comment) in KEYS {
        if *section != table {
            table = section;
            let _ = write!(text, "\n[{section}]");
        }
        let place = if section.is_empty() {
            Some(&values)
        } else {
            values.get(*section).and_then(toml::Value::as_table)
        };
        if let Some(value) = place.and_then(|place| place.get(*key)) {
            let _ = write!(text, "\n# {comment}\n{key} = {value}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_default_file_is_the_defaults() {
        let text = default_file();
        let parsed = Config::parse(&text, Path::new("default")).unwrap();
        assert_eq!(parsed, Config::default(), "{text}");
    }

    #[test]
    fn every_key_is_documented() {
        let values = toml::Table::try_from(Config::default()).unwrap();
        let mut keys = Vec::new();
        for (name, value) in &values {
            match value {
                toml::Value::Table(table) => {
                    keys.extend(table.keys().map(|key| (name.clone(), key.clone())));
                }
                _ => keys.push((String::new(), name.clone())),
            }
        }
        for (section, key) in &keys {
            assert!(
                KEYS.iter().any(|(s, k, _)| s == section && k == key),
                "{section}.{key} has no comment"
            );
        }
        assert_eq!(keys.len(), KEYS.len());
    }
}
