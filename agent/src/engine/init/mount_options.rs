//! Mount options (config.md, "Linux mount options").

use std::collections::BTreeSet;

use nix::mount::MsFlags;

/// What the options of one mount say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// `bind` or `rbind`.
    pub bind: bool,
    /// `rbind`: with the mounts below.
    pub bind_recursive: bool,
    /// `remount`: only change the attributes of what is there.
    pub remount: bool,
    /// Attributes (`MOUNT_ATTR_*`) of the mount.
    pub attributes: Attributes,
    /// Attributes of the mount and of all below it.
    pub recursive: Attributes,
    /// Propagation changes, in order.
    pub propagation: Vec<MsFlags>,
    /// Parameters for the file system: `key` or `key=value`.
    pub data: Vec<(String, Option<String>)>,
}

/// Attributes for mount_setattr(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// To set.
    pub set: u64,
    /// To clear; clearing comes first.
    pub clear: u64,
}

impl Attributes {
    /// Whether there is nothing to change.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn turn(&mut self, bit: u64, on: bool) {
        if on {
            self.set |= bit;
            self.clear &= !bit;
        } else {
            self.set &= !bit;
            self.clear |= bit;
        }
    }

    /// The access time policy is one field of several bits: it is cleared whole, then set.
    fn access_time(&mut self, policy: u64) {
        self.clear |= libc::MOUNT_ATTR__ATIME;
        self.set = self.set & !libc::MOUNT_ATTR__ATIME | policy;
    }
}

/// The attribute that an option turns on or off.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (libc::MOUNT_ATTR_RDONLY, true),
        "rw" => (libc::MOUNT_ATTR_RDONLY, false),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, true),
        "suid" => (libc::MOUNT_ATTR_NOSUID, false),
        "nodev" => (libc::MOUNT_ATTR_NODEV, true),
        "dev" => (libc::MOUNT_ATTR_NODEV, false),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, true),
        "exec" => (libc::MOUNT_ATTR_NOEXEC, false),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, true),
        "diratime" => (libc::MOUNT_ATTR_NODIRATIME, false),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, true),
        "symfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, false),
        _ => return None,
    })
}

/// The access time policy that an option names.
fn access_time(option: &str) -> Option<u64> {
    Some(match option {
        "relatime" | "atime" | "nostrictatime" => libc::MOUNT_ATTR_RELATIME,
        "noatime" => libc::MOUNT_ATTR_NOATIME,
        "strictatime" | "norelatime" => libc::MOUNT_ATTR_STRICTATIME,
        _ => return None,
    })
}

/// A propagation by its name; empty is none.
///
/// # Errors
/// If it is not one.
pub(crate) fn propagation(name: &str) -> Result<Option<MsFlags>, String> {
    let (recursive, base) = match name {
        "" => return Ok(None),
        "rshared" | "rprivate" | "rslave" | "runbindable" => (MsFlags::MS_REC, &name[1..]),
        _ => (MsFlags::empty(), name),
    };
    let kind = match base {
        "shared" => MsFlags::MS_SHARED,
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return Err(format!("{name:?} is not a propagation")),
    };
    Ok(Some(kind | recursive))
}

impl Options {
    /// Reads the options of one mount.
    ///
    /// # Errors
    /// Names an option that is not supported, or one that is malformed.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let mut out = Self::default();
        let mut keys = BTreeSet::new();
        for option in options {
            let option = option.as_str();
            if option.contains('\0') || option.len() > 4095 {
                return Err(format!("{option:?} is not a mount option"));
            }
            if let Some((bit, on)) = attribute(option) {
                out.attributes.turn(bit, on);
            } else if let Some(policy) = access_time(option) {
                out.attributes.access_time(policy);
            } else if let Ok(Some(kind)) = propagation(option) {
                out.propagation.push(kind);
            } else if let Some((bit, on)) = option.strip_prefix('r').and_then(attribute) {
                out.recursive.turn(bit, on);
            } else if let Some(policy) = option.strip_prefix('r').and_then(access_time) {
                out.recursive.access_time(policy);
            } else {
                match option {
                    "" | "defaults" => {}
                    "bind" => out.bind = true,
                    "rbind" => (out.bind, out.bind_recursive) = (true, true),
                    "remount" => out.remount = true,
                    "tmpcopyup" | "idmap" | "ridmap" | "copy-symlink" => {
                        return Err(format!("{option} is not supported; leave it out"));
                    }
                    _ => {
                        let (key, value) = match option.split_once('=') {
                            Some((key, value)) => (key, Some(value.to_owned())),
                            None => (option, None),
                        };
                        if key.is_empty() || !keys.insert(key) {
                            return Err(format!("{option:?} is empty or appears twice"));
                        }
                        out.data.push((key.to_owned(), value));
                    }
                }
            }
        }
        if out.bind
            && let Some((key, _)) = out.data.first()
        {
            return Err(format!("{key:?} is not an option of a bind mount"));
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Options, String> {
        Options::parse(
            &options
                .iter()
                .map(|&one| one.to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn flags_data_and_propagation_are_told_apart() {
        let options = parse(&[
            "nosuid",
            "noexec",
            "mode=755",
            "size=64k",
            "rslave",
            "ro",
            "newinstance",
        ])
        .unwrap();
        assert_eq!(
            options.attributes.set,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY
        );
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("64k".to_owned())),
                ("newinstance".to_owned(), None),
            ]
        );
        assert_eq!(options.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC]);
        assert!(!options.bind);
    }

    #[test]
    fn the_last_of_opposites_wins() {
        let options = parse(&["rbind", "ro", "rw"]).unwrap();
        assert!(options.bind && options.bind_recursive);
        assert_eq!(options.attributes.set, 0);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn recursive_options_are_apart_from_plain_ones() {
        let options = parse(&["rbind", "rro", "rnosuid", "rnoatime"]).unwrap();
        assert!(options.attributes.is_empty());
        assert_eq!(
            options.recursive.set,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOATIME
        );
        assert_eq!(options.recursive.clear, libc::MOUNT_ATTR__ATIME);
        // "relatime" begins with an r and is no recursive option.
        assert!(parse(&["relatime"]).unwrap().recursive.is_empty());
    }

    #[test]
    fn access_time_policies_replace_each_other() {
        let options = parse(&["noatime", "strictatime"]).unwrap();
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR__ATIME);
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for bad in [
            &["tmpcopyup"][..],
            &["idmap"],
            &["=x"],
            &["mode=1", "mode=2"],
            &["bind", "size=1"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
