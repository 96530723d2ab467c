//! What a machine that is saved writes.

use std::io::{self, Write};

use caisson_vmm_protocol::Part;
use vm_memory::GuestMemoryMmap;

use super::image::blocks;
use super::{MachineState, TemplateError, file};

/// Writes a parked machine: its memory in [`Part`]s, and then the rest.
///
/// It goes through a socket, and not into a file that the process maps or writes: what a process writes is counted as the
/// memory of its control group, and a disk that is full is a signal to who has mapped a file. Neither must end the pod.
///
/// # Errors
/// [`TemplateError::File`]: who reads has gone.
pub fn save(
    memory: &GuestMemoryMmap,
    state: &MachineState,
    to: &mut impl Write,
) -> Result<(), TemplateError> {
    write_memory(memory, to).map_err(file("memory"))?;
    state.write(to)?;
    to.flush().map_err(file("state"))
}

fn write_memory(memory: &GuestMemoryMmap, to: &mut impl Write) -> io::Result<()> {
    blocks(memory, |block| {
        for (offset, bytes) in block.runs() {
            let part = Part {
                offset: block.offset + offset as u64,
                length: u32::try_from(bytes.len()).map_err(io::Error::other)?,
            };
            to.write_all(&part.to_bytes())?;
            to.write_all(bytes)?;
        }
        Ok(())
    })?;
    to.write_all(&Part::END.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::{self, HUGE};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_is_not_zero_is_written_with_its_place() {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];
        let memory = memory::map(&ranges).unwrap();
        let two_pages = vec![7; 8192];
        memory
            .write_slice(&two_pages, GuestAddress(3 << 12))
            .unwrap();
        memory
            .write_slice(&vec![9; HUGE], GuestAddress(2 << 20))
            .unwrap();
        memory
            .write_slice(b"high", GuestAddress((1 << 32) + 4096))
            .unwrap();
        let mut written = Vec::new();
        write_memory(&memory, &mut written).unwrap();
        let mut rest = written.as_slice();
        let mut parts = Vec::new();
        loop {
            let (head, after) = rest.split_first_chunk::<{ Part::HEAD }>().unwrap();
            let part = Part::from_bytes(*head);
            if part == Part::END {
                assert!(after.is_empty());
                break;
            }
            let (bytes, after) = after.split_at(part.length as usize);
            parts.push((part.offset, part.length, bytes[0]));
            rest = after;
        }
        assert_eq!(
            parts,
            [
                (3 << 12, 8192, 7),
                (2 << 20, Part::LONGEST, 9),
                ((4 << 20) + 4096, 4096, b'h')
            ]
        );
    }
}
