//! The AppArmor profile of a process (`process.apparmorProfile`).

use std::fs;
use std::io;
use std::path::Path;

use super::{During, Step};

/// Whether the kernel confines by AppArmor.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// Where a process says under which profile its next program runs; the second one, of older kernels, is shared by
/// all security modules.
const ATTRIBUTES: [&str; 2] = ["/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"];

/// Has the next program that this process or its children execute run under a profile; an empty name is none.
///
/// It is said through the agent's own `/proc`, which no image can tamper with, and so before anything is joined.
pub(super) fn on_exec(profile: &str) -> Result<(), Step> {
    if profile.is_empty() {
        return Ok(());
    }
    let what = || format!("set process.apparmorProfile to {profile:?}");
    let enabled = fs::read_to_string(ENABLED).unwrap_or_default();
    if enabled.trim() != "Y" {
        return Err(Step::other(what(), "the kernel has no AppArmor"));
    }
    let place = ATTRIBUTES
        .into_iter()
        .find(|place| Path::new(place).exists())
        .ok_or_else(|| Step::other(what(), "there is no /proc/self/attr"))?;
    fs::write(place, format!("exec {profile}"))
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                io::Error::other("the profile is not loaded; load it with apparmor_parser")
            }
            _ => error,
        })
        .during(what)
}
