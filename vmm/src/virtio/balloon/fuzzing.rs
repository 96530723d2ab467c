//! One input of the fuzz target `balloon`.

use super::{DEVICE, QUEUE_SIZES, Rings};
use crate::fuzzing::guest::{Device, Guest};
use crate::fuzzing::input::Input;
use crate::virtio::discard::PAGE;

impl Device for Rings {
    type Handler = Self;

    fn handler(&mut self) -> &mut Self {
        self
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let queue = usize::from(input.byte()) % QUEUE_SIZES.len();
        let pages = u32::from(input.byte() % 8);
        let more = u32::from(input.byte() / 0xf0);
        guest.request(queue, &[], &[pages * PAGE as u32, PAGE as u32 + more]);
    }
}

/// The balloon device.
pub fn balloon(data: &[u8]) {
    let mut input = Input::new(data);
    let event_index = input.byte() & 1 != 0;
    let (guest, rings) = Guest::new(DEVICE, event_index, QUEUE_SIZES, &mut input);
    let mut device = Rings {
        memory: guest.memory.clone(),
        rings: Vec::from(rings),
    };
    guest.run(&mut device, input, true);
}
