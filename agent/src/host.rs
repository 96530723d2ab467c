//! The agent of a pod that runs on the host: a process among others, which makes itself a small system of its own
//! and changes nothing outside of it.
//!
//! [`enter`] leaves the host's mount and cgroup namespaces, and the network, IPC and UTS namespaces as the pod asks.
//! The root becomes an empty tmpfs with what the engine needs; the host's files are out of sight, and out of the
//! pod's mount namespace, but for the mounts that a container is given (see `engine::paths::HOST`). All of it goes when the last
//! process of the pod ends.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};

use crate::boot::{self, BootError, step};
use crate::log::{self, Level};
use crate::{engine, loopback, paths};

/// Controllers without which a pod's limits and figures would not hold.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The most bytes of the host's hosts file.
const MAX_HOSTS: u64 = 64 << 10;
/// The agent's program, in the new root: read-only, so that no container can change the host's.
const PROGRAM: &str = "/caisson-agent";
/// Image layers, in the new root.
const IMAGES: &str = "/run/caisson/images";
/// The agent's own cgroup, beside the containers'.
const OWN_GROUP: &str = "agent";

/// What the daemon says of the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// An empty directory, on which the new root is mounted.
    pub root: PathBuf,
    /// The host's file with an ext4 file system for writable layers.
    pub scratch: PathBuf,
    /// The host's directory of EROFS layers.
    pub images: PathBuf,
    /// The network namespace.
    pub network: Network,
    /// Whether the pod has an IPC namespace of its own.
    pub own_ipc: bool,
    /// Whether the pod has a hostname of its own.
    pub own_uts: bool,
}

/// A pod's network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The host's.
    #[default]
    Host,
    /// A new one with a loopback device.
    New,
    /// One that is there, and configured.
    Join(PathBuf),
}

/// What of the host the pod does not share.
#[derive(Clone, Debug)]
pub struct Own {
    /// The network.
    pub network: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// The hostname.
    pub uts: bool,
    /// The host's hosts file, where the network is the host's.
    pub hosts: Option<String>,
}

static OWN: OnceLock<Own> = OnceLock::new();

/// What the pod has for itself, if it runs on the host.
pub fn own() -> Option<&'static Own> {
    OWN.get()
}

impl Options {
    /// Takes in one option of the command line; `None` if it is none of these.
    ///
    /// # Errors
    /// Its value is missing.
    pub fn option<'a>(
        &mut self,
        name: &str,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Option<Result<(), ()>> {
        let mut path = |place: &mut PathBuf| {
            let value = rest
                .next()
                .filter(|value| value.starts_with('/'))
                .ok_or(())?;
            *place = value.into();
            Ok(())
        };
        match name {
            "--host" => Some(path(&mut self.root)),
            "--scratch" => Some(path(&mut self.scratch)),
            "--images" => Some(path(&mut self.images)),
            "--netns" => {
                let mut namespace = PathBuf::new();
                let taken = path(&mut namespace);
                self.network = Network::Join(namespace);
                Some(taken)
            }
            "--new-net" => {
                self.network = Network::New;
                Some(Ok(()))
            }
            "--new-ipc" => {
                self.own_ipc = true;
                Some(Ok(()))
            }
            "--new-uts" => {
                self.own_uts = true;
                Some(Ok(()))
            }
            _ => None,
        }
    }

    /// Whether the pod runs on the host at all.
    pub fn given(&self) -> bool {
        *self != Self::default()
    }

    /// Whether everything is there.
    pub fn complete(&self) -> bool {
        [&self.root, &self.scratch, &self.images]
            .iter()
            .all(|path| path.is_absolute())
    }
}

/// Becomes the agent of a pod on the host. In a process of one thread, in the pod's cgroup, once it listens: paths of
/// the host mean nothing afterwards.
///
/// # Errors
/// The first step that failed, with what it was about. The process must end then.
pub fn enter(options: &Options) -> Result<(), BootError> {
    // Users of containers pass through what is made here, whatever the daemon's mask is.
    umask(Mode::from_bits_truncate(0o022));
    step(check_cgroup(), || {
        format!("use the host's cgroups at {}", paths::CGROUP)
    })?;
    let host = step(File::open("/proc/self/ns/mnt"), || {
        "open the host's mount namespace".into()
    })?;
    let own = leave(options)?;
    step(own_program(&options.root), || {
        format!("prepare the root directory {}", options.root.display())
    })?;
    build_root(options)?;
    step(
        chdir(&options.root)
            .and_then(|()| pivot_root(".", "."))
            .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
            .and_then(|()| chdir("/")),
        || "change the root directory".into(),
    )?;
    // Beside the containers: a cgroup that has processes cannot have controllers for others.
    let group = Path::new(paths::CGROUP).join(OWN_GROUP);
    step(
        fs::create_dir_all(&group)
            .and_then(|()| fs::write(group.join("cgroup.procs"), std::process::id().to_string())),
        || format!("move to the cgroup {}", group.display()),
    )?;
    boot::enable_controllers()?;
    // Both are set once, before anything could have used them.
    let _ = engine::paths::set(engine::paths::Paths {
        program: PROGRAM.into(),
        ..engine::paths::Paths::default()
    });
    let _ = engine::paths::set_host(host.into());
    // A pod on the host can last for years, and nothing bounds its log: what goes well is not told.
    log::set_level(Level::Warn);
    let _ = OWN.set(own);
    Ok(())
}

/// A host with the old cgroups, or a mixture, has no pods of this kind.
fn check_cgroup() -> io::Result<()> {
    let controllers =
        fs::read_to_string(Path::new(paths::CGROUP).join("cgroup.controllers")).unwrap_or_default();
    let missing: Vec<_> = CONTROLLERS
        .into_iter()
        .filter(|wanted| !controllers.split_whitespace().any(|one| one == *wanted))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "there is no cgroup v2 with {}; boot the host with systemd.unified_cgroup_hierarchy=1",
        missing.join(", ")
    )))
}

/// Leaves the namespaces that the pod does not share with the host.
fn leave(options: &Options) -> Result<Own, BootError> {
    let joined = match &options.network {
        Network::Join(path) => Some(step(File::open(path), || {
            format!("open the network namespace {}", path.display())
        })?),
        _ => None,
    };
    let hosts = match options.network {
        Network::Host => Some(host_names()),
        _ => None,
    };
    let mut new = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    new.set(CloneFlags::CLONE_NEWIPC, options.own_ipc);
    new.set(CloneFlags::CLONE_NEWUTS, options.own_uts);
    new.set(CloneFlags::CLONE_NEWNET, options.network == Network::New);
    step(unshare(new), || "leave the host's namespaces".into())?;
    if let Some(namespace) = joined {
        step(setns(namespace, CloneFlags::CLONE_NEWNET), || {
            "join the pod's network namespace".into()
        })?;
    }
    if options.network == Network::New {
        step(loopback::up(), || "bring lo up".into())?;
    }
    Ok(Own {
        network: options.network != Network::Host,
        ipc: options.own_ipc,
        uts: options.own_uts,
        hosts,
    })
}

fn host_names() -> String {
    let mut text = String::new();
    // A host without the file has none to give.
    if let Ok(file) = File::open("/etc/hosts") {
        let _ = file.take(MAX_HOSTS).read_to_string(&mut text);
    }
    text
}

/// Mounts the new root and shows the agent's program in it, read-only.
fn own_program(root: &Path) -> io::Result<()> {
    let none = None::<&str>;
    // From here on nothing that is mounted reaches the host.
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    mount(
        Some("root"),
        root,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755,size=16m"),
    )?;
    let program = fs::read_link("/proc/self/exe")?;
    let (shown, running) = (fs::metadata(&program)?, fs::metadata("/proc/self/exe")?);
    if (shown.dev(), shown.ino()) != (running.dev(), running.ino()) {
        return Err(io::Error::other(format!(
            "{} was replaced meanwhile; try again",
            program.display()
        )));
    }
    let place = root.join(PROGRAM.trim_start_matches('/'));
    File::create(&place)?;
    bind_read_only(&program, &place)
}

/// What the engine needs beside its program.
fn build_root(options: &Options) -> Result<(), BootError> {
    let inside = |path: &str| options.root.join(path.trim_start_matches('/'));
    let directory = |path: &str| {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(inside(path));
        step(made, || format!("make {path} in the new root"))
    };
    for path in [
        "/proc",
        "/sys",
        "/dev",
        "/tmp",
        "/etc",
        paths::SCRATCH,
        IMAGES,
    ] {
        directory(path)?;
    }
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for (kind, path) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", paths::CGROUP),
    ] {
        step(
            mount(
                Some(kind),
                &inside(path),
                Some(kind),
                hardened,
                None::<&str>,
            ),
            || format!("mount {kind} on {path} of the new root"),
        )?;
    }
    step(
        mount(
            Some("/dev"),
            &inside("/dev"),
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        ),
        || "show /dev in the new root".into(),
    )?;
    let (scratch, images) = (&options.scratch, &options.images);
    step(
        engine::mount_scratch(scratch, &inside(paths::SCRATCH)),
        || format!("mount {} in the new root", scratch.display()),
    )?;
    step(bind_read_only(images, &inside(IMAGES)), || {
        format!("show {} in the new root", images.display())
    })
}

fn bind_read_only(source: &Path, place: &Path) -> io::Result<()> {
    let none = None::<&str>;
    mount(Some(source), place, none, MsFlags::MS_BIND, none)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    Ok(mount(none, place, none, flags, none)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Option<Options> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let mut options = Options::default();
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            options.option(word, &mut rest)?.ok()?;
        }
        options.complete().then_some(options)
    }

    #[test]
    fn options_of_the_command_line() {
        let base = ["--host", "/r", "--scratch", "/s", "--images", "/i"];
        let with = |more: &[&str]| parse(&[&base[..], more].concat());
        let plain = with(&[]).unwrap();
        assert_eq!(plain.network, Network::Host);
        assert!(plain.given() && !plain.own_ipc && !plain.own_uts);
        let own = with(&["--netns", "/run/netns/x", "--new-ipc", "--new-uts"]).unwrap();
        assert_eq!(own.network, Network::Join("/run/netns/x".into()));
        assert!(own.own_ipc && own.own_uts);
        assert!(with(&["--netns"]).is_none() && with(&["--netns", "x"]).is_none());
        assert!(parse(&base[..4]).is_none() && with(&["--other"]).is_none());
        assert!(!Options::default().given());
    }
}
