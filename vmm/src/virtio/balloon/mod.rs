//! The balloon device (virtio 1.2 §5.5), for one thing: the guest reports pages that it has freed
//! (§5.5.6, "Free Page Reporting"), and they go back to the host until they are touched again.
//!
//! It is never inflated: `num_pages` is 0. A driver that puts pages into it all the same gets its buffers back unused, and
//! has lost the pages to itself alone.
//!
//! **What is in a page that comes back** is nothing that the guest may count on: zeroes, or in a clone of a template
//! what the template had there, for such memory is a private mapping of the template's file. Linux agrees to that: a
//! driver whose kernel poisons free pages, or zeroes pages when they are freed and so not when they are taken, does not accept
//! `VIRTIO_BALLOON_F_REPORTING` without `VIRTIO_BALLOON_F_PAGE_POISON`, which is not offered here. A template was never a
//! pod's, so there is no other pod's secret in it. A used length of 0 says the same: nothing was written.
//!
//! **A machine that becomes a template** has memory of its own until it is parked. What it gives back is zero, so it stays a
//! hole in the template's file; a report that is under way is served before the worker parks, and the next one in each
//! clone.
//!
//! **Pages that another device works on** may be reported by a guest that lies. The mapping stays where it is, so every
//! pointer to it stays good; the other device finds or leaves bytes in a page that is new, which only the guest
//! notices. What the kernel has under way with the old page holds a reference of its own.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::discard::{discard, is_whole_pages};
use super::queue::{Chain, Ring};
use super::service::{self, Service};
use super::worker::{Handler, Poll};
use super::{Activation, DeviceError, Memory, VirtioDevice};
use crate::threads::Kind;

const DEVICE: &str = "virtio-balloon";
/// `VIRTIO_BALLOON_F_REPORTING` (§5.5.3).
const REPORTING_FEATURE: u32 = 5;
/// Inflate, deflate, reporting: with neither statistics nor hints, the last is the third (§5.5.2). Linux reports up to 32
/// blocks at once and wants room for them.
const QUEUE_SIZES: [u16; 3] = [64, 64, 64];
/// The queue of reports.
const REPORTS: usize = 2;

/// A balloon device.
pub struct Balloon(Service<(), Rings>);

impl Balloon {
    /// A device that is not active yet.
    pub fn new() -> Self {
        Self(Service::new(Kind::Balloon, DEVICE, ()))
    }
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// The queue of reports is there only for who accepted them.
    fn queues(&self, features: u64) -> usize {
        match features & 1 << REPORTING_FEATURE {
            0 => REPORTS,
            _ => QUEUE_SIZES.len(),
        }
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << REPORTING_FEATURE
    }

    /// `struct virtio_balloon_config` (§5.5.4): no page is wanted. What the driver writes as `actual` is of no use.
    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let rings = if self.queues(activation.features) > REPORTS {
            Vec::from(service::rings::<3>(DEVICE, &mut activation)?)
        } else {
            Vec::from(service::rings::<REPORTS>(DEVICE, &mut activation)?)
        };
        let memory = activation.memory;
        self.0
            .start(activation.failure, |()| Rings { memory, rings })
    }

    fn reset(&mut self) {
        self.0.stop();
    }

    fn pause(&mut self) {
        self.0.pause();
    }

    fn resume(&mut self) {
        self.0.resume();
    }
}

/// The queues in service.
struct Rings {
    memory: Memory,
    /// In the order of [`QUEUE_SIZES`].
    rings: Vec<Ring>,
}

impl From<Rings> for () {
    fn from(_: Rings) {}
}

impl Handler for Rings {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for index in 0..self.rings.len() {
            let event = self.rings[index].notify_fd();
            poll.add(event, index as u64, EventSet::IN)
                .map_err(DeviceError::host(DEVICE))?;
            self.serve(index)?;
        }
        Ok(())
    }

    fn handle(&mut self, token: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        // The token is the index that was given to `Poll::add`.
        let index = token as usize;
        self.rings[index].take_notification();
        self.serve(index)
    }
}

impl Rings {
    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        self.rings[index].serve(&memory, |chain| {
            if index == REPORTS {
                give_back(&chain)?;
            }
            Ok(0)
        })
    }
}

/// Gives the pages of a report back. Nothing is given back where a part of it cannot be.
fn give_back(report: &Chain<'_>) -> Result<(), DeviceError> {
    if !report.readable.is_empty() {
        return Err(DeviceError::guest(DEVICE)(
            "a report has a buffer that may only be read",
        ));
    }
    let slices = || report.writable.slices();
    if !slices().all(is_whole_pages) {
        return Err(DeviceError::guest(DEVICE)("a report is not of whole pages"));
    }
    slices()
        .try_for_each(discard)
        .map_err(DeviceError::host(DEVICE))
}

#[cfg(test)]
mod tests;
