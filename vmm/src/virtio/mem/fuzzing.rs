//! One input of the fuzz target `mem`.

use std::sync::Arc;

use super::blocks::Blocks;
use super::{DEVICE, QUEUE_SIZES, RESPONSE, Requests};
use crate::fuzzing::guest::{Device, Guest, HIGH, HIGH_LEN, NoInterrupt};
use crate::fuzzing::input::Input;
use crate::virtio::discard::PAGE;

impl Device for Requests {
    type Handler = Self;

    fn handler(&mut self) -> &mut Self {
        self
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let mut request = [0; 24];
        request[0] = input.byte() % 5;
        let address = HIGH + u64::from(input.byte() % 40) * PAGE as u64 / 2;
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16] = input.byte() % 20;
        let room = RESPONSE as u32 - u32::from(input.byte() == 0xff);
        guest.request(0, &[&request], &[room]);
    }

    fn check(&mut self) {
        assert!(self.blocks.plugged_bytes() <= self.blocks.bytes());
    }
}

/// The memory device.
pub fn mem(data: &[u8]) {
    let mut input = Input::new(data);
    let event_index = input.byte() & 1 != 0;
    let (guest, [ring]) = Guest::new(DEVICE, event_index, QUEUE_SIZES, &mut input);
    let mut device = Requests {
        memory: guest.memory.clone(),
        interrupt: Arc::new(NoInterrupt),
        ring,
        blocks: Blocks::new(HIGH, HIGH_LEN as u64, PAGE as u64, false),
    };
    guest.run(&mut device, input, true);
}
