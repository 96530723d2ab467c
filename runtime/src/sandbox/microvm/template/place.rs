//! Where templates are: a file system in memory of their own.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Makes the place, unless it is there.
///
/// It is a tmpfs that gives huge pages to who asks for them, which the one that the state directory is on does not: what
/// most clones only read is mapped 2 MiB at a time then.
///
/// # Errors
/// What the system says.
pub fn prepare(place: &Path) -> io::Result<()> {
    if is_mounted(place)? {
        return Ok(());
    }
    // What a daemon has left that kept its templates in the directory itself.
    remove_files(place)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(place)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = |options| mount(Some("caisson"), place, Some("tmpfs"), flags, Some(options));
    match mounted("mode=0700,huge=advise") {
        // A kernel whose tmpfs has no huge pages.
        Err(Errno::EINVAL) => mounted("mode=0700"),
        other => other,
    }?;
    Ok(())
}

/// Removes the place and all templates; clones keep what they have mapped.
///
/// # Errors
/// What the system says.
pub fn remove(place: &Path) -> io::Result<()> {
    if is_mounted(place)? {
        umount2(place, MntFlags::MNT_DETACH)?;
    }
    remove_files(place)
}

fn remove_files(place: &Path) -> io::Result<()> {
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn is_mounted(place: &Path) -> io::Result<bool> {
    let above = place.parent().unwrap_or(place);
    match (fs::metadata(place), fs::metadata(above)) {
        (Ok(here), Ok(above)) => Ok(here.dev() != above.dev()),
        (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_a_mount_made_once_and_removed_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("templates");
        DirBuilder::new().create(&place).unwrap();
        fs::write(place.join("left"), "by another version").unwrap();
        match prepare(&place) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("skipped: this user may not mount");
                return;
            }
            prepared => prepared.unwrap(),
        }
        assert!(!place.join("left").exists());
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
        fs::write(place.join("kept"), "").unwrap();
        prepare(&place).unwrap();
        assert!(place.join("kept").exists());
        remove(&place).unwrap();
        assert!(!place.exists());
        remove(&place).unwrap();
    }
}
