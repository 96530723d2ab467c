//! One input of the fuzz target `rng`.

use super::{DEVICE, QUEUE_SIZES, Requests};
use crate::fuzzing::guest::{Device, Guest};
use crate::fuzzing::input::Input;

impl Device for Requests {
    type Handler = Self;

    fn handler(&mut self) -> &mut Self {
        self
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        guest.request(0, &[], &[input.length(), input.byte().into()]);
    }
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    let mut input = Input::new(data);
    let event_index = input.byte() & 1 != 0;
    let (guest, [ring]) = Guest::new(DEVICE, event_index, QUEUE_SIZES, &mut input);
    let mut device = Requests {
        memory: guest.memory.clone(),
        ring,
    };
    guest.run(&mut device, input, true);
}
