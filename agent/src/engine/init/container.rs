//! The second stage, inside of the new namespaces: from the spec to a process that is about to execute.

use std::convert::Infallible;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};

use super::mount_options::propagation;
use super::process::Ending;
use super::resolve::Tree;
use super::sources::Sources;
use super::{During, Step, console, devices, hooks, mounts, process, root, stage, sysctl};
use crate::engine::channel::{Channel, Message};
use crate::engine::plan::{Create, Exec};
use crate::engine::spec::{Hooks, Linux, NamespaceKind, Process};
use crate::loopback;

/// Sets a container up and executes its process.
///
/// The order matters: links of the image are resolved from outside, before the root is changed; kernel parameters
/// are written before their files become read-only; the process's own rights are given up last.
pub(super) fn run(
    channel: &Channel,
    plan: &Create,
    linux: &Linux,
    user: bool,
    mut sources: Sources,
) -> Result<Infallible, Step> {
    stage::wait_for(channel, |message| matches!(message, Message::Continue))?;
    let spec = &plan.spec;
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| Step::other("read the plan", "it has no process"))?;
    begin(user)?;
    let new = |kind| {
        linux
            .namespaces
            .iter()
            .any(|namespace| namespace.kind == kind && namespace.path.is_empty())
    };
    if new(NamespaceKind::Cgroup) {
        unshare(CloneFlags::CLONE_NEWCGROUP).during(|| "make a cgroup namespace".into())?;
    }
    if new(NamespaceKind::Network) {
        loopback::up().during(|| "bring the loopback interface up".into())?;
    }
    if !spec.hostname.is_empty() {
        nix::unistd::sethostname(&spec.hostname)
            .during(|| format!("set hostname to {:?}", spec.hostname))?;
    }
    if !spec.domainname.is_empty() {
        process::set_domain_name(&spec.domainname)
            .during(|| format!("set domainname to {:?}", spec.domainname))?;
    }

    let wanted = propagation(&linux.rootfs_propagation)
        .map_err(|reason| Step::other("set linux.rootfsPropagation", reason))?;
    let tree = root::prepare(&plan.rootfs, wanted)?;
    let context = mounts::Context {
        cgroup: &plan.cgroup,
        cgroup_namespace: linux
            .namespaces
            .iter()
            .any(|namespace| namespace.kind == NamespaceKind::Cgroup),
    };
    let mut late = Vec::new();
    for (number, mount) in spec.mounts.iter().enumerate() {
        let source = sources.remove(&number);
        late.extend(mounts::make(&tree, mount, source, &context)?);
    }
    if devices::wanted(&spec.mounts) {
        devices::make(&tree, &linux.devices, user)?;
    }
    let terminal = match process.terminal {
        true => Some(console::open(&tree, process)?),
        false => None,
    };
    if let Some(terminal) = &terminal {
        terminal.show_as_console(&tree)?;
    }
    for mount in late {
        mounts::make_read_only(&mount, false)
            .during(|| "make a tmpfs of mounts read-only".into())?;
    }
    sysctl::apply(&linux.sysctl)?;
    mounts::protect(&tree, &linux.readonly_paths, &linux.masked_paths)?;

    let none = Hooks::default();
    let all_hooks = spec.hooks.as_ref().unwrap_or(&none);
    hooks::run(&all_hooks.create_container, &plan.state)?;
    root::change(tree)?;
    let readonly = spec.root.as_ref().is_some_and(|root| root.readonly);
    root::settle(wanted.unwrap_or(MsFlags::empty()), readonly)?;
    process::execute(
        channel,
        process,
        Ending {
            filter: plan.filter.as_ref(),
            personality: linux.personality.as_ref(),
            hooks: &all_hooks.start_container,
            state: Some(&plan.state),
            terminal,
        },
    )
}

/// Executes one more process, from inside of the container's namespaces.
pub(super) fn join(channel: &Channel, plan: &Exec, user: bool) -> Result<Infallible, Step> {
    stage::wait_for(channel, |message| matches!(message, Message::Continue))?;
    begin(user)?;
    let process: &Process = &plan.process;
    let terminal = match process.terminal {
        true => {
            let root = std::fs::File::open("/").during(|| "open the container's root".into())?;
            Some(console::open(&Tree::new(root.into()), process)?)
        }
        false => None,
    };
    process::execute(
        channel,
        process,
        Ending {
            filter: plan.filter.as_ref(),
            personality: plan.personality.as_ref(),
            hooks: &[],
            state: None,
            terminal,
        },
    )
}

fn begin(user: bool) -> Result<(), Step> {
    if user {
        stage::become_root()?;
    }
    nix::unistd::setsid().during(|| "start a session".into())?;
    // Files get exactly the modes that are asked for; the process gets its own mask at the end.
    umask(Mode::empty());
    Ok(())
}
