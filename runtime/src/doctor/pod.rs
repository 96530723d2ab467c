//! `caisson doctor --pod`: whether a pod's process is confined as it should be.

use std::process::ExitCode;

use super::Finding;
use crate::sandbox::pod::confinement::{Confinement, NAMESPACES, Thread};

/// What the file server needs for its clients' files, as a mask: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID,
/// MKNOD and SETFCAP (capability.h).
const FILE_SERVER: u64 = 0x8800_00db;
/// `SECCOMP_MODE_FILTER`.
const FILTER: u8 = 2;
/// Limits, and the most that they may be.
const LIMITS: [(&str, u64); 5] = [
    ("Max core file size", 0),
    ("Max locked memory", 0),
    ("Max msgqueue size", 0),
    ("Max open files", 1 << 20),
    ("Max processes", 1024),
];
/// Limits of the cgroup that must be there.
const GROUP_LIMITS: [&str; 2] = ["memory.max", "pids.max"];

/// Prints a line for each part of the jail. Successful if all of them are there.
pub fn doctor(confinement: &Confinement) -> ExitCode {
    let findings = judge(confinement);
    for finding in &findings {
        println!("{finding}");
    }
    match findings.iter().all(|finding| finding.good) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// What is to be said of each part of the jail.
pub fn judge(found: &Confinement) -> Vec<Finding> {
    let of = |what, good, detail: String| Finding { what, good, detail };
    let threads = |fails: &dyn Fn(&Thread) -> bool| -> Vec<&str> {
        let failing = found.threads.iter().filter(|thread| fails(thread));
        failing.map(|thread| thread.name.as_str()).collect()
    };
    let all = |what, detail: String, fails: &dyn Fn(&Thread) -> bool| {
        let failing = threads(fails);
        match failing.is_empty() && !found.threads.is_empty() {
            true => of(what, true, detail),
            false => of(what, false, format!("not so: {}", failing.join(", "))),
        }
    };
    let first = found.threads.first().cloned().unwrap_or_default();
    let user = first.users[0];
    // The file server's thread becomes its clients' users for moments, in its real user never.
    let foreign = |thread: &Thread| thread.users[0] != user || thread.groups[0] == 0;
    let missing: Vec<_> = NAMESPACES
        .into_iter()
        .filter(|name| found.own_namespaces.get(*name) != Some(&true))
        .collect();
    let filters = found.threads.iter().map(|thread| thread.seccomp_filters);
    vec![
        match user {
            0 => of("user", false, "it runs as root".into()),
            _ => all("user", format!("{user}, in every thread"), &foreign),
        },
        of(
            "root",
            found.own_root,
            match found.own_root {
                true => "its own".into(),
                false => "the host's".into(),
            },
        ),
        of(
            "namespaces",
            missing.is_empty(),
            match missing.is_empty() {
                true => format!("its own: {}", NAMESPACES.join(", ")),
                false => format!("the host's: {}", missing.join(", ")),
            },
        ),
        all(
            "capabilities",
            format!("{:#x}, in its own user namespace", first.capabilities),
            &|thread| thread.capabilities & !FILE_SERVER != 0,
        ),
        all("no_new_privs", "in every thread".into(), &|thread| {
            !thread.no_new_privs
        }),
        all(
            "seccomp",
            format!(
                "{} threads, each with {} filters or more",
                found.threads.len(),
                filters.min().unwrap_or_default()
            ),
            &|thread| thread.seccomp != FILTER,
        ),
        landlock(found.landlock, kernel_has_landlock()),
        of(
            "frames",
            true,
            match found.vhost_net {
                true => "carried by the node's kernel (vhost-net)".into(),
                false => "carried by the process".into(),
            },
        ),
        limits(found),
        cgroup(found),
    ]
}

/// Whether this node's kernel has Landlock; `None` if it does not say.
fn kernel_has_landlock() -> Option<bool> {
    let modules = std::fs::read_to_string("/sys/kernel/security/lsm").ok()?;
    Some(modules.trim().split(',').any(|one| one == "landlock"))
}

fn landlock(version: Option<u32>, kernel: Option<bool>) -> Finding {
    let (good, detail) = match (version, kernel) {
        (None, _) => (false, "the pod process does not say".into()),
        (Some(0), Some(true)) => (
            false,
            "not in force, and this kernel has it; version 2 or newer is needed".into(),
        ),
        (Some(0), _) => (true, "not in this kernel".into()),
        (Some(version), _) => (true, format!("version {version}, by the process's word")),
    };
    Finding {
        what: "landlock",
        good,
        detail,
    }
}

fn limits(found: &Confinement) -> Finding {
    let over = |(name, most): &(&str, u64)| {
        let limit = found.limits.get(*name).and_then(|l| l.parse::<u64>().ok());
        limit.is_none_or(|limit| limit > *most)
    };
    let good = !LIMITS.iter().any(over);
    let all: Vec<_> = found
        .limits
        .iter()
        .map(|(name, limit)| format!("{}: {limit}", name.trim_start_matches("Max ")))
        .collect();
    Finding {
        what: "rlimits",
        good,
        detail: all.join(", "),
    }
}

fn cgroup(found: &Confinement) -> Finding {
    let limited = |name: &&str| found.cgroup_limits.get(*name).is_some_and(|l| l != "max");
    let all: Vec<_> = found
        .cgroup_limits
        .iter()
        .map(|(name, limit)| format!("{name}: {limit}"))
        .collect();
    Finding {
        what: "cgroup",
        good: GROUP_LIMITS.iter().all(limited),
        detail: format!("{} ({})", found.cgroup.display(), all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confined() -> Confinement {
        let thread = |name: &str| Thread {
            name: name.into(),
            users: [70_000; 3],
            groups: [70_000; 3],
            capabilities: FILE_SERVER,
            no_new_privs: true,
            seccomp: FILTER,
            seccomp_filters: 2,
        };
        Confinement {
            pid: 7,
            own_root: true,
            own_namespaces: NAMESPACES.map(|name| (name.to_owned(), true)).into(),
            threads: vec![thread("caisson-vmm"), thread("vcpu0")],
            landlock: Some(2),
            vhost_net: false,
            limits: LIMITS
                .map(|(name, most)| (name.to_owned(), most.to_string()))
                .into(),
            cgroup: "/sys/fs/cgroup/x".into(),
            cgroup_limits: GROUP_LIMITS
                .map(|name| (name.to_owned(), "1000".to_owned()))
                .into(),
        }
    }

    fn bad(change: impl FnOnce(&mut Confinement)) -> Vec<&'static str> {
        let mut confinement = confined();
        change(&mut confinement);
        let findings = judge(&confinement).into_iter();
        findings.filter(|f| !f.good).map(|f| f.what).collect()
    }

    #[test]
    fn each_hole_in_the_jail_is_found() {
        assert_eq!(bad(|_| {}), [""; 0]);
        assert_eq!(bad(|c| c.threads[1].users[0] = 0), ["user"]);
        assert_eq!(bad(|c| c.own_root = false), ["root"]);
        assert_eq!(bad(|c| c.own_namespaces.clear()), ["namespaces"]);
        assert_eq!(
            bad(|c| c.threads[1].capabilities |= 1 << 21),
            ["capabilities"]
        );
        assert_eq!(bad(|c| c.threads[0].no_new_privs = false), ["no_new_privs"]);
        assert_eq!(bad(|c| c.threads[1].seccomp = 0), ["seccomp"]);
        assert_eq!(bad(|c| c.landlock = None), ["landlock"]);
        assert_eq!(bad(|c| drop(c.limits.remove("Max processes"))), ["rlimits"]);
        let unlimited = |c: &mut Confinement| {
            c.cgroup_limits.insert("memory.max".into(), "max".into());
        };
        assert_eq!(bad(unlimited), ["cgroup"]);
    }
}
