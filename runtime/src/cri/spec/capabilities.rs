//! Capabilities of a container's process.

use caisson_proto::{CAPABILITIES, cri};
use serde_json::{Value, json};

use super::super::CriError;

/// What a container has that asks for nothing: the set that container runtimes have in common.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SYS_CHROOT",
    "MKNOD",
    "AUDIT_WRITE",
    "SETFCAP",
];

/// A capability by its name with or without CAP_, in either case.
fn parse(name: &str) -> Result<&'static str, CriError> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES
        .iter()
        .find(|known| **known == bare)
        .copied()
        .ok_or_else(|| {
            CriError::invalid(format!(
                "the capability {name} is not known; use a name such as NET_ADMIN, or ALL"
            ))
        })
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

/// The bounding set without prefixes, in the kernel's order.
///
/// # Errors
/// INVALID_ARGUMENT for a name that is not a capability.
pub fn bounding(
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Vec<&'static str>, CriError> {
    if security.privileged {
        return Ok(CAPABILITIES.to_vec());
    }
    let asked = security.capabilities.clone().unwrap_or_default();
    let mut set: Vec<&'static str> = DEFAULT.to_vec();
    if asked.add_capabilities.iter().any(|name| is_all(name)) {
        set = CAPABILITIES.to_vec();
    }
    if asked.drop_capabilities.iter().any(|name| is_all(name)) {
        set.clear();
    }
    // Dropping ALL and adding some leaves those; naming one in both lists drops it.
    for name in asked
        .add_capabilities
        .iter()
        .chain(&asked.add_ambient_capabilities)
        .filter(|name| !is_all(name))
    {
        let capability = parse(name)?;
        if !set.contains(&capability) {
            set.push(capability);
        }
    }
    for name in asked.drop_capabilities.iter().filter(|name| !is_all(name)) {
        let capability = parse(name)?;
        set.retain(|c| *c != capability);
    }
    Ok(CAPABILITIES
        .iter()
        .filter(|c| set.contains(c))
        .copied()
        .collect())
}

/// `process.capabilities`. The inheritable set is empty, but for ambient ones, so that a file's inheritable
/// capabilities give an unprivileged process nothing.
///
/// # Errors
/// See [`bounding`].
pub fn capabilities(security: &cri::LinuxContainerSecurityContext) -> Result<Value, CriError> {
    let set = prefixed(&bounding(security)?);
    let asked = security.capabilities.clone().unwrap_or_default();
    let mut ambient = Vec::new();
    for name in &asked.add_ambient_capabilities {
        if is_all(name) {
            ambient.clone_from(&set);
        } else {
            let capability = format!("CAP_{}", parse(name)?);
            if set.contains(&capability) && !ambient.contains(&capability) {
                ambient.push(capability);
            }
        }
    }
    Ok(json!({
        "bounding": set,
        "effective": set,
        "permitted": set,
        "inheritable": ambient,
        "ambient": ambient,
    }))
}

fn prefixed(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("CAP_{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(add: &[&str], drop: &[&str]) -> Result<Vec<&'static str>, CriError> {
        let list = |names: &[&str]| names.iter().map(|s| (*s).to_owned()).collect();
        bounding(&cri::LinuxContainerSecurityContext {
            capabilities: Some(cri::Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                add_ambient_capabilities: Vec::new(),
            }),
            ..Default::default()
        })
    }

    #[test]
    fn additions_and_drops() {
        assert_eq!(with(&[], &[]).unwrap().len(), DEFAULT.len());
        assert!(with(&["net_admin"], &[]).unwrap().contains(&"NET_ADMIN"));
        assert!(
            with(&["CAP_NET_ADMIN"], &[])
                .unwrap()
                .contains(&"NET_ADMIN")
        );
        assert!(!with(&[], &["NET_RAW"]).unwrap().contains(&"NET_RAW"));
        assert_eq!(with(&["CHOWN"], &["ALL"]).unwrap(), ["CHOWN"]);
        assert_eq!(with(&["ALL"], &[]).unwrap().len(), CAPABILITIES.len());
        assert_eq!(
            with(&["ALL"], &["SYS_ADMIN"]).unwrap().len(),
            CAPABILITIES.len() - 1
        );
        assert!(with(&["FLY"], &[]).unwrap_err().message.contains("FLY"));
    }
}
