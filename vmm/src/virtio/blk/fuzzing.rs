//! One input of the fuzz target `blk`: a driver's requests and its tricks, on each kind of disk.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;
use crate::fuzzing::guest::{Device, Guest};
use crate::fuzzing::input::Input;

const BYTES: usize = 64 * SECTOR as usize;

struct Fuzzed {
    requests: Requests,
    /// What is on the disk that the guest may not write.
    kept: Option<File>,
    image: File,
}

fn file() -> File {
    let mut file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).expect("a file"));
    file.write_all(&[0x5a; BYTES]).expect("room");
    file
}

impl Device for Fuzzed {
    type Handler = Requests;

    fn handler(&mut self) -> &mut Requests {
        &mut self.requests
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let kind = input.byte();
        let kind = match kind {
            0xf0.. => input.long(),
            _ => u32::from(kind % 16),
        };
        let sector = match input.byte() {
            0xf0.. => input.quad(),
            near => near.into(),
        };
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let flags = input.byte();
        // Data to write, and room for data, most often whole sectors, and for the status.
        let room = match flags & 3 {
            0 => u32::from(flags >> 2) * SECTOR as u32,
            1 => input.length(),
            _ => 0,
        };
        let data = if flags & 3 == 3 {
            input.counted()
        } else {
            &[0xa5; 2048][..usize::from(flags >> 4) * 128]
        };
        guest.request(0, &[&header, data], &[room, 1]);
    }

    fn check(&mut self) {
        let size = self.image.metadata().expect("a file of ours").len();
        assert_eq!(size, BYTES as u64, "the disk has another size");
        if let Some(kept) = &self.kept {
            let mut bytes = [0; BYTES];
            kept.read_exact_at(&mut bytes, 0).expect("a file of ours");
            assert!(bytes == [0x5a; BYTES], "it was written");
        }
    }
}

/// The block device.
pub fn blk(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.byte();
    let image = file();
    let again = || image.try_clone().expect("a second handle");
    let disk = match kind & 3 {
        0 | 1 => Disk::new(again().into(), "fuzz", kind & 1 != 0),
        _ => {
            let layers = Layers::default();
            for name in ["a", "b"] {
                layers.add(name, again().into()).expect("a layer");
            }
            Disk::of_layers(Arc::new(layers), "fuzz")
        }
    };
    let (guest, [ring]) = Guest::new(DEVICE, kind & 4 != 0, QUEUE_SIZES, &mut input);
    let mut device = Fuzzed {
        requests: Requests {
            memory: guest.memory.clone(),
            ring,
            disk: disk.expect("a good disk"),
        },
        kept: (kind & 3 != 0).then(again),
        image,
    };
    guest.run(&mut device, input, true);
}
