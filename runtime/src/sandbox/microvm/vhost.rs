//! vhost-net: the node's kernel carries the frames of a pod in the place of the pod's process.
//!
//! Each pod has a descriptor of its own, which the daemon opens: what the device may see of a process is decided by who
//! uses it first, and that is the pod's process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Once;

use caisson_vmm_protocol::RateLimit;

use crate::config::VhostNet;

/// The device.
pub const DEVICE: &str = "/dev/vhost-net";

/// The device's number (linux/miscdevice.h: `VHOST_NET_MINOR`), by which an open descriptor of it is known.
pub const NUMBER: (u64, u64) = (10, 238);

/// Tries whether the device can be had.
///
/// # Errors
/// What the system says, with the device's name.
pub fn try_open() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open(DEVICE)
        .map_err(|error| io::Error::new(error.kind(), format!("{DEVICE}: {error}")))
}

/// The device for one pod; `None` where the pod's process carries the frames: the setting says so, there is a limit, which
/// the kernel would not keep to, or the node has no such device. The last is said in the log once.
///
/// # Errors
/// There is none where there must be one.
pub fn open(setting: VhostNet, limit: RateLimit) -> io::Result<Option<OwnedFd>> {
    static SAID: Once = Once::new();
    if setting == VhostNet::Off || limit != RateLimit::default() {
        return Ok(None);
    }
    match try_open() {
        Ok(device) => Ok(Some(device.into())),
        Err(error) if setting == VhostNet::Auto => {
            SAID.call_once(|| {
                tracing::info!(%error, "no vhost-net: pods' processes carry their frames themselves");
            });
            Ok(None)
        }
        Err(error) => Err(io::Error::new(error.kind(), needed(&error))),
    }
}

/// What there is to do where the device must be had and cannot.
pub fn needed(error: &io::Error) -> String {
    format!("{error}; load the kernel module vhost_net, or have microvm.vhost_net be \"auto\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_the_setting_keep_the_kernel_out() {
        let limit = RateLimit {
            bytes: 0,
            operations: 1,
        };
        let none = RateLimit::default();
        assert!(open(VhostNet::Off, none).unwrap().is_none());
        assert!(open(VhostNet::Auto, limit).unwrap().is_none());
        // Whether it is there depends on the machine; what is made of it does not.
        let there = try_open().is_ok();
        assert_eq!(open(VhostNet::Auto, none).unwrap().is_some(), there);
        match open(VhostNet::On, none) {
            Ok(device) => assert!(there && device.is_some()),
            Err(error) => {
                let told = error.to_string();
                assert!(
                    !there && told.contains(DEVICE) && told.contains("vhost_net"),
                    "{told}"
                );
            }
        }
    }
}
