//! The disk of a pod's writable layers: a sparse file with an empty ext4 file system; of the usual size it is copied from
//! one that is made once.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// The smallest scratch disk: below it an ext4 file system is mostly its own tables.
const MIN_BYTES: u64 = 16 << 20;

/// Disks from this size on have a journal of [`JOURNAL_MIB`]; that of smaller ones is what `mkfs.ext4` finds fit.
const LARGE_BYTES: u64 = 512 << 20;
/// The size of the journal in MiB: enough that it is seldom waited for, as it all may come to be on the node's disk.
const JOURNAL_MIB: u32 = 16;

/// Bytes copied at a time, where this process has to.
const BUFFER: usize = 1 << 20;

/// The size of a scratch disk for so many bytes.
pub fn size(bytes: u64) -> u64 {
    bytes.max(MIN_BYTES)
}

/// Makes a scratch disk of `bytes` at `path`; from a template in `templates`, where that is named.
pub async fn create(templates: Option<PathBuf>, path: PathBuf, bytes: u64) -> io::Result<()> {
    let bytes = size(bytes);
    tokio::task::spawn_blocking(move || match templates {
        Some(dir) => copy_sparse(&template(&dir, bytes)?, &path),
        None => {
            fs::File::create(&path)?.set_len(bytes)?;
            make_file_system(&path, bytes)
        }
    })
    .await?
}

/// The empty file system of this size, made now if it is not there.
fn template(data_dir: &Path, bytes: u64) -> io::Result<PathBuf> {
    let dir = data_dir.join("scratch");
    let path = dir.join(format!("{bytes}.journal.ext4"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&dir)?;
    let new = tempfile::Builder::new().prefix("new-").tempfile_in(&dir)?;
    new.as_file().set_len(bytes)?;
    make_file_system(new.path(), bytes)?;
    new.as_file().sync_all()?;
    new.persist(&path).map_err(|e| e.error)?;
    // That of a release whose disks had no journal.
    let _ = fs::remove_file(dir.join(format!("{bytes}.ext4")));
    Ok(path)
}

fn make_file_system(disk: &Path, bytes: u64) -> io::Result<()> {
    let mut mkfs = Command::new("mkfs.ext4");
    // A scratch disk dies with its pod, so nobody will look for what a checksum tells. It has a journal all the same, which
    // the guest never makes anything wait for (its options are the agent's): without one ext4 does not use the inode of a
    // deleted file again for minutes, and steps over each of them whenever it makes a file.
    mkfs.args([
        "-q",
        "-F",
        "-m",
        "0",
        "-O",
        "has_journal,^metadata_csum,uninit_bg",
    ]);
    // Inode tables and the journal stay holes until they are used, which of the tables takes uninit_bg.
    let extended = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0";
    mkfs.args(["-E", extended]);
    if bytes >= LARGE_BYTES {
        mkfs.args(["-J", &format!("size={JOURNAL_MIB}")]);
    }
    let output = mkfs
        .arg(disk)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .map_err(|e| {
            io::Error::other(format!("mkfs.ext4 (package e2fsprogs) cannot be run: {e}"))
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!(
            "mkfs.ext4 failed: {}",
            said.trim()
        )));
    }
    Ok(())
}

/// Copies a file's data and leaves its holes holes.
///
/// # Errors
/// What the system says.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = fs::File::open(from)?;
    let target = fs::File::create(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at: i64 = 0;
    loop {
        let start = match lseek64(source.as_fd(), at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = lseek64(source.as_fd(), start, Whence::SeekHole)?;
        copy_range(&source, &target, start as u64..end as u64)?;
        at = end;
    }
}

/// The kernel copies where it can, which may cost nothing; not from one kind of file system to another.
fn copy_range(source: &fs::File, target: &fs::File, range: Range<u64>) -> io::Result<()> {
    let (mut read, mut write) = (range.start as i64, range.start as i64);
    while (read as u64) < range.end {
        let left = usize::try_from(range.end - read as u64).map_err(io::Error::other)?;
        let copied = nix::fcntl::copy_file_range(
            source.as_fd(),
            Some(&mut read),
            target.as_fd(),
            Some(&mut write),
            left,
        );
        match copied {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return copy_bytes(source, target, read as u64..range.end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(source: &fs::File, target: &fs::File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    for at in range.clone().step_by(BUFFER) {
        let count = (range.end - at).min(BUFFER as u64) as usize;
        source.read_exact_at(&mut buffer[..count], at)?;
        target.write_all_at(&buffer[..count], at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = fs::File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(b"tail", (32 << 20) + 5).unwrap();
        copy_sparse(&from, &to).unwrap();
        let again = fs::File::create(dir.path().join("c")).unwrap();
        copy_bytes(&fs::File::open(&to).unwrap(), &again, 0..(33 << 20)).unwrap();
        assert_eq!(again.metadata().unwrap().len(), 33 << 20);
        let copy = fs::File::open(&to).unwrap();
        let mut four = [0; 4];
        copy.read_exact_at(&mut four, (32 << 20) + 5).unwrap();
        assert_eq!(&four, b"tail");
        let meta = copy.metadata().unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    }

    /// Whether the file system of a disk has a journal, and no checksums (fs/ext4/ext4.h, struct ext4_super_block).
    fn has_journal(disk: &Path) -> bool {
        const HAS_JOURNAL: u32 = 0x4;
        const METADATA_CSUM: u32 = 0x400;
        let mut superblock = [0; 1024];
        let file = fs::File::open(disk).unwrap();
        file.read_exact_at(&mut superblock, 1024).unwrap();
        let word = |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().unwrap());
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef], "the magic number");
        word(0x5c) & HAS_JOURNAL != 0 && word(0x64) & METADATA_CSUM == 0
    }

    #[tokio::test]
    async fn a_large_disk_takes_little_of_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        create(None, disk.clone(), 8 << 30).await.unwrap();
        assert!(has_journal(&disk));
        let taken = fs::metadata(&disk).unwrap().blocks() * 512;
        assert!(taken < 8 << 20, "{taken} bytes");
    }

    #[tokio::test]
    async fn a_template_without_a_journal_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join(format!("scratch/{MIN_BYTES}.ext4"));
        fs::create_dir(old.parent().unwrap()).unwrap();
        fs::write(&old, "of an older release").unwrap();
        let disk = dir.path().join("disk");
        create(Some(dir.path().to_owned()), disk.clone(), 1)
            .await
            .unwrap();
        assert!(has_journal(&disk) && !old.exists());
    }

    #[tokio::test]
    async fn a_disk_has_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        for (templates, count) in [(None, 0), (Some(dir.path().to_owned()), 1)] {
            create(templates, disk.clone(), 1).await.unwrap();
            assert!(has_journal(&disk));
            assert_eq!(fs::metadata(&disk).unwrap().len(), MIN_BYTES);
            let made = fs::read_dir(dir.path().join("scratch"));
            assert_eq!(made.map_or(0, Iterator::count), count);
        }
    }
}
