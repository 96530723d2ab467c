//! What a container on the host can have, and one in a microVM cannot: devices and AppArmor profiles of the host.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use caisson_proto::cri;
use cri::NamespaceMode;
use cri::security_profile::ProfileType;
use serde_json::{Value, json};

use super::super::CriError;
use super::userns::user_ids;

/// The most devices of one container: more than any host has.
const MAX_DEVICES: usize = 8192;
/// What a container has of its own in /dev.
const OWN: [&str; 6] = ["pts", "shm", "fd", "mqueue", "console", "ptmx"];

/// What a spec for the host needs beside the request.
#[derive(Clone, Debug, Default)]
pub struct HostPod {
    /// The namespaces that the pod asked for.
    pub namespaces: cri::NamespaceOption,
    /// The devices that the container gets.
    pub devices: Vec<HostDevice>,
    /// The AppArmor profile that it runs under; empty: none.
    pub apparmor: String,
}

/// A device of the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostDevice {
    /// Its path in the container.
    path: String,
    block: bool,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Of "rwm".
    access: String,
}

impl HostDevice {
    /// An entry of `linux.devices`.
    pub fn node(&self) -> Value {
        json!({
            "path": self.path,
            "type": self.kind(),
            "major": self.major,
            "minor": self.minor,
            "fileMode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
        })
    }

    /// An entry of `linux.resources.devices`.
    pub fn rule(&self) -> Value {
        json!({
            "allow": true,
            "type": self.kind(),
            "major": self.major,
            "minor": self.minor,
            "access": self.access,
        })
    }

    fn kind(&self) -> &'static str {
        if self.block { "b" } else { "c" }
    }

    /// The device at `path`; `None` if there is something else.
    fn at(path: &Path, container_path: &str, access: &str) -> io::Result<Option<Self>> {
        let meta = fs::metadata(path)?;
        let kind = meta.file_type();
        if !kind.is_block_device() && !kind.is_char_device() {
            return Ok(None);
        }
        Ok(Some(Self {
            path: container_path.to_owned(),
            block: kind.is_block_device(),
            major: nix::sys::stat::major(meta.rdev()),
            minor: nix::sys::stat::minor(meta.rdev()),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            access: access.to_owned(),
        }))
    }
}

/// Checks that the host can be what this pod asks for.
///
/// # Errors
/// INVALID_ARGUMENT or UNIMPLEMENTED that names the field.
pub fn check_host_pod(config: &cri::PodSandboxConfig) -> Result<(), CriError> {
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let options = security.namespace_options.unwrap_or_default();
    if options.network() == NamespaceMode::Container {
        return Err(CriError::unimplemented(
            "a network namespace for each container of a pod is not supported; ask for POD or NODE",
        ));
    }
    user_ids(&options).map(drop)
}

/// The devices that a container asks for; all of the host's for a privileged one. Blocks.
///
/// # Errors
/// INVALID_ARGUMENT for a path that is no device, nor a directory with devices, or permissions that are not of "rwm".
pub fn devices(config: &cri::ContainerConfig) -> Result<Vec<HostDevice>, CriError> {
    let privileged = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .is_some_and(|security| security.privileged);
    let mut all = Vec::new();
    if privileged {
        let dev = Path::new("/dev");
        collect(dev, dev, "rwm", &mut all).map_err(|e| unusable("/dev", &e))?;
        all.retain(|device| !OWN.iter().any(|name| device.path == format!("/dev/{name}")));
    }
    for asked in &config.devices {
        let (from, to) = (asked.host_path.as_str(), asked.container_path.as_str());
        let plain =
            !asked.permissions.is_empty() && asked.permissions.chars().all(|c| "rwm".contains(c));
        if !from.starts_with('/') || !to.starts_with('/') || !plain {
            return Err(CriError::invalid(format!(
                "the device {from:?} at {to:?} with {:?} is not two absolute paths and permissions of r, w and m",
                asked.permissions
            )));
        }
        let before = all.len();
        let path = Path::new(from);
        let found = HostDevice::at(path, to, &asked.permissions).map_err(|e| unusable(from, &e))?;
        match found {
            Some(device) => all.push(device),
            None if path.is_dir() => {
                collect(path, Path::new(to), &asked.permissions, &mut all)
                    .map_err(|e| unusable(from, &e))?;
            }
            None => {}
        }
        if all.len() == before {
            return Err(CriError::invalid(format!(
                "{from} of the host is no device"
            )));
        }
        // What is asked for by name replaces what a privileged container has anyway.
        let asked: Vec<_> = all[before..]
            .iter()
            .map(|device| device.path.clone())
            .collect();
        let mut number = 0;
        all.retain(|device| {
            number += 1;
            number > before || !asked.contains(&device.path)
        });
    }
    Ok(all)
}

fn unusable(path: &str, error: &io::Error) -> CriError {
    CriError::invalid(format!(
        "the device {path} of the host cannot be used: {error}"
    ))
}

/// All devices in a directory, and in those below.
fn collect(from: &Path, to: &Path, access: &str, all: &mut Vec<HostDevice>) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let place: PathBuf = to.join(entry.file_name());
        let name = entry.file_name();
        if kind.is_dir() {
            if !OWN.iter().any(|own| name == *own) {
                collect(&entry.path(), &place, access, all)?;
            }
        } else if (kind.is_block_device() || kind.is_char_device())
            && let Some(place) = place.to_str()
        {
            all.extend(HostDevice::at(&entry.path(), place, access)?);
        }
        if all.len() > MAX_DEVICES {
            return Err(io::Error::other(format!(
                "there are more than {MAX_DEVICES}"
            )));
        }
    }
    Ok(())
}

/// Which AppArmor profile a container runs under.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AppArmor {
    /// None.
    Unconfined,
    /// The runtime's own; where `asked` is false the client said nothing.
    Default {
        /// Whether it was asked for.
        asked: bool,
    },
    /// One that the node's administrator has loaded.
    Named(String),
}

/// The profile that a container asks for.
///
/// # Errors
/// INVALID_ARGUMENT for a type that is not known, or a local profile without a name.
pub fn apparmor(security: &cri::LinuxContainerSecurityContext) -> Result<AppArmor, CriError> {
    // A local profile's name comes with this before it from some clients.
    let named = |name: &str| match name.strip_prefix("localhost/").unwrap_or(name) {
        "" => Err(CriError::invalid("the AppArmor profile has no name")),
        name => Ok(AppArmor::Named(name.to_owned())),
    };
    let default = |asked| {
        if security.privileged {
            AppArmor::Unconfined
        } else {
            AppArmor::Default { asked }
        }
    };
    if let Some(profile) = &security.apparmor {
        return match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Unconfined) => Ok(AppArmor::Unconfined),
            Ok(ProfileType::RuntimeDefault) => Ok(default(true)),
            Ok(ProfileType::Localhost) => named(&profile.localhost_ref),
            Err(_) => Err(CriError::invalid(format!(
                "the AppArmor profile type {} is not known",
                profile.profile_type
            ))),
        };
    }
    #[allow(deprecated)] // clients of older Kubernetes releases still set it
    match security.apparmor_profile.as_str() {
        "" => Ok(default(false)),
        "unconfined" => Ok(AppArmor::Unconfined),
        "runtime/default" => Ok(default(true)),
        other if other.starts_with("localhost/") => named(other),
        other => Err(CriError::invalid(format!(
            "the AppArmor profile {other} is not known; use runtime/default, unconfined or localhost/NAME"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    fn asked(host: &str, container: &str, permissions: &str) -> cri::ContainerConfig {
        cri::ContainerConfig {
            devices: vec![cri::Device {
                container_path: container.into(),
                host_path: host.into(),
                permissions: permissions.into(),
            }],
            ..config()
        }
    }

    #[test]
    fn devices_are_what_the_host_has() {
        let found = devices(&asked("/dev/null", "/dev/x", "rw")).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].node()["path"], "/dev/x");
        assert_eq!(
            found[0].rule(),
            json!({ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" })
        );
        for (host, container, permissions) in [
            ("/etc/passwd", "/dev/x", "rw"),
            ("/nonexistent", "/dev/x", "rw"),
            ("/dev/null", "x", "rw"),
            ("/dev/null", "/dev/x", "rx"),
            ("/dev/null", "/dev/x", ""),
        ] {
            assert!(
                devices(&asked(host, container, permissions)).is_err(),
                "{host}"
            );
        }
    }

    #[test]
    fn a_privileged_container_has_all_devices_once() {
        let mut config = asked("/dev/null", "/dev/null", "r");
        config.linux = Some(cri::LinuxContainerConfig {
            security_context: Some(cri::LinuxContainerSecurityContext {
                privileged: true,
                ..Default::default()
            }),
            ..Default::default()
        });
        let found = devices(&config).unwrap();
        let null: Vec<_> = found.iter().filter(|d| d.path == "/dev/null").collect();
        assert_eq!(null.len(), 1);
        assert_eq!(null[0].access, "r");
        assert!(found.iter().any(|device| device.path == "/dev/zero"));
        assert!(
            !found
                .iter()
                .any(|device| device.path.starts_with("/dev/pts/"))
        );
    }

    #[test]
    fn apparmor_profiles() {
        let of = |kind: ProfileType, name: &str| cri::LinuxContainerSecurityContext {
            apparmor: Some(cri::SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: name.into(),
            }),
            ..Default::default()
        };
        let is = |security, wanted| assert_eq!(apparmor(&security).unwrap(), wanted);
        is(of(ProfileType::Unconfined, ""), AppArmor::Unconfined);
        is(
            of(ProfileType::RuntimeDefault, ""),
            AppArmor::Default { asked: true },
        );
        is(
            of(ProfileType::Localhost, "localhost/p"),
            AppArmor::Named("p".into()),
        );
        assert!(apparmor(&of(ProfileType::Localhost, "")).is_err());
        is(Default::default(), AppArmor::Default { asked: false });
        let privileged = cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        is(privileged, AppArmor::Unconfined);
        #[allow(deprecated)]
        let old = |text: &str| cri::LinuxContainerSecurityContext {
            apparmor_profile: text.into(),
            ..Default::default()
        };
        is(old("localhost/p"), AppArmor::Named("p".into()));
        is(old("unconfined"), AppArmor::Unconfined);
        assert!(apparmor(&old("p")).is_err());
    }
}
