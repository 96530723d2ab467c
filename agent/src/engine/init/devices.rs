//! Device nodes of a container (config-linux.md, "Devices" and "Default Devices").

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{SFlag, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use super::mount_options::Options;
use super::resolve::Tree;
use super::{During, Step, mounts};
use crate::engine::spec::{Device, Mount};
use crate::engine::sys;

/// Nodes every container has: path and minor number of major 1, tty apart.
const DEFAULTS: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links every container has.
const LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Whether the container's `/dev` is its own: a bind-mounted one belongs to somebody who filled it.
pub(super) fn wanted(all: &[Mount]) -> bool {
    !all.iter().any(|mount| {
        mount.destination.trim_end_matches('/') == "/dev"
            && (mount.kind == "bind"
                || Options::parse(&mount.options).is_ok_and(|options| options.bind))
    })
}

/// Makes the default nodes and links, and those of the spec.
pub(super) fn make(tree: &Tree, listed: &[Device], user: bool) -> Result<(), Step> {
    for &(path, major, minor) in DEFAULTS {
        if listed.iter().any(|device| device.path == path) {
            continue;
        }
        let device = Device {
            kind: "c".into(),
            path: path.into(),
            major: Some(major),
            minor: Some(minor),
            file_mode: Some(0o666),
            uid: None,
            gid: None,
        };
        node(tree, &device, user).during(|| format!("make the device {path}"))?;
    }
    for device in listed {
        node(tree, device, user)
            .during(|| format!("make the device {} of linux.devices", device.path))?;
    }
    for (path, target) in LINKS {
        let link = || -> io::Result<()> {
            let (parent, name) = tree.parent(path)?;
            remove(&parent, name)?;
            Ok(symlinkat(*target, &parent, name)?)
        };
        link().during(|| format!("make the link {path}"))?;
    }
    Ok(())
}

/// Removes what an image has in a node's place.
fn remove(parent: &impl AsFd, name: &str) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EISDIR) => Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?),
        Err(error) => Err(error.into()),
    }
}

/// Where the agent has this device: at the same path, or where the kernel has made it.
fn find(device: &Device) -> io::Result<String> {
    let (class, kind) = match device.kind.as_str() {
        "b" => ("block", libc::S_IFBLK),
        _ => ("char", libc::S_IFCHR),
    };
    let (major, minor) = (device.major.unwrap_or(0), device.minor.unwrap_or(0));
    let is_there = |path: &str| {
        fs::symlink_metadata(path).is_ok_and(|found| {
            found.mode() & libc::S_IFMT == kind
                && found.rdev() == makedev(major.into(), minor.into())
        })
    };
    if is_there(&device.path) {
        return Ok(device.path.clone());
    }
    let event = fs::read_to_string(format!("/sys/dev/{class}/{major}:{minor}/uevent"));
    event
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .map(|name| format!("/dev/{name}"))
        .filter(|path| is_there(path))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no {class} device {major}:{minor} in /dev"),
            )
        })
}

fn node(tree: &Tree, device: &Device, user: bool) -> io::Result<()> {
    let (parent, name) = tree.parent(&device.path)?;
    remove(&parent, name)?;
    // A user namespace cannot make nodes, and can have the guest's.
    if user && device.kind != "p" {
        let source = std::ffi::CString::new(find(device)?)?;
        let node = sys::clone_tree(AT_FDCWD, &source, false)?;
        let place = tree.file(&device.path)?;
        return sys::attach(node.as_fd(), place.as_fd());
    }
    let kind = match device.kind.as_str() {
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    };
    let number = makedev(
        device.major.unwrap_or(0).into(),
        device.minor.unwrap_or(0).into(),
    );
    let mode = mounts::mode(device.file_mode.unwrap_or(0o666));
    mknodat(&parent, name, kind, mode, number)?;
    fchownat(
        &parent,
        name,
        Some(Uid::from_raw(device.uid.unwrap_or(0))),
        Some(Gid::from_raw(device.gid.unwrap_or(0))),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    // The change of owner takes set-id bits away, nothing else; those make no sense on a device.
    tree.open(&device.path, OFlag::O_PATH).map(drop)
}
