//! RunPodSandbox.

use std::sync::Arc;

use caisson_proto::cri;

use super::super::registry::{Pod, now};
use super::super::{Context, CriError, new_id, spec};
use super::ready::Ready;
use super::{
    dns, identity, namespaces, on_host_network, sandbox, scratch, shares_pid, size, wants_network,
    watch,
};
use crate::config::HandlerKind;
use crate::network::{Coming, NetworkError, PodNetwork};
use crate::sandbox::{HostNamespaces, SandboxPlan};
use crate::steps::{self, Step};
use crate::store::{NetworkRecord, Proto, SandboxRecord, SandboxState};
use crate::telemetry::Caller;
use crate::timings::Timings;
use futures::future::{self, FutureExt};

/// The longest hostname of Linux.
const MAX_HOSTNAME: usize = 64;

/// Makes a pod sandbox and returns its ID. If a step fails, everything is taken back.
///
/// # Errors
/// INVALID_ARGUMENT for a request that a microVM cannot be; ALREADY_EXISTS with the ID that has the name;
/// FAILED_PRECONDITION where KVM does not work or no network is configured; INTERNAL with the step that failed.
pub async fn run(
    context: &Arc<Context>,
    request: cri::RunPodSandboxRequest,
    caller: &Caller,
) -> Result<String, CriError> {
    let config = request
        .config
        .ok_or_else(|| CriError::invalid("the request has no pod configuration"))?;
    let (name, kind) = check(context, &config, &request.runtime_handler)?;
    if kind == HandlerKind::MicroVm {
        context.kvm.require().await?;
    }

    let ahead = match kind {
        HandlerKind::MicroVm => context
            .ready
            .take(&size::shape(&config, &context.config.microvm)?),
        HandlerKind::Host => None,
    };
    let record = SandboxRecord {
        handler: request.runtime_handler,
        kind,
        config: Proto(config),
        ..SandboxRecord::first(new_id(), name, now())
    };
    let (pod, ahead) = match ahead {
        Some(machine) => match context.registry.claim(&machine.record, record).await {
            Ok(pod) => (pod, Some(machine)),
            Err(error) => {
                context.ready.put(machine);
                return Err(error);
            }
        },
        None => (context.registry.create_pod(record).await?, None),
    };
    steps::done(Step::RunRecorded);
    let _making = pod.lifecycle.write().await;
    let timings = Timings::begin();
    let made = make(context, &pod, timings.clone(), ahead).await;
    if let Some(telemetry) = &context.telemetry {
        let error = made.as_ref().err().map(|error| error.message.as_str());
        telemetry.pod_started(caller, &pod.record(), &timings, error);
    }
    match made {
        Ok(()) => {
            tracing::info!(pod = pod.id, "the pod is ready");
            for kind in [
                cri::ContainerEventType::ContainerCreatedEvent,
                cri::ContainerEventType::ContainerStartedEvent,
            ] {
                context.registry.emit_of_pod(kind, &pod, None);
            }
            Ok(pod.id.clone())
        }
        Err(error) => {
            tracing::warn!(pod = pod.id, %error, "the pod could not be made");
            undo(context, &pod, &error.message).await;
            Err(error)
        }
    }
}

/// Checks the request; the name to reserve, and the kind of sandbox.
fn check(
    context: &Context,
    config: &cri::PodSandboxConfig,
    handler: &str,
) -> Result<(String, HandlerKind), CriError> {
    let metadata = config
        .metadata
        .as_ref()
        .filter(|metadata| !metadata.name.is_empty())
        .ok_or_else(|| CriError::invalid("the pod configuration has no metadata with a name"))?;
    let kind = match context.config.handler(handler) {
        Some(HandlerKind::MicroVm) => {
            spec::check_pod(config, &context.config.host_hint())?;
            HandlerKind::MicroVm
        }
        Some(HandlerKind::Host) if !context.config.allow_host => {
            return Err(CriError::invalid(format!(
                "the runtime handler {handler} runs pods on the host without a VM, which is not allowed; an administrator can set allow_host = true in the configuration"
            )));
        }
        Some(HandlerKind::Host) => {
            spec::check_host_pod(config)?;
            HandlerKind::Host
        }
        None => {
            let known: Vec<_> = context
                .config
                .usable_handlers()
                .map(|(name, _)| name)
                .collect();
            return Err(CriError::invalid(format!(
                "the runtime handler {handler} is not known; known are: {}",
                known.join(", ")
            )));
        }
    };
    wants_network(config)?;
    if config.hostname.len() > MAX_HOSTNAME {
        return Err(CriError::invalid(format!(
            "the hostname {} is longer than {MAX_HOSTNAME} bytes",
            config.hostname
        )));
    }
    for mapping in &config.port_mappings {
        for port in [mapping.host_port, mapping.container_port] {
            if !(0..=65_535).contains(&port) {
                return Err(CriError::invalid(format!(
                    "the port mapping has the port {port}, and ports are 0 to 65535"
                )));
            }
        }
    }
    if config.windows.is_some() {
        return Err(CriError::invalid(
            "the pod configuration has a windows section, and this is a Linux runtime",
        ));
    }
    let name = format!(
        "{}_{}_{}_{}",
        metadata.name, metadata.namespace, metadata.uid, metadata.attempt
    );
    Ok((name, kind))
}

/// The steps, in order: a place for the network first, because the machine is built with its tap; what CNI does there, and
/// the machine; the record is ready last, because then containers may come.
async fn make(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    timings: Timings,
    ahead: Option<Ready>,
) -> Result<(), CriError> {
    let record = pod.record();
    let ids = spec::user_ids(&namespaces(&record.config.0))?;
    let (vm, port) = ahead.map(|ready| (ready.vm, ready.port)).unzip();
    let port = if port.is_some() {
        port
    } else if wants_network(&record.config.0)? {
        let identity = identity(&record);
        let guest = record.kind == HandlerKind::MicroVm;
        // A guest has namespaces of its own, with an owner of its own.
        let owner = ids.filter(|_| !guest);
        let prepare = context.network.prepare(&identity, guest, owner);
        Some(timings.step("network namespace", prepare).await?)
    } else {
        None
    };
    let config = &record.config.0;
    let linux = config.linux.clone().unwrap_or_default();
    let size = match record.kind {
        HandlerKind::MicroVm => size::plan(config, &context.config.microvm)?,
        HandlerKind::Host => SandboxPlan {
            scratch: scratch::on_host(config, &context.config.host)?,
            ..SandboxPlan::default()
        },
    };
    let plan = SandboxPlan {
        id: pod.id.clone(),
        hostname: hostname(config, &pod.id),
        dns: dns::of(config, on_host_network(config)).await,
        cgroup_parent: linux.cgroup_parent,
        port,
        shared_pid_namespace: shares_pid(config),
        sysctls: linux.sysctls.into_iter().collect(),
        host: HostNamespaces {
            network: on_host_network(config),
            ipc: namespaces(config).ipc() == cri::NamespaceMode::Node,
        },
        ids,
        user: record.user,
        ..size
    };
    let network = connect(context, pod, &plan, timings.clone());
    let started = sandbox::start(context, record.kind, &plan, network.clone(), timings, vm).await;
    // What has failed is taken back, so that nothing of it may be under way any more.
    let network = network.await;
    let sandbox = started?;
    pod.set_sandbox(Some(sandbox));
    pod.change(|record| {
        record.network = network.ok().flatten().as_ref().map(shown);
        record.state = SandboxState::Ready;
    });
    context.registry.save_pod(pod).await?;
    steps::done(Step::RunSaved);
    watch::watch(context, pod);
    Ok(())
}

/// Lets CNI make the pod's network, beside the sandbox's own start.
pub(super) fn connect(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    plan: &SandboxPlan,
    timings: Timings,
) -> Coming {
    let Some(port) = plan.port.clone() else {
        return future::ready(Ok(None)).boxed().shared();
    };
    let (context, identity) = (context.clone(), identity(&pod.record()));
    let id = pod.id.clone();
    let connecting = tokio::spawn(async move {
        let connect = context.network.connect(&identity, &port);
        timings.step("network", connect).await
    });
    let connected = async move {
        let network = connecting.await.map_err(|error| NetworkError::Host {
            step: "make the network",
            id,
            cause: error.to_string(),
        })?;
        network.map(Some)
    };
    connected.boxed().shared()
}

/// What is remembered of a network.
pub(super) fn shown(network: &PodNetwork) -> NetworkRecord {
    let interface = network.interface.clone();
    NetworkRecord {
        netns: network.netns.clone(),
        interface: interface.name,
        mac: interface.mac,
        mtu: interface.mtu,
        addresses: interface.addresses,
        routes: network
            .routes
            .iter()
            .map(|route| {
                let (destination, prefix) = route.destination;
                (destination, prefix, route.gateway, route.priority)
            })
            .collect(),
        ips: network.ips(),
    }
}

/// The hostname asked for; without one, the beginning of the ID. Who has the node's network has its name.
pub fn hostname(config: &cri::PodSandboxConfig, id: &str) -> String {
    if on_host_network(config)
        && let Ok(name) = nix::unistd::gethostname()
    {
        return name.to_string_lossy().into_owned();
    }
    if config.hostname.is_empty() {
        id.chars().take(12).collect()
    } else {
        config.hostname.clone()
    }
}

/// Takes back what a failed start has made. What cannot be taken back stays known as a pod that is not ready, so
/// that a later stop and remove try again.
pub(super) async fn undo(context: &Context, pod: &Arc<Pod>, reason: &str) {
    let undone = async {
        sandbox::take_back(context, &pod.record()).await?;
        pod.set_sandbox(None);
        // Those of a pod that was to be restored.
        for container in context.registry.containers_of(&pod.id) {
            context.registry.delete_container(&container).await?;
        }
        context.registry.delete_pod(pod).await
    };
    if let Err(error) = undone.await {
        tracing::warn!(pod = pod.id, %error, "the half-made pod is kept until it can be removed");
        pod.change(|record| {
            record.state = SandboxState::NotReady;
            record.reason = reason.to_owned();
        });
        if let Err(error) = context.registry.save_pod(pod).await {
            tracing::error!(pod = pod.id, %error, "the pod's record could not be written");
        }
    }
}
