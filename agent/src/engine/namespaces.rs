//! User namespaces: a container's own, and a pod's with the namespaces that it owns.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::fstat;
use nix::unistd::{Gid, Uid, fchown};

use super::channel::{Channel, Message};
use super::error::EngineError;
use super::launch::{Launched, launch};
use super::plan::Plan;
use super::prepare::{PREPARE_TIME, receive};
use super::spec::{IdMapping, Linux, NamespaceKind};
use super::{Stdio, cgroup::Cgroup};

/// The ID of whoever has none (`kernel.overflowuid`).
const NOBODY: u32 = 65_534;

/// The user namespace of a container.
#[derive(Debug)]
pub(crate) struct UserNamespace {
    file: OwnedFd,
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl UserNamespace {
    /// The one that a container gets: a new one with its mappings, or the one to join.
    pub fn of(linux: &Linux) -> Result<Option<Self>, EngineError> {
        let Some(namespace) = linux
            .namespaces
            .iter()
            .find(|namespace| namespace.kind == NamespaceKind::User)
        else {
            return Ok(None);
        };
        let (uids, gids) = (linux.uid_mappings.clone(), linux.gid_mappings.clone());
        let path = &namespace.path;
        let file = if path.is_empty() {
            let holder = Holder::start(false)?;
            holder.map(&uids, &gids)?;
            File::open(holder.path("user"))
                .map_err(|error| EngineError::system("open a new user namespace", error))?
        } else {
            File::open(path).map_err(|error| {
                EngineError::system(format!("open the user namespace {path}"), error)
            })?
        };
        Ok(Some(Self {
            file: file.into(),
            uids,
            gids,
        }))
    }

    /// User and group of its root outside, as far as the spec says.
    fn root(&self) -> Option<(Uid, Gid)> {
        let root = |mappings: &[IdMapping]| {
            mappings
                .iter()
                .find(|mapping| mapping.container_id == 0 && mapping.size > 0)
                .map(|mapping| mapping.host_id)
        };
        Some((
            Uid::from_raw(root(&self.uids)?),
            Gid::from_raw(root(&self.gids)?),
        ))
    }

    /// Gives a control group to its root, as far as systemd and the like need it.
    pub fn own_cgroup(&self, cgroup: &Cgroup) -> Result<(), EngineError> {
        let Some((uid, gid)) = self.root() else {
            return Ok(());
        };
        for file in [
            "",
            "cgroup.procs",
            "cgroup.threads",
            "cgroup.subtree_control",
        ] {
            let path = cgroup.directory().join(file);
            nix::unistd::chown(&path, Some(uid), Some(gid)).map_err(|error| {
                EngineError::system(format!("give away {}", path.display()), error)
            })?;
        }
        Ok(())
    }

    /// Gives pipes to its root, which can then give them to the process's user, and open them anew by `/dev/stdout`.
    pub fn own_streams(&self, stdio: &Stdio) -> Result<(), EngineError> {
        let Some((uid, gid)) = self.root() else {
            return Ok(());
        };
        for stream in [&stdio.stdin, &stdio.stdout, &stdio.stderr]
            .into_iter()
            .flatten()
        {
            fstat(stream)
                .and_then(|status| match status.st_mode & libc::S_IFMT {
                    libc::S_IFIFO => fchown(stream, Some(uid), Some(gid)),
                    _ => Ok(()),
                })
                .map_err(|error| EngineError::system("give away a standard stream", error))?;
        }
        Ok(())
    }

    /// User, group and other groups of a process as they are called in the namespace.
    pub fn inside(&self, (uid, gid, groups): (u32, u32, Vec<u32>)) -> (u32, u32, Vec<u32>) {
        (
            inside(&self.uids, uid),
            inside(&self.gids, gid),
            groups
                .into_iter()
                .map(|gid| inside(&self.gids, gid))
                .collect(),
        )
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn inside(mappings: &[IdMapping], outside: u32) -> u32 {
    mappings
        .iter()
        .find_map(|mapping| {
            let offset = outside.checked_sub(mapping.host_id)?;
            (offset < mapping.size).then(|| mapping.container_id.saturating_add(offset))
        })
        .unwrap_or(NOBODY)
}

/// Makes the namespaces of a pod whose IDs are mapped: `user`, and `net`, `ipc` and `uts`, which it owns. They are bound to
/// files of these names in `directory`. Where the caller's network namespace has a user namespace for its owner, the pod
/// gets these two.
///
/// # Errors
/// If the kernel refuses one, or that owner has other mappings.
pub fn make_pod_namespaces(
    uids: IdMapping,
    gids: IdMapping,
    directory: &Path,
) -> Result<(), EngineError> {
    let holder = Holder::start(true)?;
    holder.map(&[uids], &[gids])?;
    for name in ["user", "net", "ipc", "uts"] {
        let (place, none) = (directory.join(name), None::<&str>);
        let bound = File::create(&place).and_then(|_| {
            let namespace = holder.path(name);
            Ok(mount(
                Some(namespace.as_str()),
                &place,
                none,
                MsFlags::MS_BIND,
                none,
            )?)
        });
        bound.map_err(|error| {
            EngineError::system(
                format!("keep the {name} namespace at {}", place.display()),
                error,
            )
        })?;
    }
    Ok(())
}

/// A process that is in new namespaces, and ends when this is dropped.
struct Holder {
    pid: i32,
    _channel: Channel,
}

impl Holder {
    fn start(pod: bool) -> Result<Self, EngineError> {
        let plan = Plan::Namespaces { pod };
        let Launched { pid, channel } = launch(&plan, &Stdio::default(), None, None)?;
        match receive(&channel, PREPARE_TIME)? {
            Message::Ready(None) => Ok(Self {
                pid,
                _channel: channel,
            }),
            _ => Err(EngineError::Init("no user namespace was made".to_owned())),
        }
    }

    fn path(&self, namespace: &str) -> String {
        format!("/proc/{}/ns/{namespace}", self.pid)
    }

    /// Sets the mappings, which can be done once. Where it was done before, they must be the same.
    fn map(&self, uids: &[IdMapping], gids: &[IdMapping]) -> Result<(), EngineError> {
        for (file, field, wanted) in [
            ("uid_map", "uidMappings", uids),
            ("gid_map", "gidMappings", gids),
        ] {
            let path = format!("/proc/{}/{file}", self.pid);
            let mapped = fs::read_to_string(&path).and_then(|present| {
                if present.trim().is_empty() {
                    let line = |one: &IdMapping| {
                        format!("{} {} {}\n", one.container_id, one.host_id, one.size)
                    };
                    fs::write(&path, wanted.iter().map(line).collect::<String>())
                } else if parse(&present).as_deref() == Some(wanted) {
                    Ok(())
                } else {
                    Err(io::Error::other(
                        "the pod's network belongs to a user namespace with other mappings",
                    ))
                }
            });
            mapped.map_err(|error| EngineError::resource(&format!("linux.{field}"), error))?;
        }
        Ok(())
    }
}

/// Reads a map as the kernel shows it (user_namespaces(7)).
fn parse(text: &str) -> Option<Vec<IdMapping>> {
    text.lines()
        .map(|line| {
            let mut words = line.split_ascii_whitespace().map(str::parse);
            let mut next = || words.next()?.ok();
            Some(IdMapping {
                container_id: next()?,
                host_id: next()?,
                size: next()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_again() {
        let shown = "         0       1000     100000\n    100000    5000000          1\n";
        let mappings = parse(shown).unwrap();
        assert_eq!(mappings[1].host_id, 5_000_000);
        for (outside, expected) in [
            (1000, 0),
            (1033, 33),
            (100_999, 99_999),
            (101_000, NOBODY),
            (5_000_000, 100_000),
            (0, NOBODY),
        ] {
            assert_eq!(inside(&mappings, outside), expected, "{outside}");
        }
        assert!(parse("0 1000\n").is_none());
        assert!(parse("a b c\n").is_none());
    }
}
