//! Kernel parameters of the container's own namespaces (`linux.sysctl`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Write};

use super::Step;
use crate::engine::spec::NamespaceKind;

/// Parameters of the IPC namespace.
const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Checks that a parameter belongs to a namespace that the container has, so that setting it changes nobody else.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(
    key: &str,
    value: &str,
    namespaces: &BTreeSet<NamespaceKind>,
) -> Result<(), String> {
    let plain = key.split(['.', '/']).all(|part| !part.is_empty());
    if !plain || key.contains('\0') || key.len() > 255 || value.contains('\0') {
        return Err("is not a parameter's name".to_owned());
    }
    let dotted = dotted(key);
    let needed = if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        NamespaceKind::Ipc
    } else if dotted.starts_with("net.") {
        NamespaceKind::Network
    } else if dotted == "kernel.domainname" {
        NamespaceKind::Uts
    } else if dotted == "kernel.hostname" {
        return Err("is set by the field hostname".to_owned());
    } else {
        return Err("does not belong to a namespace".to_owned());
    };
    if !namespaces.contains(&needed) {
        return Err(format!(
            "belongs to the {needed:?} namespace, which is not in linux.namespaces"
        ));
    }
    Ok(())
}

/// sysctl(8) takes both separators; whichever comes first is the separator, the other stands for a character.
fn dotted(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(at) if key.as_bytes()[at] == b'/' => key
            .chars()
            .map(|one| match one {
                '/' => '.',
                '.' => '/',
                other => other,
            })
            .collect(),
        _ => key.to_owned(),
    }
}

/// The parameter's path below `/proc/sys`.
fn path(key: &str) -> String {
    dotted(key)
        .chars()
        .map(|one| match one {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect()
}

/// Writes the parameters through the agent's `/proc`, in which the caller's own namespaces decide what is changed
/// and which no image can tamper with.
pub(super) fn apply(sysctls: &BTreeMap<String, String>) -> Result<(), Step> {
    for (key, value) in sysctls {
        let write = || -> io::Result<()> {
            OpenOptions::new()
                .write(true)
                .open(format!("/proc/sys/{}", path(key)))?
                .write_all(value.as_bytes())
        };
        write()
            .map_err(|error| Step::new(format!("set linux.sysctl.{key} to {value:?}"), error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parameters_of_own_namespaces() {
        let own = BTreeSet::from([NamespaceKind::Ipc, NamespaceKind::Network]);
        for good in [
            "net.ipv4.ip_forward",
            "net/ipv4/ip_forward",
            "kernel.shmmax",
            "fs.mqueue.msg_max",
        ] {
            check(good, "1", &own).unwrap();
            assert!(check(good, "1", &BTreeSet::new()).is_err(), "{good}");
        }
        for bad in [
            "kernel.panic",
            "vm.swappiness",
            "kernel.hostname",
            "net..x",
            "net.ipv4/../../kernel/panic",
            "net/../kernel/panic",
            "",
        ] {
            assert!(check(bad, "1", &own).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn separators() {
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/conf/eth0.1/mtu"), "net/ipv4/conf/eth0.1/mtu");
        assert_eq!(path("net.ipv4.conf.eth0/1.mtu"), "net/ipv4/conf/eth0.1/mtu");
    }
}
