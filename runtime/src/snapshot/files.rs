//! The large files of a snapshot: sparse, and checked without regard to their holes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use caisson_vmm_protocol::Part;
use flate2::Crc;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serde::{Deserialize, Serialize};

use super::{SnapshotError, failed};
use crate::sandbox::pod::scratch::copy_sparse;

/// The name of the guest's memory.
pub const MEMORY: &str = "memory";
/// The name of all else of its machine.
pub const STATE: &str = "state";
/// The name of the disk.
pub const SCRATCH: &str = "scratch.img";

const PAGE: usize = 4096;
static ZEROES: [u8; PAGE] = [0; PAGE];
/// Bytes read at a time: whole pages.
const READ: usize = 1 << 20;
/// The most bytes of a state: what 32 vCPUs need, several times.
pub(super) const MOST_STATE: u64 = 16 << 20;

/// What a file is: enough to notice damage. Who may write the file may write this too, so it is no seal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileCheck {
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of its pages that are not zero, each after its place in little-endian. A copy may have other holes.
    pub crc32: u32,
}

impl FileCheck {
    /// Reads a file.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let mut crc = Crc::new();
        let mut buffer = vec![0; READ];
        let mut at = 0;
        while let Some(start) = next_data(file, at)? {
            at = start - start % PAGE as u64;
            let count = read_up_to(file, &mut buffer, at)?;
            if count == 0 {
                break;
            }
            for (number, page) in buffer[..count].chunks(PAGE).enumerate() {
                if *page != ZEROES[..page.len()] {
                    crc.update(&(at + (number * PAGE) as u64).to_le_bytes());
                    crc.update(page);
                }
            }
            at += count as u64;
        }
        Ok(Self {
            bytes,
            crc32: crc.sum(),
        })
    }
}

/// The next byte that is in no hole, from this one on.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match lseek64(file.as_fd(), at as i64, Whence::SeekData) {
        Ok(start) => Ok(Some(start as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_up_to(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut count = 0;
    while count < into.len() {
        match file.read_at(&mut into[count..], at + count as u64) {
            Ok(0) => break,
            Ok(n) => count += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// Copies a file with its holes.
pub fn copy(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    copy_sparse(from, to).map_err(failed("copy the pod's disk to", to))
}

/// Takes a machine from its pod process, whose word is a guest's where that has broken out: pieces that ascend and end
/// before `most`, and a state of bounded length.
pub fn receive(
    mut from: impl Read,
    most: u64,
    memory: &File,
    state: &File,
) -> Result<(), SnapshotError> {
    let wrong = |what: &str| SnapshotError::Stream(what.to_owned());
    let broken = |error: io::Error| SnapshotError::Stream(error.to_string());
    let full = |source| SnapshotError::File {
        what: "write the snapshot's",
        path: MEMORY.into(),
        source,
    };
    let mut buffer = vec![0; Part::LONGEST as usize];
    let mut end = 0;
    loop {
        let mut head = [0; Part::HEAD];
        from.read_exact(&mut head).map_err(broken)?;
        let part = Part::from_bytes(head);
        if part == Part::END {
            break;
        }
        let bytes = buffer
            .get_mut(..part.length as usize)
            .filter(|bytes| !bytes.is_empty())
            .ok_or_else(|| wrong("a piece of memory is empty or too long"))?;
        let after = part.offset.checked_add(u64::from(part.length));
        let after = after.filter(|after| part.offset >= end && *after <= most);
        end = after.ok_or_else(|| wrong("a piece of memory is not in its place"))?;
        from.read_exact(bytes).map_err(broken)?;
        memory.write_all_at(bytes, part.offset).map_err(full)?;
    }
    let mut text = Vec::new();
    let read = from.take(MOST_STATE + 1).read_to_end(&mut text);
    read.map_err(broken)?;
    if text.len() as u64 > MOST_STATE {
        return Err(wrong("its state is too long"));
    }
    let mut state = state;
    state.write_all(&text).map_err(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(offset: u64, bytes: &[u8]) -> Vec<u8> {
        let head = Part {
            offset,
            length: bytes.len() as u32,
        };
        [&head.to_bytes()[..], bytes].concat()
    }

    fn take(stream: &[u8], most: u64) -> Result<(File, File), SnapshotError> {
        let (memory, state) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        receive(stream, most, &memory, &state)?;
        Ok((memory, state))
    }

    #[test]
    fn a_machine_arrives_in_its_files() {
        let stream = [
            part(4096, &[1; 4096]),
            part(1 << 20, &[2; 8192]),
            Part::END.to_bytes().to_vec(),
            b"{}".to_vec(),
        ]
        .concat();
        let (memory, state) = take(&stream, 2 << 20).unwrap();
        assert_eq!(memory.metadata().unwrap().len(), (1 << 20) + 8192);
        let mut page = [9; 4];
        memory.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page, [0; 4]);
        memory.read_exact_at(&mut page, 8188).unwrap();
        assert_eq!(page, [1; 4]);
        assert_eq!(state.metadata().unwrap().len(), 2);
        // One that breaks off, wherever, is none.
        let end = stream.len() - 2;
        for length in [0, 5, 12, 100, 4108, end - 1] {
            assert!(take(&stream[..length], 2 << 20).is_err(), "{length}");
        }
    }

    #[test]
    fn pieces_that_lie_are_refused() {
        let end = Part::END.to_bytes();
        for pieces in [
            vec![part(8192, &[1; 4096]), part(4096, &[1; 4096])],
            vec![part(4096, &[1; 4096]), part(6144, &[1; 4096])],
            vec![part(1 << 20, &[1; 4096])],
            vec![part(u64::MAX - 5, &[1; 4096])],
            vec![part(4096, &[])],
            vec![part(0, &vec![1; Part::LONGEST as usize + 1])],
        ] {
            let stream = [pieces.concat(), end.to_vec()].concat();
            assert!(take(&stream, 1 << 20).is_err());
        }
        let long = [end.to_vec(), vec![b' '; MOST_STATE as usize + 1]].concat();
        assert!(take(&long, 1 << 20).is_err());
    }

    #[test]
    fn a_check_sees_content_and_no_holes() {
        let (holes, none) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let length = 3 * READ + 1000;
        let mut content = vec![0; length];
        content[READ + 5] = 1;
        content[length - 1] = 2;
        holes.set_len(length as u64).unwrap();
        holes.write_all_at(&[1], READ as u64 + 5).unwrap();
        holes.write_all_at(&[2], length as u64 - 1).unwrap();
        none.write_all_at(&content, 0).unwrap();
        let check = FileCheck::of(&none).unwrap();
        assert_eq!(FileCheck::of(&holes).unwrap(), check);
        // The same bytes elsewhere, one byte more, another one.
        holes.write_all_at(&[0], READ as u64 + 5).unwrap();
        holes.write_all_at(&[1], 5).unwrap();
        assert_ne!(FileCheck::of(&holes).unwrap(), check);
        none.set_len(length as u64 + 1).unwrap();
        assert_ne!(FileCheck::of(&none).unwrap(), check);
    }
}
