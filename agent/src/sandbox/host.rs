//! Makes a pod of what [`crate::host`] has entered. Nothing of the host's own is changed: what cannot be set for the
//! pod alone is refused.

use std::collections::BTreeSet;

use super::plan::{Plan, Scratch};
use super::{
    SandboxError, create_dir, dns, in_pod, namespaces, set_hostname, share, storage, sysctl,
};
use crate::engine;
use crate::host::Own;
use crate::paths;

/// Sets the sandbox up; see [`super::set_up`]. The interfaces are there already, and only named in the hosts file.
pub fn set_up(plan: &Plan, own: &Own) -> Result<(), SandboxError> {
    check(plan, own)?;
    if let Some(ids) = &plan.user_ids {
        namespaces::create(ids)?;
    }
    in_pod(|| {
        sysctl::apply(&plan.sysctls)?;
        if own.uts { set_hostname(plan) } else { Ok(()) }
    })?;
    create_dir(paths::SANDBOX)?;
    storage::mount_shm()?;
    dns::write(plan, own.hosts.as_deref().unwrap_or(dns::HOSTS))?;
    share(plan)
}

fn check(plan: &Plan, own: &Own) -> Result<(), SandboxError> {
    let not_here = |field, what: &str| {
        SandboxError::invalid(field, format!("{what}, and this pod runs on the host"))
    };
    if !plan.entropy.is_empty() {
        return Err(not_here("entropy", "is for a kernel of the pod's own"));
    }
    if plan.unix_time_ns.is_some() {
        return Err(not_here("unix_time_ns", "is for a kernel of the pod's own"));
    }
    if !plan.shared_mounts.is_empty() {
        return Err(not_here("shared_mounts", "are devices of a machine"));
    }
    if !matches!(plan.scratch, Scratch::Tmpfs(0)) {
        return Err(not_here("scratch", "is a disk of a machine"));
    }
    if plan.user_ids.is_some() && !(own.network && own.ipc && own.uts) {
        return Err(SandboxError::invalid(
            "user_namespace",
            "is for a pod that shares no namespace with the host",
        ));
    }
    let mut namespaces = BTreeSet::new();
    if own.network {
        namespaces.insert(engine::spec::NamespaceKind::Network);
    }
    if own.ipc {
        namespaces.insert(engine::spec::NamespaceKind::Ipc);
    }
    for (path, value) in &plan.sysctls {
        let name = path.to_string_lossy();
        engine::check_sysctl(&name, value, &namespaces).map_err(|reason| {
            SandboxError::invalid("sysctls", format!("{name} {reason}, so it is the host's"))
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::plan::UserIds;

    #[test]
    fn what_is_the_hosts_is_refused() {
        let own = |network, ipc| Own {
            network,
            ipc,
            uts: true,
            hosts: None,
        };
        let with = |name: &str| Plan {
            sysctls: vec![(name.into(), "1".into())],
            ..Plan::default()
        };
        check(&with("net/ipv4/ip_forward"), &own(true, false)).unwrap();
        check(&with("kernel/shmmax"), &own(false, true)).unwrap();
        for (name, own) in [
            ("net/ipv4/ip_forward", own(false, true)),
            ("kernel/shmmax", own(true, false)),
            ("vm/swappiness", own(true, true)),
            ("kernel/panic", own(true, true)),
        ] {
            let error = check(&with(name), &own).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        let clock = Plan {
            unix_time_ns: Some(1),
            ..Plan::default()
        };
        assert!(check(&clock, &own(true, true)).is_err());
        let mapped = Plan {
            user_ids: Some(UserIds::default()),
            ..Plan::default()
        };
        check(&mapped, &own(true, true)).unwrap();
        assert!(check(&mapped, &own(false, true)).is_err());
    }
}
