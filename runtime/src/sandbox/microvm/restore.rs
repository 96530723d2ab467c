//! A pod's machine that goes on where it was written down.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use caisson_proto::agent as proto;
use caisson_vmm_protocol::{GrowthConfig, PlacedLayer, TemplateConfig, TemplateRole};

use super::share::Share;
use super::start::{self, Machine, Parts, wait_for_agent};
use super::{MicroVm, MicroVmConfig, vhost};
use crate::network::{Coming, PodNetwork};
use crate::sandbox::pod::dir::PodDir;
use crate::sandbox::pod::{Fds, scratch};
use crate::sandbox::{Sandbox, SandboxError, SandboxPlan, agent, take_back};
use crate::timings::Timings;

/// What a machine that goes on is made of, beside its plan.
pub struct Saved {
    /// Its memory.
    pub memory: File,
    /// All else that the pod process wrote.
    pub state: File,
    /// Its disk, which is copied.
    pub scratch: Option<PathBuf>,
    /// Its image layers: the file, and the first byte of its place; by ascending places.
    pub layers: Vec<(PathBuf, u64)>,
    /// The MAC of its network device.
    pub mac: String,
    /// What it had grown from, if it had.
    pub growth: Option<GrowthConfig>,
}

impl MicroVm {
    /// Makes the machine of a pod as it was, and lets its agent take the new network and time; then the containers go on. If a
    /// step fails everything is taken back, the network excepted, which is the caller's.
    ///
    /// # Errors
    /// [`SandboxError::Start`] with the step that failed and why; [`SandboxError::Network`].
    pub async fn restore(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        saved: Saved,
        network: Coming,
        timings: Timings,
    ) -> Result<Self, SandboxError> {
        let mac = saved.mac.clone();
        let restored = async {
            let machine = Self::restore_machine(plan, config, saved, &timings);
            let (machine, network) = tokio::join!(machine, network);
            let vm = machine?;
            let network = network.map_err(SandboxError::Network)?;
            let resumed = timings.step(
                "resume containers",
                resume(&vm, plan, network.as_ref(), &mac),
            );
            resumed.await.map_err(SandboxError::at(
                &plan.id,
                "resume the containers in the guest",
            ))?;
            Ok(vm)
        }
        .await;
        if restored.is_err() {
            take_back(&plan.id, Self::recover(&plan.id, config)).await;
        }
        restored
    }

    async fn restore_machine(
        plan: &SandboxPlan,
        config: &MicroVmConfig,
        saved: Saved,
        timings: &Timings,
    ) -> Result<Self, SandboxError> {
        let error = |step| SandboxError::at(&plan.id, step);
        let dir = PodDir::new(&plan.id, &config.pod)?;
        let share = Share::new(&plan.id, &dir);
        let prepared = timings.step(
            "prepare share and disk",
            prepare(&dir, &share, saved.scratch),
        );
        let parts = prepared
            .await
            .map_err(error("prepare the share and disk"))?;
        let began = timings.elapsed();
        let booted = timings.step("start caisson-vmm", async {
            let mut fds = Fds::default();
            let vhost = match plan.port {
                Some(_) => vhost::open(config.vhost_net, config.net_rate)?,
                None => None,
            };
            let (layers, placed_layers) = open_layers(&saved.layers, &mut fds)?;
            let template = TemplateConfig {
                role: TemplateRole::Restore,
                memory: fds.push(&saved.memory),
                state: fds.push(&saved.state),
                growth: saved.growth,
            };
            let machine = Machine {
                placed_layers,
                ..start::machine(plan, parts, Some(template), vhost.as_ref(), &mut fds)
            };
            let lent = (plan.port.clone(), vhost, layers, saved.memory, saved.state);
            start::boot(machine, config, &dir, fds, lent).await
        });
        booted.await.map_err(error("start the virtual machine"))?;
        let vm = Self::with(&plan.id, dir.clone(), timings.clone()).await;
        let answer = wait_for_agent(&vm.pod.control, &dir, config.start_timeout);
        let answered = timings.step("resume guest", answer).await;
        answered.map_err(error("resume the guest"))?;
        vm.note_spans(began).await;
        Ok(vm)
    }
}

async fn prepare(dir: &PodDir, share: &Share, disk: Option<PathBuf>) -> io::Result<Parts> {
    dir.create()?;
    let share_root = share.create()?;
    let scratch = match disk {
        Some(from) => {
            let to = dir.scratch();
            let copy = move || {
                scratch::copy_sparse(&from, &to)?;
                File::options().read(true).write(true).open(to)
            };
            Some(tokio::task::spawn_blocking(copy).await??)
        }
        None => None,
    };
    Ok(Parts {
        share_root,
        scratch,
    })
}

fn open_layers(
    layers: &[(PathBuf, u64)],
    fds: &mut Fds,
) -> io::Result<(Vec<File>, Vec<PlacedLayer>)> {
    let mut files = Vec::with_capacity(layers.len());
    let mut placed = Vec::with_capacity(layers.len());
    for (path, offset) in layers {
        let file = File::open(path)
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        placed.push(PlacedLayer {
            name: layer_name(path)?,
            file: fds.push(&file),
            offset: *offset,
        });
        files.push(file);
    }
    Ok((files, placed))
}

/// The name by which a pod process knows a layer.
pub fn layer_name(path: &Path) -> io::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::other("the name of a layer is not text"))?;
    Ok(name.to_owned())
}

async fn resume(
    vm: &MicroVm,
    plan: &SandboxPlan,
    network: Option<&PodNetwork>,
    mac: &str,
) -> io::Result<()> {
    let request = proto::ResumeRequest {
        sandbox: Some(start::request(plan, network, mac)?),
        moved: true,
    };
    agent::resume(vm.agent(), request).await
}

/// What lets a pod go on that has not moved.
pub fn stay() -> proto::ResumeRequest {
    proto::ResumeRequest {
        sandbox: Some(proto::SetupSandboxRequest {
            shared_mounts: start::shared_mounts(),
            ..proto::SetupSandboxRequest::default()
        }),
        moved: false,
    }
}
