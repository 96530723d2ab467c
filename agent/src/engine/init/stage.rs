//! The first stage: namespaces that exist are joined, the container's process is made in new ones.

use std::fs::{self, File};
use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, setns, unshare};

use super::sources::Sources;
use super::{Done, During, Step, apparmor, container, process};
use crate::engine::channel::{Channel, Message};
use crate::engine::plan::{Create, Exec};
use crate::engine::spec::{Linux, NamespaceKind, Process};
use crate::engine::sys::{self, Side};

pub(super) fn flag(kind: NamespaceKind) -> CloneFlags {
    match kind {
        NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
        NamespaceKind::Network => CloneFlags::CLONE_NEWNET,
        NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
        NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        NamespaceKind::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
    }
}

/// Makes a container's process.
pub(super) fn create(
    channel: &Channel,
    plan: Create,
    cgroup: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    sources: Sources,
) -> Result<Done, Step> {
    let linux = plan.spec.linux().into_owned();
    if let Some(process) = &plan.spec.process {
        set_oom_score(process)?;
        apparmor::on_exec(&process.apparmor_profile)?;
    }
    // All are opened before the first is joined: a path means what it means to the agent.
    let mut joined = Vec::new();
    let mut new = CloneFlags::empty();
    let mut user = false;
    for namespace in &linux.namespaces {
        let kind = namespace.kind;
        user |= kind == NamespaceKind::User;
        match namespace.path.as_str() {
            // The agent made it, or opened it, because the root file system's ids depend on it.
            _ if kind == NamespaceKind::User => {}
            // These are made elsewhere: the time namespace below, the control group's from inside of the group.
            "" if matches!(kind, NamespaceKind::Time | NamespaceKind::Cgroup) => {}
            "" => new |= flag(kind),
            path => {
                let file =
                    File::open(path).during(|| format!("open the {kind:?} namespace {path}"))?;
                joined.push((kind, path, file));
            }
        }
    }
    for (kind, path, file) in &joined {
        setns(file, flag(*kind)).during(|| format!("join the {kind:?} namespace {path}"))?;
    }
    let new_time = linux
        .namespaces
        .iter()
        .any(|namespace| namespace.kind == NamespaceKind::Time && namespace.path.is_empty());
    if new_time {
        make_time_namespace(&linux)?;
    }
    if user {
        setns(user_namespace, CloneFlags::CLONE_NEWUSER)
            .during(|| "join the user namespace".into())?;
    }
    split(channel, new, cgroup, || {
        container::run(channel, &plan, &linux, user, sources)
    })
}

/// Makes one more process of a container, which `init` is the first process of.
pub(super) fn exec(
    channel: &Channel,
    plan: Exec,
    cgroup: BorrowedFd<'_>,
    init: BorrowedFd<'_>,
) -> Result<Done, Step> {
    set_oom_score(&plan.process)?;
    apparmor::on_exec(&plan.process.apparmor_profile)?;
    let all = plan
        .namespaces
        .iter()
        .fold(CloneFlags::empty(), |all, kind| all | flag(*kind));
    // A process may not leave its control group for another once either is out of its control group namespace's
    // sight, so that namespace is joined from inside the container's group.
    let cgroup_namespace = all & CloneFlags::CLONE_NEWCGROUP;
    setns(init, all - cgroup_namespace).during(|| "join the container's namespaces".into())?;
    let user = plan.namespaces.contains(&NamespaceKind::User);
    split(channel, CloneFlags::empty(), cgroup, || {
        if !cgroup_namespace.is_empty() {
            setns(init, cgroup_namespace)
                .during(|| "join the container's control group namespace".into())?;
        }
        container::join(channel, &plan, user)
    })
}

/// Makes the second stage, and tells the agent of it.
fn split(
    channel: &Channel,
    new: CloneFlags,
    cgroup: BorrowedFd<'_>,
    second: impl FnOnce() -> Result<std::convert::Infallible, Step>,
) -> Result<Done, Step> {
    // SAFETY: this process has one thread: it was executed a moment ago and starts none.
    let side = unsafe { sys::clone3(new.bits() as u32 as u64, cgroup) };
    match side.during(|| "make the container's process".into())? {
        Side::Parent { pid, pidfd } => {
            channel
                .send(&Message::Created { pid, pidfd })
                .during(|| "report the container's process".into())?;
            Ok(Done::Ended)
        }
        Side::Child => match second() {
            Ok(never) => match never {},
            Err(step) => Err(step),
        },
    }
}

fn set_oom_score(process: &Process) -> Result<(), Step> {
    let Some(value) = process.oom_score_adj else {
        return Ok(());
    };
    fs::write("/proc/self/oom_score_adj", value.to_string())
        .during(|| format!("set process.oomScoreAdj to {value}"))
}

/// The clocks' offsets can be set until the first process is in the namespace.
fn make_time_namespace(linux: &Linux) -> Result<(), Step> {
    unshare(flag(NamespaceKind::Time)).during(|| "make a time namespace".into())?;
    let mut text = String::new();
    for (clock, offset) in &linux.time_offsets {
        text.push_str(&format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
    }
    if text.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", text).during(|| "set linux.timeOffsets".into())
}

/// Waits for the agent's word to go on.
pub(super) fn wait_for(channel: &Channel, expected: fn(&Message) -> bool) -> Result<(), Step> {
    match channel.receive(None) {
        Ok(Some(message)) if expected(&message) => Ok(()),
        // The agent gave the container up; there is nobody to tell.
        _ => std::process::exit(1),
    }
}

/// Becomes root of the user namespace that was joined.
pub(super) fn become_root() -> Result<(), Step> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .during(|| {
            "become root of the user namespace (do linux.uidMappings and linux.gidMappings map 0?)"
                .into()
        })?;
    process::hide()
}
