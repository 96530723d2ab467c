//! Capability sets (capabilities(7)).

use std::io;

use caisson_proto::CAPABILITIES;
use nix::errno::Errno;

use super::Step;
use crate::engine::spec::{Capabilities, SpecError};

/// The five sets as masks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

fn mask(names: &[String], set: &str) -> Result<u64, SpecError> {
    names.iter().try_fold(0, |mask, name| {
        let number = name
            .strip_prefix("CAP_")
            .and_then(|short| CAPABILITIES.iter().position(|known| *known == short));
        match number {
            Some(number) => Ok(mask | 1 << number),
            None => Err(SpecError::invalid(
                format!("process.capabilities.{set}"),
                format!("{name:?} is not a capability"),
            )),
        }
    })
}

impl Sets {
    /// The sets of a spec.
    ///
    /// # Errors
    /// Names a capability that does not exist, or a set that the kernel could not give.
    pub fn resolve(names: &Capabilities) -> Result<Self, SpecError> {
        let sets = Self {
            bounding: mask(&names.bounding, "bounding")?,
            effective: mask(&names.effective, "effective")?,
            inheritable: mask(&names.inheritable, "inheritable")?,
            permitted: mask(&names.permitted, "permitted")?,
            ambient: mask(&names.ambient, "ambient")?,
        };
        if sets.effective & !sets.permitted != 0 {
            return Err(SpecError::invalid(
                "process.capabilities.effective",
                "has a capability that is not permitted",
            ));
        }
        if sets.ambient & !(sets.permitted & sets.inheritable) != 0 {
            return Err(SpecError::invalid(
                "process.capabilities.ambient",
                "has a capability that is not both permitted and inheritable",
            ));
        }
        Ok(sets)
    }

    /// Takes everything out of the bounding set that is not in this one; needs CAP_SETPCAP.
    pub fn drop_bounding(self) -> Result<(), Step> {
        for number in 0..64u32 {
            if self.bounding & 1 << number == 0 {
                // SAFETY: takes numbers only.
                let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
                if result != 0 {
                    let error = io::Error::last_os_error();
                    // Beyond the last capability the kernel has.
                    if error.raw_os_error() == Some(libc::EINVAL) && number > 0 {
                        return Ok(());
                    }
                    return Err(Step::new("drop process.capabilities.bounding", error));
                }
            }
        }
        Ok(())
    }

    /// Sets the other four sets, as the last step before the program.
    pub fn apply(self) -> Result<(), Step> {
        let failed = |error| Step::new("set process.capabilities", error);
        set(self.effective, self.permitted, self.inheritable).map_err(failed)?;
        // SAFETY: takes numbers only.
        unsafe {
            libc::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_CLEAR_ALL,
                0,
                0,
                0,
            )
        };
        for number in (0..64u64).filter(|number| self.ambient & 1 << number != 0) {
            // SAFETY: takes numbers only.
            let result = unsafe {
                libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    libc::PR_CAP_AMBIENT_RAISE,
                    number,
                    0,
                    0,
                )
            };
            if result != 0 {
                return Err(Step::new(
                    "raise process.capabilities.ambient",
                    io::Error::last_os_error(),
                ));
            }
        }
        Ok(())
    }
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;

fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads a header and two data structs.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}

/// Makes all that is permitted effective again, after a change of user has cleared it.
pub(super) fn raise_permitted() -> Result<(), Step> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 reads a header and writes two data structs.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) };
    if result != 0 {
        return Err(Step::new("read capabilities", io::Error::last_os_error()));
    }
    let permitted = u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32;
    set(permitted, permitted, 0).map_err(|error| Step::new("keep capabilities", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_masks() {
        let names: Capabilities = serde_json::from_str(
            r#"{"bounding":["CAP_CHOWN","CAP_CHECKPOINT_RESTORE"],"permitted":["CAP_KILL"],"effective":["CAP_KILL"]}"#,
        )
        .unwrap();
        let sets = Sets::resolve(&names).unwrap();
        assert_eq!(sets.bounding, 1 | 1 << 40);
        assert_eq!(sets.permitted, 1 << 5);
    }

    #[test]
    fn an_unknown_or_impossible_capability_is_refused() {
        for (json, field) in [
            (r#"{"bounding":["CAP_FLY"]}"#, "bounding"),
            (r#"{"bounding":["CHOWN"]}"#, "bounding"),
            (r#"{"effective":["CAP_KILL"]}"#, "effective"),
            (
                r#"{"permitted":["CAP_KILL"],"ambient":["CAP_KILL"]}"#,
                "ambient",
            ),
        ] {
            let names: Capabilities = serde_json::from_str(json).unwrap();
            let error = Sets::resolve(&names).unwrap_err().to_string();
            assert!(
                error.contains(&format!("process.capabilities.{field}")),
                "{error}"
            );
        }
    }
}
