//! The mounts of a spec (config.md, "Mounts"), and paths that are hidden or protected.
//!
//! Every mount is made detached, gets all of its attributes, and only then appears at its place: there is no
//! moment at which a read-only mount can be written. Its place is a descriptor, not a path, so that a link put
//! there meanwhile changes nothing.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::mount_options::{Attributes, Options};
use super::resolve::Tree;
use super::{During, Step};
use crate::engine::spec::Mount;
use crate::engine::sys::{self, NewFileSystem};

/// What mounts need to know of the container.
pub(super) struct Context<'a> {
    /// Its control group's directory in the agent's hierarchy.
    pub cgroup: &'a Path,
    /// Whether it has a cgroup namespace.
    pub cgroup_namespace: bool,
}

/// Makes one mount, of `source` if that was opened before; hands back a tmpfs that is to become read-only once everything in it is made.
pub(super) fn make(
    tree: &Tree,
    mount: &Mount,
    source: Option<OwnedFd>,
    context: &Context<'_>,
) -> Result<Option<OwnedFd>, Step> {
    let what = || format!("mount {}", mount.destination);
    let mut options =
        Options::parse(&mount.options).map_err(|reason| Step::other(what(), reason))?;
    if options.remount {
        let place = tree.open(&mount.destination, OFlag::O_PATH).during(what)?;
        change(&place, options.attributes, false).during(what)?;
        change(&place, options.recursive, true).during(what)?;
        propagate(&place, &options).during(what)?;
        return Ok(None);
    }
    let mut late = false;
    let detached = if let Some(source) = source {
        source
    } else if options.bind || mount.kind == "bind" {
        if !mount.source.starts_with('/') {
            return Err(Step::other(
                what(),
                format!("its source {:?} is not an absolute path", mount.source),
            ));
        }
        let source = c_string(&mount.source).during(what)?;
        sys::clone_tree(AT_FDCWD, &source, options.bind_recursive)
            .during(|| format!("{} from {}", what(), mount.source))?
    } else if matches!(mount.kind.as_str(), "cgroup" | "cgroup2") {
        if context.cgroup_namespace {
            file_system("cgroup2", "cgroup", &options.data).during(what)?
        } else {
            // Without a view of its own the container sees its own group and nothing above.
            let group = c_string(&context.cgroup.to_string_lossy()).during(what)?;
            sys::clone_tree(AT_FDCWD, &group, false).during(what)?
        }
    } else if mount.kind.is_empty() || mount.kind == "none" {
        return Err(Step::other(what(), "it has no type and is no bind mount"));
    } else {
        late = mount.kind == "tmpfs" && options.attributes.set & libc::MOUNT_ATTR_RDONLY != 0;
        if late {
            options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
        }
        file_system(&mount.kind, &mount.source, &options.data).during(what)?
    };
    change(&detached, options.attributes, false).during(what)?;
    change(&detached, options.recursive, true).during(what)?;
    let place = place(tree, mount, &detached).during(what)?;
    sys::attach(detached.as_fd(), place.as_fd()).during(what)?;
    propagate(&detached, &options).during(what)?;
    Ok(late.then_some(detached))
}

/// Where a mount goes: a directory or a file, like what is mounted, made if it is missing.
fn place(tree: &Tree, mount: &Mount, detached: &OwnedFd) -> io::Result<OwnedFd> {
    let directory = is_directory(detached)?;
    if mount
        .destination
        .split('/')
        .all(|part| matches!(part, "" | "."))
    {
        return Err(io::Error::other("the root cannot be mounted over"));
    }
    // An image that makes one of these a link would have the kernel's files elsewhere, unmasked.
    if matches!(mount.kind.as_str(), "proc" | "sysfs") {
        let place = tree.directory(&mount.destination)?;
        drop(place);
        return tree
            .open_without_links(&mount.destination, OFlag::O_PATH)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ELOOP) => io::Error::other("a link in the image is in the way"),
                _ => error,
            });
    }
    if directory {
        tree.directory(&mount.destination)
    } else {
        tree.file(&mount.destination)
    }
}

fn is_directory(descriptor: &OwnedFd) -> io::Result<bool> {
    let kind = SFlag::from_bits_truncate(fstat(descriptor)?.st_mode & SFlag::S_IFMT.bits());
    Ok(kind == SFlag::S_IFDIR)
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from(Errno::EINVAL))
}

/// A detached mount of a new file system.
fn file_system(kind: &str, source: &str, data: &[(String, Option<String>)]) -> io::Result<OwnedFd> {
    let new =
        NewFileSystem::open(&c_string(kind)?).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => {
                io::Error::other(format!("the kernel has no file system {kind:?}"))
            }
            _ => error,
        })?;
    if !source.is_empty() {
        new.set(c"source", Some(&c_string(source)?))?;
    }
    for (key, value) in data {
        let value = value.as_deref().map(c_string).transpose()?;
        new.set(&c_string(key)?, value.as_deref())
            .map_err(|error| io::Error::new(error.kind(), format!("option {key:?}: {error}")))?;
    }
    new.mount(0)
}

fn change(mount: &impl AsFd, attributes: Attributes, recursive: bool) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let mut change = sys::no_attributes();
    (change.attr_set, change.attr_clr) = (attributes.set, attributes.clear);
    sys::set_attributes(mount.as_fd(), recursive, &change)
}

fn propagate(mount: &impl AsFd, options: &Options) -> io::Result<()> {
    use nix::mount::MsFlags;
    for flags in &options.propagation {
        let recursive = flags.contains(MsFlags::MS_REC);
        let mut change = sys::no_attributes();
        change.propagation = (*flags & !MsFlags::MS_REC).bits();
        sys::set_attributes(mount.as_fd(), recursive, &change)?;
    }
    Ok(())
}

/// Protects a mount from writes.
pub(super) fn make_read_only(mount: &impl AsFd, recursive: bool) -> io::Result<()> {
    change(
        mount,
        Attributes {
            set: libc::MOUNT_ATTR_RDONLY,
            clear: 0,
        },
        recursive,
    )
}

/// Makes paths read-only and hides others; one that does not exist needs no protection.
pub(super) fn protect(tree: &Tree, readonly: &[String], masked: &[String]) -> Result<(), Step> {
    for path in readonly {
        let protect = || -> io::Result<()> {
            let Some(place) = existing(tree, path)? else {
                return Ok(());
            };
            let copy = sys::clone_tree(place.as_fd(), c"", true)?;
            make_read_only(&copy, true)?;
            sys::attach(copy.as_fd(), place.as_fd())
        };
        protect().during(|| format!("make {path} read-only (linux.readonlyPaths)"))?;
    }
    for path in masked {
        let hide = || -> io::Result<()> {
            let Some(place) = existing(tree, path)? else {
                return Ok(());
            };
            let cover = if is_directory(&place)? {
                let empty = file_system("tmpfs", "tmpfs", &[])?;
                make_read_only(&empty, false)?;
                empty
            } else {
                // The agent's: an image's could be anything.
                sys::clone_tree(AT_FDCWD, c"/dev/null", false)?
            };
            sys::attach(cover.as_fd(), place.as_fd())
        };
        hide().during(|| format!("hide {path} (linux.maskedPaths)"))?;
    }
    Ok(())
}

fn existing(tree: &Tree, path: &str) -> io::Result<Option<OwnedFd>> {
    match tree.open(path, OFlag::O_PATH) {
        Ok(place) => Ok(Some(place)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Mode bits as nix wants them.
pub(super) fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits & 0o7777)
}
