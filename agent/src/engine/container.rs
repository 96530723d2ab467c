//! A container, as the agent holds it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cgroup::{Cgroup, Detail, Stats};
use super::channel::Channel;
use super::error::EngineError;
use super::namespaces::UserNamespace;
use super::plan::{Create, Exec, Plan, State};
use super::prepare::{Prepared, run_hooks, start};
use super::rootfs::{self, Mounted, RootFs};
use super::seccomp::{self, Filter};
use super::spec::{Hook, Hooks, LinuxResources, NamespaceKind, Personality, Process, Spec};
use super::{Stdio, paths, sys};

/// A container: its first process, control group, root file system and what its other processes share.
///
/// All calls block, and take `&self`: they can come from several threads. What ends a container goes through
/// [`Container::destroy`]; dropping it only forgets it.
#[derive(Debug)]
pub struct Container {
    id: String,
    pid: i32,
    pidfd: OwnedFd,
    cgroup: Cgroup,
    rootfs: Mutex<Option<Mounted>>,
    upper: PathBuf,
    namespaces: Vec<NamespaceKind>,
    user_namespace: Option<UserNamespace>,
    filter: Option<Filter>,
    personality: Option<Personality>,
    hooks: Mutex<Hooks>,
    state: State,
    /// To the first process until it has started.
    waiting: Mutex<Option<Channel>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks an id: it becomes the name of directories and of a control group.
fn check_id(id: &str) -> Result<(), EngineError> {
    let plain = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
    if id.is_empty() || id.len() > 128 || !plain || id == "." || id == ".." {
        return Err(EngineError::Argument(format!(
            "{id:?} is not a container id: 1 to 128 of A-Z, a-z, 0-9, _, . and -"
        )));
    }
    Ok(())
}

impl Container {
    /// Makes a container up to, not including, the exec of its process.
    ///
    /// Hands back the terminal's agent end if the process has one. `stdio` is used otherwise. The first process is a
    /// child of the calling process, which has to wait for it; so is a helper that ends at once and whose status
    /// means nothing.
    ///
    /// # Errors
    /// One sentence that says which step failed, on what; nothing of the container is left then.
    pub fn create(
        id: &str,
        spec: Spec,
        rootfs: RootFs,
        stdio: Stdio,
    ) -> Result<(Self, Option<OwnedFd>), EngineError> {
        check_id(id)?;
        let directory = paths::get().container(id);
        fs::create_dir_all(&paths::get().containers).map_err(|error| {
            EngineError::system(format!("make {}", paths::get().containers.display()), error)
        })?;
        fs::create_dir(&directory).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => EngineError::State {
                id: id.to_owned(),
                state: "exists already; remove it first",
            },
            _ => EngineError::system(format!("make {}", directory.display()), error),
        })?;
        let made = Self::create_in(id, spec, &rootfs, &stdio, &directory);
        if made.is_err() {
            let _ = fs::remove_dir_all(&directory);
        }
        made
    }

    fn create_in(
        id: &str,
        spec: Spec,
        rootfs: &RootFs,
        stdio: &Stdio,
        directory: &Path,
    ) -> Result<(Self, Option<OwnedFd>), EngineError> {
        let linux = spec.linux().into_owned();
        let filter = linux.seccomp.as_ref().map(seccomp::compile).transpose()?;
        let ids = UserNamespace::of(&linux)?;
        let mounted = Mounted::mount(id, rootfs, rootfs::borrow(&ids))?;
        let state = State {
            oci_version: spec.oci_version.clone(),
            id: id.to_owned(),
            status: "creating".to_owned(),
            pid: None,
            bundle: directory.to_owned(),
            annotations: spec.annotations.clone(),
        };
        let cgroup = Cgroup::create(id, &linux.cgroups_path)?;
        let prepared = (|| {
            let empty = LinuxResources::default();
            let resources = linux.resources.as_ref().unwrap_or(&empty);
            cgroup.apply(resources)?;
            cgroup.restrict_devices(Some(resources))?;
            if let Some(ids) = &ids {
                ids.own_cgroup(&cgroup)?;
                ids.own_streams(stdio)?;
            }
            let hooks = spec.hooks.clone().unwrap_or_default();
            let plan = Plan::Create(Box::new(Create {
                spec,
                rootfs: mounted.target().to_owned(),
                cgroup: cgroup.directory().to_owned(),
                filter: filter.clone(),
                state: state.clone(),
            }));
            let group = cgroup.open()?;
            let process = Prepared::start(&plan, stdio, &group, rootfs::borrow(&ids))?;
            let state = State {
                pid: Some(process.pid),
                ..state.clone()
            };
            let outside: Vec<Hook> = [&hooks.prestart[..], &hooks.create_runtime].concat();
            run_hooks(&outside, &state)?;
            let terminal = process.prepare(&hooks.create_container)?;
            Ok((process, terminal, hooks, state))
        })();
        let (process, terminal, hooks, state) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                // The process, if there is one, is in the group. What cannot be undone here is reported in
                // place of nothing: the first error is the one that explains.
                let _ = cgroup.remove();
                return Err(error);
            }
        };
        let container = Self {
            id: id.to_owned(),
            pid: process.pid,
            pidfd: process.pidfd,
            upper: mounted.upper(),
            rootfs: Mutex::new(Some(mounted)),
            cgroup,
            namespaces: linux.namespaces.iter().map(|one| one.kind).collect(),
            user_namespace: ids,
            filter,
            personality: linux.personality,
            hooks: Mutex::new(hooks),
            state,
            waiting: Mutex::new(Some(process.channel)),
        };
        Ok((container, terminal))
    }

    /// Lets the container's process execute its program.
    ///
    /// # Errors
    /// If it cannot be executed, or was started before. A poststart hook that fails is logged, as the
    /// specification has it, and the container goes on.
    pub fn start(&self) -> Result<(), EngineError> {
        let Some(channel) = lock(&self.waiting).take() else {
            return Err(self.in_state("was started before"));
        };
        let hooks = lock(&self.hooks).clone();
        start(&channel, &hooks.start_container, || {
            self.in_state("ended before it was started")
        })?;
        let running = State {
            status: "running".to_owned(),
            ..self.state.clone()
        };
        if let Err(error) = run_hooks(&hooks.poststart, &running) {
            crate::warn!("container {}: {error}", self.id);
        }
        Ok(())
    }

    /// Starts one more process: in all of the container's namespaces, its control group, and under its filter.
    ///
    /// Hands back its number, and the terminal's agent end if it has one. The process is a child of the calling
    /// process, as with [`Container::create`].
    ///
    /// # Errors
    /// If the container's first process has ended, a step fails, or the program cannot be executed.
    pub fn exec(
        &self,
        process: Process,
        stdio: Stdio,
    ) -> Result<(i32, Option<OwnedFd>), EngineError> {
        let plan = Plan::Exec(Box::new(Exec {
            process,
            namespaces: self.namespaces.clone(),
            filter: self.filter.clone(),
            personality: self.personality.clone(),
        }));
        if sys::signal(self.pidfd.as_fd(), 0).is_err() {
            return Err(self.in_state("is not running"));
        }
        if let Some(ids) = &self.user_namespace {
            ids.own_streams(&stdio)?;
        }
        let group = self.current_cgroup()?;
        let process = Prepared::start(&plan, &stdio, &group, Some(self.pidfd.as_fd()))?;
        let run = || {
            let terminal = process.prepare(&[])?;
            start(&process.channel, &[], || self.in_state("is not running"))?;
            Ok(terminal)
        };
        match run() {
            Ok(terminal) => Ok((process.pid, terminal)),
            Err(error) => {
                let _ = sys::signal(process.pidfd.as_fd(), libc::SIGKILL);
                Err(error)
            }
        }
    }

    /// The group its first process is in: a container that manages groups itself has moved it below, and the kernel
    /// then takes no process at the top.
    fn current_cgroup(&self) -> Result<File, EngineError> {
        let own = self.cgroup.directory();
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let current = text
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .filter(|path| !path.split('/').any(|part| part == ".."))
            .map(|path| paths::get().in_cgroup(Path::new(path)))
            .filter(|path| path.starts_with(own));
        match current.and_then(|path| File::open(path).ok()) {
            Some(group) => Ok(group),
            None => self.cgroup.open(),
        }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its first process, in the calling process's PID namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// User, group and supplementary groups of the first process, as the kernel has them: whatever names the spec has
    /// are resolved by then, and those of a user namespace are as it calls them. `None` once the process has ended.
    #[must_use]
    pub fn identity(&self) -> Option<(u32, u32, Vec<u32>)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let numbers = |name: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().flat_map(str::parse).collect())
        };
        let identity = (
            *numbers("Uid:")?.first()?,
            *numbers("Gid:")?.first()?,
            numbers("Groups:")?,
        );
        Some(match &self.user_namespace {
            Some(ids) => ids.inside(identity),
            None => identity,
        })
    }

    /// Sends a signal to the first process; one that has ended is not an error.
    ///
    /// # Errors
    /// If there is no such signal.
    pub fn signal(&self, signal: i32) -> Result<(), EngineError> {
        check_signal(signal)?;
        match sys::signal(self.pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(self.not_signalled(signal, error))
            }
            _ => Ok(()),
        }
    }

    /// Sends a signal to a process that [`Container::exec`] has made; one that has ended is not an error.
    ///
    /// The caller is the one that waits for the process, so it has to know that its number is still its own.
    ///
    /// # Errors
    /// If there is no such signal.
    pub fn signal_pid(&self, pid: i32, signal: i32) -> Result<(), EngineError> {
        check_signal(signal)?;
        if pid <= 1 {
            return Err(EngineError::Argument(format!("{pid} is not a process")));
        }
        self.kill(pid, signal)
    }

    /// Sends a signal to every process of the container.
    ///
    /// # Errors
    /// If there is no such signal, or the control group cannot be read.
    pub fn signal_all(&self, signal: i32) -> Result<(), EngineError> {
        check_signal(signal)?;
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.processes()? {
            // 0 is a process of a PID namespace that cannot be seen from here.
            if pid > 1 {
                self.kill(pid, signal)?;
            }
        }
        Ok(())
    }

    fn kill(&self, pid: i32, signal: i32) -> Result<(), EngineError> {
        // SAFETY: takes numbers only. nix's kill knows no real-time signals.
        let result = unsafe { libc::kill(pid, signal) };
        let error = io::Error::last_os_error();
        if result == 0 || error.raw_os_error() == Some(libc::ESRCH) {
            return Ok(());
        }
        Err(self.not_signalled(signal, error))
    }

    /// Changes limits; what is not set stays as it is.
    ///
    /// # Errors
    /// Names the field whose limit the kernel refused, or that cannot be changed.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), EngineError> {
        if !resources.devices.is_empty() {
            return Err(EngineError::Argument(
                "linux.resources.devices cannot be changed in a container that exists".to_owned(),
            ));
        }
        self.cgroup.apply(resources)
    }

    /// Stops all of its processes where they are, or lets them go on. Returns when that is so.
    ///
    /// # Errors
    /// If a process cannot be stopped: it hangs in the kernel.
    pub fn freeze(&self, frozen: bool) -> Result<(), EngineError> {
        self.cgroup.freeze(frozen)
    }

    /// Reads its resource use.
    ///
    /// # Errors
    /// If its control group is gone.
    pub fn stats(&self) -> Result<Stats, EngineError> {
        self.cgroup.stats(&self.upper)
    }

    /// More about what the container uses; it costs a walk over its processes.
    ///
    /// # Errors
    /// If its control group is gone.
    pub fn detail(&self) -> Result<Detail, EngineError> {
        self.cgroup.detail(self.pid, &self.upper)
    }

    /// How many of its processes the kernel has ended for lack of memory.
    ///
    /// # Errors
    /// If its control group cannot be read.
    pub fn oom_kills(&self) -> Result<u64, EngineError> {
        self.cgroup.oom_kills()
    }

    /// The file that changes with [`Container::oom_kills`], to be watched with inotify.
    #[must_use]
    pub fn memory_events_path(&self) -> PathBuf {
        self.cgroup.directory().join("memory.events")
    }

    /// Kills what is left, unmounts and removes everything. Can be called again.
    ///
    /// # Errors
    /// If processes hang in the kernel, a directory stays, or a poststop hook fails; everything that could be
    /// removed is removed.
    pub fn destroy(&self) -> Result<(), EngineError> {
        self.cgroup.remove()?;
        drop(lock(&self.waiting).take());
        // Unmounts.
        drop(lock(&self.rootfs).take());
        let directory = paths::get().container(&self.id);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(EngineError::system(
                    format!("remove {}", directory.display()),
                    error,
                ));
            }
            _ => {}
        }
        let hooks = std::mem::take(&mut lock(&self.hooks).poststop);
        let stopped = State {
            status: "stopped".to_owned(),
            pid: None,
            ..self.state.clone()
        };
        run_hooks(&hooks, &stopped)
    }

    fn in_state(&self, state: &'static str) -> EngineError {
        EngineError::State {
            id: self.id.clone(),
            state,
        }
    }

    fn not_signalled(&self, signal: i32, error: io::Error) -> EngineError {
        EngineError::system(format!("send signal {signal} to {}", self.id), error)
    }
}

fn check_signal(signal: i32) -> Result<(), EngineError> {
    if (1..=64).contains(&signal) {
        Ok(())
    } else {
        Err(EngineError::Argument(format!(
            "{signal} is not a signal: 1 to 64"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names() {
        for good in ["a", "web-1", "A.b_c", &"x".repeat(128)] {
            check_id(good).unwrap();
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:b",
            "a,b",
            "ä",
            &"x".repeat(129),
        ] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn signals_have_bounds() {
        assert!(check_signal(0).is_err());
        check_signal(64).unwrap();
        assert!(check_signal(65).is_err());
    }
}
