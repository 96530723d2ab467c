//! Templates: machines that were booted once and of which pods are clones (see `caisson_vmm::template`).
//!
//! A clone has the shape of its template, or grows from a small one. The usual [`Shape`] has a template that is made when the
//! daemon starts, and so has the smallest, which grows; any other has one from the second time on. A clone that has its shape from
//! its template costs less: what describes the memory that was added is its own, some 16 MiB for each GiB, and
//! its guest works for it at its start. A pod with nothing to be a clone of boots its kernel. Templates
//! are in the state directory, in a file system in memory: `templates/<key>/` has `memory` and `state`, and the key says all that
//! a template depends on, so one that fits no more is never found. What is in `templates/pods/` is being made.

mod place;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use caisson_vmm_protocol::{ExitReason, GrowthConfig, TemplateConfig, TemplateRole};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::share::Share;
use super::start::{self, Machine};
use super::{MicroVm, MicroVmConfig};
use crate::sandbox::pod::control::{self, Control};
use crate::sandbox::pod::dir::PodDir;
use crate::sandbox::pod::{Fds, PodConfig, scratch};
use crate::sandbox::{SandboxPlan, Scratch, take_back};

/// The directory of templates in the state directory.
const PLACE: &str = "templates";
/// The most templates beside those that grow. Each holds in memory what a guest has written until it was settled.
const MOST: usize = 4;
/// How often a shape is asked for before there is a template of it.
const ASKED: u32 = 2;

/// The memory of the smallest machine, in MiB.
const SMALLEST_MIB: u32 = 128;
/// The most vCPUs of a machine.
const MOST_VCPUS: u8 = 32;

/// What a clone and its template have in common, besides the programs.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Bytes of the scratch disk; `None`: there is none.
    pub scratch: Option<u64>,
    /// Whether it has a network device.
    pub network: bool,
    /// That it grows: the most vCPUs that its kernel knows of.
    pub grows_to: Option<u8>,
}

impl Shape {
    /// The shape of a pod.
    pub fn of(plan: &SandboxPlan) -> Self {
        Self {
            vcpus: plan.vcpus,
            memory_mib: plan.memory_mib,
            scratch: match plan.scratch {
                Scratch::Disk { bytes, .. } => Some(scratch::size(bytes)),
                Scratch::Memory { .. } => None,
            },
            network: plan.port.is_some(),
            grows_to: None,
        }
    }

    /// The smallest machine with the same devices, which can have as many vCPUs as the node has processors.
    #[must_use]
    pub fn smallest(&self) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            vcpus: 1,
            memory_mib: SMALLEST_MIB,
            grows_to: Some(u8::try_from(processors).map_or(MOST_VCPUS, |it| it.min(MOST_VCPUS))),
            ..self.clone()
        }
    }

    /// How a machine of this shape grows into another one; `None`: it cannot.
    fn growth(&self, into: &Self) -> Option<GrowthConfig> {
        let most_vcpus = self.grows_to?;
        let added = into.memory_mib.checked_sub(self.memory_mib)?;
        let fits = into.vcpus <= most_vcpus && added <= GrowthConfig::MOST_MIB;
        fits.then_some(GrowthConfig {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            most_vcpus,
        })
    }
}

/// A template's files, open for reading.
pub struct Template {
    key: String,
    memory: File,
    state: File,
    growth: Option<GrowthConfig>,
}

impl Template {
    /// How a machine is told to be its clone.
    pub fn lend(&self, fds: &mut Fds) -> TemplateConfig {
        TemplateConfig {
            role: TemplateRole::Clone,
            memory: fds.push(&self.memory),
            state: fds.push(&self.state),
            growth: self.growth,
        }
    }

    /// How a clone of it grows into its pod's size; `None`: it has that already.
    pub fn growth(&self) -> Option<GrowthConfig> {
        self.growth
    }
}

#[derive(Debug, Default)]
struct Known {
    /// How often a shape was asked for that had no template.
    asked: BTreeMap<Shape, u32>,
    /// What is being made, or could not be.
    tried: BTreeSet<String>,
    /// When a template was last used.
    used: BTreeMap<String, Instant>,
}

/// The templates of this node.
#[derive(Debug)]
pub struct Templates {
    /// Where they are, and where they are made.
    pod: PodConfig,
    /// The host user that a machine runs as which becomes a template; no pod's.
    user: u32,
    known: Mutex<Known>,
    /// One is made at a time: pods come first.
    turn: tokio::sync::Mutex<()>,
}

impl Templates {
    /// The templates of a daemon whose pods are as in `pod`, made by this user.
    pub fn new(pod: &PodConfig, user: u32) -> Self {
        Self {
            pod: PodConfig {
                state_dir: pod.state_dir.join(PLACE),
                data_dir: pod.data_dir.join(PLACE),
                ..pod.clone()
            },
            user,
            known: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Removes what a daemon has left in this state directory whose successor uses no templates.
    pub fn remove(state_dir: &Path) {
        let place = state_dir.join(PLACE);
        if let Err(error) = place::remove(&place) {
            tracing::warn!(%error, place = %place.display(), "templates that nobody uses cannot be removed");
        }
    }

    /// Prepares the place of templates, and takes back what a daemon has left that ended while it made one.
    pub async fn prepare(&self, config: &MicroVmConfig) {
        let config = self.making(config);
        let left = fs::read_dir(self.pod.state_dir.join("pods"));
        for entry in left.into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            take_back(&id, MicroVm::recover(&id, &config)).await;
        }
        for entry in fs::read_dir(&self.pod.state_dir)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with("new-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        if let Err(error) = place::prepare(&self.pod.state_dir) {
            tracing::warn!(%error, "templates share the state directory's file system");
        }
    }

    /// What a pod of this shape can be a clone of: the template of that shape, or a smaller one that grows. Where the first is
    /// not there it is made, if it is worth that.
    pub fn find(self: &Arc<Self>, shape: &Shape, config: &MicroVmConfig) -> Option<Template> {
        if let Some(template) = self.of(shape, config) {
            return Some(template);
        }
        let asked = {
            let mut known = self.lock();
            let asked = known.asked.entry(shape.clone()).or_default();
            *asked += 1;
            *asked
        };
        if asked >= ASKED {
            self.make(shape.clone(), config.clone());
        }
        let smallest = shape.smallest();
        let growth = smallest.growth(shape)?;
        let template = self.of(&smallest, config)?;
        Some(Template {
            growth: Some(growth),
            ..template
        })
    }

    /// The template of exactly this shape, if it is there.
    pub fn of(&self, shape: &Shape, config: &MicroVmConfig) -> Option<Template> {
        let key = match key(shape, config) {
            Ok(key) => key,
            Err(error) => {
                tracing::warn!(%error, "templates cannot be used");
                return None;
            }
        };
        let dir = self.pod.state_dir.join(&key);
        let memory = File::open(dir.join("memory")).ok()?;
        let state = File::open(dir.join("state")).ok()?;
        if shape.grows_to.is_none() {
            self.lock().used.insert(key.clone(), Instant::now());
        }
        Some(Template {
            key,
            memory,
            state,
            growth: None,
        })
    }

    /// Makes the template of a shape in the background, unless it is there, or was tried.
    pub fn make(self: &Arc<Self>, shape: Shape, config: MicroVmConfig) {
        let Ok(key) = key(&shape, &config) else {
            return;
        };
        if self.pod.state_dir.join(&key).exists() || !self.lock().tried.insert(key.clone()) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let turn = this.turn.lock().await;
            let began = Instant::now();
            let made = this.make_now(&key, &shape, &this.making(&config)).await;
            drop(turn);
            let took = began.elapsed().as_millis();
            match made {
                Ok(()) => {
                    this.lock().tried.remove(&key);
                    tracing::info!(?shape, "made a template in {took} ms");
                }
                Err(error) => {
                    tracing::warn!(?shape, %error, "no template could be made; such pods boot their kernel");
                }
            }
        });
    }

    /// Forgets a template that is of no use.
    pub fn discard(&self, template: &Template) {
        // It is not tried again by this daemon.
        self.lock().tried.insert(template.key.clone());
        let _ = fs::remove_dir_all(self.pod.state_dir.join(&template.key));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a machine is made that becomes a template.
    fn making(&self, config: &MicroVmConfig) -> MicroVmConfig {
        MicroVmConfig {
            pod: self.pod.clone(),
            templates: None,
            ..config.clone()
        }
    }

    async fn make_now(&self, key: &str, shape: &Shape, config: &MicroVmConfig) -> io::Result<()> {
        let new = self.pod.state_dir.join(format!("new-{key}"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&new)?;
        let result = self.boot(key, shape, config, &new).await;
        take_back(key, MicroVm::recover(key, config)).await;
        let kept = result.and_then(|()| {
            for name in ["memory", "state"] {
                fs::set_permissions(new.join(name), fs::Permissions::from_mode(0o400))?;
            }
            fs::rename(&new, self.pod.state_dir.join(key))
        });
        match kept {
            Ok(()) if shape.grows_to.is_none() => self.keep(key),
            // It is for all sizes, whichever are asked for.
            Ok(()) => {}
            Err(_) => drop(fs::remove_dir_all(&new)),
        }
        kept
    }

    /// Boots a machine that writes its template to `new`, and waits for its end.
    async fn boot(
        &self,
        key: &str,
        shape: &Shape,
        config: &MicroVmConfig,
        new: &Path,
    ) -> io::Result<()> {
        let dir = PodDir::new(key, &config.pod).map_err(io::Error::other)?;
        dir.create()?;
        let share_root = Share::new(key, &dir).create()?;
        let scratch = match shape.scratch {
            Some(bytes) => {
                let disk = create(&dir.scratch())?;
                disk.set_len(bytes)?;
                Some(disk)
            }
            None => None,
        };
        let mut fds = Fds::default();
        let (memory, state) = (create(&new.join("memory"))?, create(&new.join("state"))?);
        let template = TemplateConfig {
            role: TemplateRole::Make,
            memory: fds.push(&memory),
            state: fds.push(&state),
            growth: shape.growth(shape),
        };
        let mut nets = Vec::new();
        let cable = UnixDatagram::pair()?;
        if shape.network {
            nets.push(start::net(&cable.0, None, &mut fds));
        }
        let machine = Machine {
            id: key.to_owned(),
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
            user: self.user,
            nets,
            template: Some(template),
            placed_layers: Vec::new(),
            netns: None,
            cgroup_parent: String::new(),
            share_root,
            scratch,
        };
        let held: Vec<OwnedFd> = vec![memory.into(), state.into(), cable.0.into(), cable.1.into()];
        start::boot(machine, config, &dir, fds, held).await?;
        let control = Control::watch(key, &dir).await;
        let mut ended = control.ended();
        if !control::wait_ended(&mut ended, config.start_timeout).await {
            return Err(io::Error::other(format!(
                "its guest was not settled within {} s",
                config.start_timeout.as_secs()
            )));
        }
        match ended.borrow().as_ref() {
            Some(ExitReason::PoweredOff) | None => Ok(()),
            Some(reason) => Err(io::Error::other(format!(
                "{}; its process said: {}",
                control::sentence(reason),
                dir.vmm_tail().trim()
            ))),
        }
    }

    /// Notes a new template, and removes the one that was not used for longest if there are too many.
    fn keep(&self, key: &str) {
        let mut known = self.lock();
        known.used.insert(key.to_owned(), Instant::now());
        while known.used.len() > MOST {
            let oldest = known.used.iter().min_by_key(|(_, used)| **used);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            known.used.remove(&oldest);
            // Pods that are its clones have it mapped for as long as they live.
            let _ = fs::remove_dir_all(self.pod.state_dir.join(oldest));
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
}

/// All that a template depends on, in a name. A program that was replaced is another one.
fn key(shape: &Shape, config: &MicroVmConfig) -> io::Result<String> {
    let identity = |path: &PathBuf| {
        let meta = fs::metadata(path)
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        let changed = (meta.mtime(), meta.mtime_nsec());
        Ok::<_, io::Error>((meta.dev(), meta.ino(), meta.len(), changed))
    };
    let all = (
        env!("CARGO_PKG_VERSION"),
        shape,
        start::command_line(config),
        identity(&config.kernel)?,
        identity(&config.initramfs)?,
        identity(&config.pod.vmm)?,
        // Another kernel of the host, or other processors, may offer the guest other features.
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
    );
    let text = serde_json::to_vec(&all)?;
    Ok(Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn config(dir: &Path) -> MicroVmConfig {
        for name in ["kernel", "initramfs", "vmm"] {
            fs::write(dir.join(name), name).unwrap();
        }
        MicroVmConfig {
            pod: PodConfig {
                vmm: dir.join("vmm"),
                state_dir: dir.join("state"),
                data_dir: dir.join("data"),
                cgroup_parent: "/x".into(),
            },
            kernel: dir.join("kernel"),
            initramfs: dir.join("initramfs"),
            cmdline_extra: String::new(),
            start_timeout: Duration::from_secs(1),
            disk_rate: Default::default(),
            net_rate: Default::default(),
            vhost_net: Default::default(),
            templates: None,
        }
    }

    const SHAPE: Shape = Shape {
        vcpus: 1,
        memory_mib: 128,
        scratch: None,
        network: true,
        grows_to: None,
    };

    #[test]
    fn the_smallest_machine_grows_into_larger_ones_with_its_devices() {
        let disk = Shape {
            scratch: Some(8 << 30),
            ..SHAPE
        };
        let smallest = Shape {
            grows_to: Some(4),
            ..disk.smallest()
        };
        assert_eq!((smallest.vcpus, smallest.memory_mib), (1, SMALLEST_MIB));
        assert_eq!((smallest.scratch, smallest.network), (Some(8 << 30), true));
        let size = |vcpus, memory_mib| Shape {
            vcpus,
            memory_mib,
            ..disk.clone()
        };
        let growth = smallest.growth(&size(4, 1 << 10)).unwrap();
        assert_eq!((growth.vcpus, growth.memory_mib), (1, SMALLEST_MIB));
        assert_eq!(growth.most_vcpus, 4);
        assert_eq!(smallest.growth(&size(1, SMALLEST_MIB)), Some(growth));
        for other in [
            size(5, 1 << 10),
            size(1, SMALLEST_MIB - 1),
            size(1, 1 << 20),
        ] {
            assert_eq!(smallest.growth(&other), None, "{other:?}");
        }
        // One that does not grow is as large as it is.
        assert_eq!(disk.growth(&disk), None);
        for (memory, all) in [(128, 128), (129, 132), (132, 132), (300, 300), (301, 304)] {
            assert_eq!(growth.rounded(memory), all);
        }
    }

    #[test]
    fn a_template_is_found_by_all_that_it_depends_on() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let first = key(&SHAPE, &config).unwrap();
        assert_eq!(key(&SHAPE, &config).unwrap(), first);
        assert_eq!(first.len(), 64);
        let other = |shape: &Shape, config: &MicroVmConfig| {
            assert_ne!(key(shape, config).unwrap(), first);
        };
        other(&Shape { vcpus: 2, ..SHAPE }, &config);
        other(
            &SHAPE,
            &MicroVmConfig {
                cmdline_extra: "quiet".into(),
                ..config.clone()
            },
        );
        // The same path, another agent in it.
        fs::remove_file(dir.path().join("initramfs")).unwrap();
        fs::write(dir.path().join("initramfs"), "another one").unwrap();
        other(&SHAPE, &config);
        fs::remove_file(dir.path().join("kernel")).unwrap();
        assert!(key(&SHAPE, &config).is_err());
    }

    #[tokio::test]
    async fn the_one_that_was_not_used_for_longest_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let templates = Arc::new(Templates::new(&config.pod, 1));
        let shape = |vcpus| Shape { vcpus, ..SHAPE };
        let add = |vcpus| {
            let key = key(&shape(vcpus), &config).unwrap();
            let at = templates.pod.state_dir.join(&key);
            fs::create_dir_all(&at).unwrap();
            for name in ["memory", "state"] {
                fs::write(at.join(name), name).unwrap();
            }
            templates.keep(&key);
        };
        (1..=MOST as u8).for_each(add);
        assert!(templates.find(&shape(1), &config).is_some());
        add(99);
        assert!(templates.find(&shape(1), &config).is_some());
        assert!(templates.find(&shape(2), &config).is_none());
        assert!(templates.find(&shape(99), &config).is_some());
        let found = templates.find(&shape(99), &config).unwrap();
        templates.discard(&found);
        assert!(templates.find(&shape(99), &config).is_none());
    }
}
