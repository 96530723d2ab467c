//! What the process may do with files by their paths, said to the kernel (landlock(7)), which no mistake of the file
//! server and no descriptor that was left open can undo.
//!
//! A rule about `/` holds for what the daemon mounts below it later: the kernel looks for rules on the way from a file
//! up to the root, over mount points. A file that was moved out of its mount on the host, or whose mount went, has no such
//! way, and is refused.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest version of the interface that is used; a kernel with an older one enforces what it knows.
const NEWEST: ABI = ABI::V6;
/// The first version that lets a file be renamed or linked from one directory to another at all.
const OLDEST: u32 = 2;
/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: libc::c_ulong = 1;

/// Confines this thread, and those that it starts: with `serves_files` to files below `/` and without programs and
/// device nodes, otherwise without any file that is not open already. No network and no other process either, where the
/// kernel's version has that. Returns that version; 0 where the kernel has no Landlock that can be used.
///
/// # Errors
/// What the kernel refused; the process must end then.
pub fn confine(serves_files: bool) -> io::Result<u32> {
    let version = version();
    if version < OLDEST {
        return Ok(0);
    }
    let root = match serves_files {
        true => Some(PathFd::new("/").map_err(io::Error::other)?),
        false => None,
    };
    restrict(root).map_err(io::Error::other)?;
    Ok(version)
}

fn restrict(root: Option<PathFd>) -> Result<(), RulesetError> {
    let all = AccessFs::from_all(NEWEST);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    if let Some(root) = root {
        let never = AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev;
        rules = rules.add_rule(PathBeneath::new(root, all & !never))?;
    }
    rules.restrict_self()?;
    Ok(())
}

/// The version of the interface that this kernel has; 0: none, or it is switched off.
fn version() -> u32 {
    // SAFETY: with this flag the kernel takes no structure, and only answers with a number.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            ASK_VERSION,
        )
    };
    u32::try_from(answer).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::process::Command;

    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// Confines a copy of this process and returns what `then` finds there: a bit for each surprise.
    fn confined(serves_files: bool, then: impl FnOnce() -> i32) -> WaitStatus {
        // SAFETY: the child makes system calls and allocates, which glibc's fork allows, and ends at once.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let done = rustix::thread::set_no_new_privs(true).is_ok()
                    && confine(serves_files).is_ok_and(|version| version >= OLDEST);
                let found = if done { then() } else { 64 };
                // SAFETY: ends the child without running what belongs to the parent.
                unsafe { libc::_exit(found) }
            }
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    #[test]
    fn only_what_is_below_the_root_can_be_used() {
        if version() < OLDEST {
            eprintln!("skipped: this kernel has no Landlock that can be used");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("file"), dir.path().join("d/other"));
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(&file, "text").unwrap();
        let mut open = File::open(&file).unwrap();
        let surprises = |ok: &[bool]| -> i32 {
            ok.iter()
                .enumerate()
                .map(|(i, ok)| i32::from(!ok) << i)
                .sum()
        };
        let end = confined(true, || {
            surprises(&[
                fs::read_to_string(&file).is_ok(),
                fs::rename(&file, &other).is_ok(),
                fs::hard_link(&other, &file).is_ok(),
                Command::new("/bin/true").status().is_err(),
            ])
        });
        assert!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
        let end = confined(false, || {
            let mut text = String::new();
            surprises(&[
                fs::read_to_string(&file).is_err(),
                fs::read_dir("/").is_err(),
                fs::write(dir.path().join("new"), "").is_err(),
                open.read_to_string(&mut text).is_ok_and(|n| n == 4),
            ])
        });
        assert!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
    }
}
