//! One input of the fuzz target `oci_spec` (see `tests/fuzz`): a spec, or a part that comes alone, and what is computed
//! of it before a container is made.

use super::cgroup::{devices, settings};
use super::init::capabilities::Sets;
use super::init::mount_options::Options;
use super::seccomp;
use super::spec::{LinuxResources, Process, Spec};

/// Whatever is taken is handed to the container's first process as JSON, and must be the same there.
fn again<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) {
    let told = serde_json::to_value(value).expect("JSON");
    let heard: T = serde_json::from_value(told.clone()).expect("JSON of ours");
    assert_eq!(told, serde_json::to_value(&heard).expect("JSON"));
}

fn resources(resources: &LinuxResources) {
    again(resources);
    for setting in settings::plan(resources).unwrap_or_default() {
        assert!(!setting.file.contains('/'), "{setting:?}");
        assert!(!setting.value.contains('\0'), "{setting:?}");
    }
    if let Ok(rules) = devices::Rule::resolve(&resources.devices) {
        // Exits, at least.
        assert!(devices::program(&rules).len() >= 2);
    }
}

fn process(process: &Process) {
    again(process);
    if let Some(capabilities) = &process.capabilities {
        let _ = Sets::resolve(capabilities);
    }
}

/// What the kernel asks of a filter: no more than 4096 instructions, and no way out of them but a return.
fn sound(instructions: &[u64]) {
    const JUMPS: u64 = 5;
    const RETURNS: u64 = 6;
    let count = instructions.len();
    assert!((1..=4096).contains(&count));
    for (at, instruction) in instructions.iter().enumerate() {
        let (code, k) = (instruction >> 48, instruction & 0xffff_ffff);
        let (jump_true, jump_false) = (instruction >> 40 & 0xff, instruction >> 32 & 0xff);
        let farthest = match code & 7 {
            RETURNS => continue,
            JUMPS if code == JUMPS => k,
            JUMPS => jump_true.max(jump_false),
            _ => 0,
        };
        assert!(
            (at as u64) + 1 + farthest < count as u64,
            "a jump out of it"
        );
    }
}

fn spec(spec: &Spec) {
    again(spec);
    for mount in &spec.mounts {
        let _ = Options::parse(&mount.options);
    }
    if let Some(one) = &spec.process {
        process(one);
    }
    let Some(linux) = &spec.linux else { return };
    if let Some(one) = &linux.resources {
        resources(one);
    }
    if let Some(profile) = &linux.seccomp
        && let Ok(filter) = seccomp::compile(profile)
    {
        sound(&filter.instructions);
    }
}

/// A `config.json`, a `process` or `linux.resources`.
pub fn oci_spec(data: &[u8]) {
    let Some((kind, json)) = data.split_first() else {
        return;
    };
    let refused = match kind % 3 {
        0 => Spec::parse(json).map(|parsed| spec(&parsed)),
        1 => Process::parse(json).map(|parsed| process(&parsed)),
        _ => LinuxResources::parse(json).map(|parsed| resources(&parsed)),
    };
    if let Err(error) = refused {
        assert!(!error.to_string().is_empty());
    }
}

#[cfg(test)]
mod tests {
    include!("../../../tests/fuzz/seed_tests.rs");

    seeds!(oci_spec);
}
