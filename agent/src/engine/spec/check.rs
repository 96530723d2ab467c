//! What the types cannot say: fields that are not supported, and values that cannot be.

use std::collections::BTreeSet;

use serde::de::{Deserialize, Deserializer};
use serde::{Serialize, Serializer};

use super::{LinuxResources, NamespaceKind, Process, Spec, SpecError};
use crate::engine::{cgroup, init, seccomp};

/// Most of anything that is counted: mounts, devices, rules of one kind.
const MAX_ITEMS: usize = 4096;

/// A field that is known and not supported: remembers whether it was set to something.
///
/// `null`, `false`, 0 and empty strings, lists and objects count as not set, because encoders write them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unsupported {
    /// Whether a value was given.
    pub set: bool,
}

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde_json::Value;
        let set = match Value::deserialize(deserializer)? {
            Value::Null | Value::Bool(false) => false,
            Value::Bool(true) => true,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(string) => !string.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(object) => !object.is_empty(),
        };
        Ok(Self { set })
    }
}

impl Serialize for Unsupported {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bool(self.set)
    }
}

fn refuse(fields: &[(Unsupported, &str)]) -> Result<(), SpecError> {
    match fields.iter().find(|(field, _)| field.set) {
        Some((_, name)) => Err(SpecError::unsupported(*name)),
        None => Ok(()),
    }
}

fn bounded<T>(items: &[T], field: &str) -> Result<(), SpecError> {
    if items.len() > MAX_ITEMS {
        return Err(SpecError::invalid(
            field,
            format!("{} entries, the limit is {MAX_ITEMS}", items.len()),
        ));
    }
    Ok(())
}

/// An absolute path without NUL bytes.
fn absolute(path: &str, field: &str) -> Result<(), SpecError> {
    if !path.starts_with('/') || path.len() >= 4096 || path.contains('\0') {
        return Err(SpecError::invalid(
            field,
            format!("{path:?} is not an absolute path of fewer than 4096 bytes"),
        ));
    }
    Ok(())
}

fn no_nul(value: &str, field: impl Fn() -> String) -> Result<(), SpecError> {
    if value.contains('\0') {
        return Err(SpecError::invalid(field(), "contains a NUL byte"));
    }
    Ok(())
}

/// Checks a whole spec.
pub(super) fn spec(spec: &Spec) -> Result<(), SpecError> {
    if spec.oci_version != "1" && !spec.oci_version.starts_with("1.") {
        return Err(SpecError::invalid(
            "ociVersion",
            format!("{:?} is not a version 1.x", spec.oci_version),
        ));
    }
    refuse(&[
        (spec.solaris, "solaris"),
        (spec.windows, "windows"),
        (spec.vm, "vm"),
        (spec.zos, "zos"),
    ])?;
    match &spec.process {
        Some(one) => process(one)?,
        None => return Err(SpecError::invalid("process", "is missing")),
    }
    match &spec.root {
        Some(root) if root.path == "rootfs" => {}
        Some(root) => {
            return Err(SpecError::invalid(
                "root.path",
                format!("{:?} is not \"rootfs\"", root.path),
            ));
        }
        None => return Err(SpecError::invalid("root", "is missing")),
    }
    for (value, field) in [
        (&spec.hostname, "hostname"),
        (&spec.domainname, "domainname"),
    ] {
        if value.len() > 64 || value.contains('\0') {
            return Err(SpecError::invalid(field, "is longer than 64 bytes"));
        }
    }
    bounded(&spec.mounts, "mounts")?;
    for (index, mount) in spec.mounts.iter().enumerate() {
        let field = |name: &str| format!("mounts[{index}].{name}");
        absolute(&mount.destination, &field("destination"))?;
        no_nul(&mount.source, || field("source"))?;
        no_nul(&mount.kind, || field("type"))?;
        let options = init::mount_options::Options::parse(&mount.options)
            .map_err(|reason| SpecError::invalid(field("options"), reason))?;
        if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
            continue;
        }
        let bind = (options.bind || mount.kind == "bind") && !options.remount;
        let of_container = spec.linux.as_ref().is_some_and(|linux| {
            linux.uid_mappings == mount.uid_mappings && linux.gid_mappings == mount.gid_mappings
        });
        if !bind || !of_container {
            return Err(SpecError::invalid(
                field("uidMappings"),
                "are not those of the container's user namespace, on a bind mount",
            ));
        }
    }
    if let Some(hooks) = &spec.hooks {
        for (list, name) in [
            (&hooks.prestart, "prestart"),
            (&hooks.create_runtime, "createRuntime"),
            (&hooks.create_container, "createContainer"),
            (&hooks.start_container, "startContainer"),
            (&hooks.poststart, "poststart"),
            (&hooks.poststop, "poststop"),
        ] {
            bounded(list, name)?;
            for (index, hook) in list.iter().enumerate() {
                absolute(&hook.path, &format!("hooks.{name}[{index}].path"))?;
                for text in hook.args.iter().chain(&hook.env) {
                    no_nul(text, || format!("hooks.{name}[{index}]"))?;
                }
            }
        }
    }
    linux(spec)
}

fn linux(spec: &Spec) -> Result<(), SpecError> {
    let Some(linux) = &spec.linux else {
        return Err(SpecError::invalid("linux", "is missing"));
    };
    refuse(&[
        (linux.net_devices, "linux.netDevices"),
        (linux.mount_label, "linux.mountLabel"),
        (linux.intel_rdt, "linux.intelRdt"),
        (linux.memory_policy, "linux.memoryPolicy"),
    ])?;
    let mut kinds = BTreeSet::new();
    for (index, namespace) in linux.namespaces.iter().enumerate() {
        if !kinds.insert(namespace.kind) {
            return Err(SpecError::invalid(
                format!("linux.namespaces[{index}].type"),
                "the same kind of namespace appears twice",
            ));
        }
        let field = format!("linux.namespaces[{index}].path");
        if !namespace.path.is_empty() {
            absolute(&namespace.path, &field)?;
            if namespace.kind == NamespaceKind::Mount {
                return Err(SpecError::invalid(
                    field,
                    "joining a mount namespace is not supported: the container's root file system is made in a new one",
                ));
            }
        }
    }
    if !kinds.contains(&NamespaceKind::Mount) {
        return Err(SpecError::invalid(
            "linux.namespaces",
            "a container without a mount namespace of its own is not supported",
        ));
    }
    let new = |kind| {
        linux
            .namespaces
            .iter()
            .any(|namespace| namespace.kind == kind && namespace.path.is_empty())
    };
    bounded(&linux.uid_mappings, "linux.uidMappings")?;
    bounded(&linux.gid_mappings, "linux.gidMappings")?;
    let mapped = [&linux.uid_mappings, &linux.gid_mappings].map(|list| !list.is_empty());
    if new(NamespaceKind::User) && mapped != [true, true] {
        return Err(SpecError::invalid(
            "linux.uidMappings",
            "a new user namespace needs linux.uidMappings and linux.gidMappings",
        ));
    }
    if !kinds.contains(&NamespaceKind::User) && mapped != [false, false] {
        return Err(SpecError::invalid(
            "linux.uidMappings",
            "mappings need a user namespace",
        ));
    }
    if !linux.time_offsets.is_empty() && !new(NamespaceKind::Time) {
        return Err(SpecError::invalid(
            "linux.timeOffsets",
            "offsets need a new time namespace",
        ));
    }
    for (clock, offset) in &linux.time_offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(SpecError::invalid(
                format!("linux.timeOffsets.{clock}"),
                "is not one of monotonic and boottime",
            ));
        }
        if offset.nanosecs >= 1_000_000_000 {
            return Err(SpecError::invalid(
                format!("linux.timeOffsets.{clock}.nanosecs"),
                "is not below 1000000000",
            ));
        }
    }
    for (value, field) in [
        (&spec.hostname, "hostname"),
        (&spec.domainname, "domainname"),
    ] {
        if !value.is_empty() && !kinds.contains(&NamespaceKind::Uts) {
            return Err(SpecError::invalid(
                field,
                "needs a UTS namespace in linux.namespaces",
            ));
        }
    }
    for (key, value) in &linux.sysctl {
        init::sysctl::check(key, value, &kinds)
            .map_err(|reason| SpecError::invalid(format!("linux.sysctl.{key}"), reason))?;
    }
    cgroup::check_path(&linux.cgroups_path)
        .map_err(|reason| SpecError::invalid("linux.cgroupsPath", reason))?;
    init::mount_options::propagation(&linux.rootfs_propagation)
        .map_err(|reason| SpecError::invalid("linux.rootfsPropagation", reason))?;
    for (list, name) in [
        (&linux.masked_paths, "linux.maskedPaths"),
        (&linux.readonly_paths, "linux.readonlyPaths"),
    ] {
        bounded(list, name)?;
        for path in list {
            absolute(path, name)?;
        }
    }
    bounded(&linux.devices, "linux.devices")?;
    for (index, device) in linux.devices.iter().enumerate() {
        let field = |name: &str| format!("linux.devices[{index}].{name}");
        absolute(&device.path, &field("path"))?;
        if !matches!(device.kind.as_str(), "c" | "u" | "b" | "p") {
            return Err(SpecError::invalid(
                field("type"),
                format!("{:?} is not one of c, u, b and p", device.kind),
            ));
        }
        if device.kind != "p" && (device.major.is_none() || device.minor.is_none()) {
            return Err(SpecError::invalid(
                field("major"),
                "a device needs its major and its minor number",
            ));
        }
    }
    if let Some(personality) = &linux.personality {
        init::process::personality(personality)
            .map_err(|reason| SpecError::invalid("linux.personality", reason))?;
    }
    if let Some(profile) = &linux.seccomp {
        refuse(&[
            (profile.listener_path, "linux.seccomp.listenerPath"),
            (profile.listener_metadata, "linux.seccomp.listenerMetadata"),
        ])?;
        seccomp::compile(profile)?;
    }
    match &linux.resources {
        Some(one) => resources(one),
        None => Ok(()),
    }
}

/// Checks a process.
pub(super) fn process(process: &Process) -> Result<(), SpecError> {
    refuse(&[
        (process.command_line, "process.commandLine"),
        (process.scheduler, "process.scheduler"),
        (process.selinux_label, "process.selinuxLabel"),
        (process.io_priority, "process.ioPriority"),
        (process.exec_cpu_affinity, "process.execCPUAffinity"),
    ])?;
    match process.args.first() {
        Some(program) if !program.is_empty() => {}
        _ => {
            return Err(SpecError::invalid(
                "process.args",
                "names no program; give the image an entry point or the container a command",
            ));
        }
    }
    for (list, name) in [
        (&process.args, "process.args"),
        (&process.env, "process.env"),
    ] {
        for (index, text) in list.iter().enumerate() {
            no_nul(text, || format!("{name}[{index}]"))?;
        }
    }
    for (index, variable) in process.env.iter().enumerate() {
        if variable.find('=').is_none_or(|at| at == 0) {
            return Err(SpecError::invalid(
                format!("process.env[{index}]"),
                "is not NAME=value",
            ));
        }
    }
    absolute(&process.cwd, "process.cwd")?;
    let profile = &process.apparmor_profile;
    if profile.len() > 1024 || profile.contains(char::is_control) {
        return Err(SpecError::invalid(
            "process.apparmorProfile",
            "is not the name of a profile",
        ));
    }
    bounded(&process.rlimits, "process.rlimits")?;
    let mut seen = BTreeSet::new();
    for (index, limit) in process.rlimits.iter().enumerate() {
        let field = format!("process.rlimits[{index}]");
        if init::process::rlimit(&limit.kind).is_none() {
            return Err(SpecError::invalid(
                format!("{field}.type"),
                format!("{:?} is not a resource limit", limit.kind),
            ));
        }
        if !seen.insert(&limit.kind) {
            return Err(SpecError::invalid(
                field,
                "the same limit appears a second time",
            ));
        }
        if limit.soft > limit.hard {
            return Err(SpecError::invalid(
                field,
                "the soft limit is above the hard one",
            ));
        }
    }
    if process
        .oom_score_adj
        .is_some_and(|value| !(-1000..=1000).contains(&value))
    {
        return Err(SpecError::invalid(
            "process.oomScoreAdj",
            "is not between -1000 and 1000",
        ));
    }
    no_nul(&process.user.username, || "process.user.username".into())?;
    if process.user.username.len() > 256 {
        return Err(SpecError::invalid(
            "process.user.username",
            "is longer than 256 bytes",
        ));
    }
    if process.user.umask.is_some_and(|mask| mask > 0o777) {
        return Err(SpecError::invalid(
            "process.user.umask",
            "is not a mode mask",
        ));
    }
    if process.user.additional_gids.len() > 65536 {
        return Err(SpecError::invalid(
            "process.user.additionalGids",
            "has more than 65536 entries",
        ));
    }
    if let Some(capabilities) = &process.capabilities {
        init::capabilities::Sets::resolve(capabilities)?;
    }
    Ok(())
}

/// Checks limits.
pub(super) fn resources(resources: &LinuxResources) -> Result<(), SpecError> {
    refuse(&[
        (resources.network, "linux.resources.network"),
        (resources.rdma, "linux.resources.rdma"),
    ])?;
    if let Some(memory) = &resources.memory {
        refuse(&[
            (memory.kernel, "linux.resources.memory.kernel"),
            (memory.kernel_tcp, "linux.resources.memory.kernelTCP"),
            (memory.swappiness, "linux.resources.memory.swappiness"),
            (
                memory.disable_oom_killer,
                "linux.resources.memory.disableOOMKiller",
            ),
        ])?;
    }
    if let Some(cpu) = &resources.cpu {
        refuse(&[
            (cpu.realtime_runtime, "linux.resources.cpu.realtimeRuntime"),
            (cpu.realtime_period, "linux.resources.cpu.realtimePeriod"),
        ])?;
    }
    if let Some(io) = &resources.block_io {
        refuse(&[(io.leaf_weight, "linux.resources.blockIO.leafWeight")])?;
        for device in &io.weight_device {
            refuse(&[(
                device.leaf_weight,
                "linux.resources.blockIO.weightDevice.leafWeight",
            )])?;
        }
    }
    bounded(&resources.devices, "linux.resources.devices")?;
    cgroup::devices::Rule::resolve(&resources.devices)?;
    cgroup::settings::plan(resources)?;
    Ok(())
}
