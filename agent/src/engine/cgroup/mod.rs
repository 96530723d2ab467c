//! The container's control group: cgroup v2 (Documentation/admin-guide/cgroup-v2.rst of the kernel).

mod detail;
pub(crate) mod devices;
pub(crate) mod settings;
mod stats;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::error::EngineError;
use super::paths;
use super::spec::LinuxResources;

pub use detail::{Detail, DeviceIo, HugePages};
pub use stats::{Pressure, PressureLine, Stats};

/// How long the kernel gets to end the processes of a killed group.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the kernel gets to freeze the processes of a group.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest file of a group that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Controllers that limits and statistics need, as far as the kernel has them.
const CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io", "cpuset", "hugetlb"];

/// Checks `linux.cgroupsPath`: a path below the root of the hierarchy that stays there.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    if path.contains(['\0', '\n']) || !plain || path.len() > 2048 {
        return Err(format!(
            "{path:?} is not a plain path below the hierarchy's root"
        ));
    }
    if !path.is_empty() && path.trim_matches('/').is_empty() {
        return Err("the hierarchy's root cannot be a container's group".to_owned());
    }
    Ok(())
}

/// One control group that the engine made.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// Makes the group of a container, with the controllers enabled on the way to it.
    ///
    /// # Errors
    /// If no cgroup v2 hierarchy is mounted, or the group exists and has processes.
    pub fn create(id: &str, cgroups_path: &str) -> Result<Self, EngineError> {
        let paths = paths::get();
        let root = &paths.cgroup;
        let mounted = statfs(root).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        if !mounted {
            return Err(EngineError::system(
                format!("use the cgroup hierarchy {}", root.display()),
                io::Error::other("it is not cgroup v2; mount it there"),
            ));
        }
        let relative = match cgroups_path.trim_matches('/') {
            "" => format!("caisson/{id}"),
            given => given.to_owned(),
        };
        check_path(&relative).map_err(|reason| {
            EngineError::system(
                "make the cgroup",
                io::Error::new(io::ErrorKind::InvalidInput, reason),
            )
        })?;
        let mut directory = root.clone();
        let parts: Vec<_> = Path::new(&relative).components().collect();
        for part in &parts {
            enable_controllers(&directory);
            directory.push(part);
            make_directory(&directory)?;
        }
        let group = Self { directory };
        if group.populated()? {
            return Err(EngineError::system(
                format!("make the cgroup {}", group.directory.display()),
                io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "it exists and has processes; choose another linux.cgroupsPath",
                ),
            ));
        }
        Ok(group)
    }

    /// The group's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory as a descriptor, for clone3(2).
    pub fn open(&self) -> Result<File, EngineError> {
        File::open(&self.directory).map_err(|error| self.failed("open", "", error))
    }

    fn failed(&self, what: &str, file: &str, error: io::Error) -> EngineError {
        EngineError::system(
            format!("{what} {}", self.directory.join(file).display()),
            error,
        )
    }

    /// Reads a file of the group.
    pub fn read(&self, file: &str) -> Result<String, EngineError> {
        read_bounded(&self.directory.join(file)).map_err(|error| self.failed("read", file, error))
    }

    /// Applies limits; what is not set stays as it is.
    ///
    /// # Errors
    /// Names the field of the spec whose limit the kernel refused.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), EngineError> {
        let check = resources.memory.as_ref().is_some_and(|memory| {
            memory.check_before_update == Some(true) && memory.limit.is_some_and(|limit| limit > 0)
        });
        if check {
            let limit = resources.memory.as_ref().and_then(|memory| memory.limit);
            let used = self.number("memory.current")?;
            if limit.is_some_and(|limit| used > limit.unsigned_abs()) {
                return Err(EngineError::resource(
                    "linux.resources.memory.limit",
                    io::Error::other(format!("{used} bytes are in use, more than the limit")),
                ));
            }
        }
        for setting in settings::plan(resources)? {
            let path = self.directory.join(&setting.file);
            if let Err(error) = write_file(&path, &setting.value) {
                if setting.optional && error.kind() == io::ErrorKind::NotFound {
                    continue;
                }
                return Err(EngineError::resource(
                    &setting.field,
                    io::Error::new(
                        error.kind(),
                        format!("write {:?} to {}: {error}", setting.value, path.display()),
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Restricts which devices the group's processes can open and make.
    ///
    /// # Errors
    /// If the kernel refuses the program.
    pub fn restrict_devices(&self, resources: Option<&LinuxResources>) -> Result<(), EngineError> {
        let listed = resources.map_or(&[][..], |resources| &resources.devices);
        let rules = devices::Rule::resolve(listed)?;
        devices::attach(self.open()?.as_fd(), &devices::program(&rules))
            .map_err(|error| EngineError::resource("linux.resources.devices", error))
    }

    /// The processes of the group and of the groups below it.
    pub fn processes(&self) -> Result<Vec<i32>, EngineError> {
        let mut all = Vec::new();
        for directory in tree(&self.directory) {
            match read_bounded(&directory.join("cgroup.procs")) {
                Ok(list) => all.extend(list.lines().filter_map(|line| line.parse::<i32>().ok())),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(self.failed("read", "cgroup.procs", error)),
            }
        }
        Ok(all)
    }

    /// Whether any process is alive in the group or below.
    pub fn populated(&self) -> Result<bool, EngineError> {
        match read_bounded(&self.directory.join("cgroup.events")) {
            Ok(events) => Ok(events.lines().any(|line| line == "populated 1")),
            Err(error) if gone(&error) => Ok(false),
            Err(error) => Err(self.failed("read", "cgroup.events", error)),
        }
    }

    /// Sends SIGKILL to everything in the group and below, at once.
    pub fn kill(&self) -> Result<(), EngineError> {
        match write_file(&self.directory.join("cgroup.kill"), "1") {
            Err(error) if !gone(&error) => Err(self.failed("write", "cgroup.kill", error)),
            _ => Ok(()),
        }
    }

    /// Freezes the group and those below it, or lets them go on, and waits until that is so. A group that is gone is not an error.
    ///
    /// # Errors
    /// If it is not so after 10 seconds.
    pub fn freeze(&self, frozen: bool) -> Result<(), EngineError> {
        let (value, wanted) = if frozen {
            ("1", "frozen 1")
        } else {
            ("0", "frozen 0")
        };
        match write_file(&self.directory.join("cgroup.freeze"), value) {
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(self.failed("write", "cgroup.freeze", error)),
            Ok(()) => {}
        }
        let end = Instant::now() + FREEZE_TIMEOUT;
        loop {
            match read_bounded(&self.directory.join("cgroup.events")) {
                Ok(events) if events.lines().any(|line| line == wanted) => return Ok(()),
                Err(error) if gone(&error) => return Ok(()),
                Err(error) => return Err(self.failed("read", "cgroup.events", error)),
                Ok(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                Ok(_) => {
                    let error = io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("a process hangs in the kernel: no {wanted:?} after 10 seconds"),
                    );
                    return Err(self.failed("freeze", "", error));
                }
            }
        }
    }

    /// Kills what is left, waits until it has ended, and removes the group and those below it.
    ///
    /// A group that is gone is not an error.
    ///
    /// # Errors
    /// If processes are left after 20 seconds (they hang in the kernel), or a directory cannot be removed.
    pub fn remove(&self) -> Result<(), EngineError> {
        let end = Instant::now() + KILL_TIMEOUT;
        let mut pause = Duration::from_millis(1);
        while self.populated()? {
            // Again each time: a process may have been on its way into the group.
            self.kill()?;
            if Instant::now() > end {
                return Err(self.failed(
                    "empty",
                    "",
                    io::Error::new(
                        io::ErrorKind::TimedOut,
                        "processes are left 20 seconds after SIGKILL",
                    ),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        for directory in tree(&self.directory).iter().rev() {
            loop {
                match fs::remove_dir(directory) {
                    Ok(()) => break,
                    Err(error) if gone(&error) => break,
                    // The last process is out of the count a moment before it is out of the group.
                    Err(error)
                        if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end =>
                    {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    Err(error) => return Err(self.failed("remove", "", error)),
                }
            }
        }
        Ok(())
    }
}

/// Whether a group, or its last process, vanished under us.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// A group and all below it, parents first.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut all = vec![directory.to_owned()];
    let mut at = 0;
    // A container can make groups; the bound keeps a hostile one from filling the agent's memory.
    while at < all.len() && all.len() < 65536 {
        if let Ok(entries) = fs::read_dir(&all[at]) {
            let below = entries
                .filter_map(Result::ok)
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            all.extend(below.map(|entry| entry.path()));
        }
        at += 1;
    }
    all
}

fn make_directory(directory: &Path) -> Result<(), EngineError> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(EngineError::system(
            format!("make the cgroup {}", directory.display()),
            error,
        )),
        _ => Ok(()),
    }
}

/// Enables the controllers for the groups below `directory`. One that the kernel does not have, or that the group
/// above does not give, shows later, as the error of the limit that needed it.
fn enable_controllers(directory: &Path) {
    let Ok(available) = read_bounded(&directory.join("cgroup.controllers")) else {
        return;
    };
    let file = directory.join("cgroup.subtree_control");
    let enabled = read_bounded(&file).unwrap_or_default();
    for controller in available.split_whitespace() {
        let wanted = CONTROLLERS.contains(&controller);
        if wanted && !enabled.split_whitespace().any(|one| one == controller) {
            let _ = write_file(&file, &format!("+{controller}"));
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    // Most of these files fit, and are read by one call and not by many of a growing size.
    let mut text = String::with_capacity(4096);
    File::open(path)?
        .take(MAX_FILE)
        .read_to_string(&mut text)
        .map(|_| text)
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_hierarchy() {
        for good in ["", "/a/b", "a", "/kubepods/pod-1:x"] {
            check_path(good).unwrap();
        }
        for bad in ["..", "/a/../b", "/", "//", "a\nb", "a\0", "./a"] {
            assert!(check_path(bad).is_err(), "{bad:?}");
        }
    }
}
