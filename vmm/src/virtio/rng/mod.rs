//! The entropy device (virtio 1.2 §5.4): the guest's first good randomness.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::queue::{Chain, Ring};
use super::service::{self, Service};
use super::worker::{Handler, Poll};
use super::{Activation, DeviceError, Memory, VirtioDevice};
use crate::threads::Kind;

const DEVICE: &str = "virtio-rng";
const QUEUE_SIZES: [u16; 1] = [64];

/// The most bytes that one request gets; a driver that wants more asks again (§5.4.6.2 allows any number).
const MOST: usize = 64 * 1024;

/// An entropy device, fed by the host's `getrandom`.
pub struct Rng(Service<(), Requests>);

impl Rng {
    /// A device that is not active yet.
    pub fn new() -> Self {
        Self(Service::new(Kind::Rng, DEVICE, ()))
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let [ring] = service::rings(DEVICE, &mut activation)?;
        let memory = activation.memory;
        self.0
            .start(activation.failure, |()| Requests { memory, ring })
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

/// The request queue in service.
struct Requests {
    memory: Memory,
    ring: Ring,
}

impl From<Requests> for () {
    fn from(_: Requests) {}
}

impl Handler for Requests {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add(self.ring.notify_fd(), 0, EventSet::IN)
            .map_err(DeviceError::host(DEVICE))?;
        self.serve()
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        self.ring.take_notification();
        self.serve()
    }
}

impl Requests {
    fn serve(&mut self) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        self.ring.serve(&memory, fill)
    }
}

fn fill(mut chain: Chain<'_>) -> Result<u32, DeviceError> {
    let mut bytes = vec![0; chain.writable.len().min(MOST)];
    random(&mut bytes).map_err(DeviceError::host(DEVICE))?;
    let written = chain.writable.write(&bytes);
    // At most MOST.
    Ok(written as u32)
}

/// Fills a buffer from the kernel's generator.
fn random(mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        // SAFETY: the pointer and length are those of a live, exclusively borrowed slice.
        let n = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => into = &mut into[n..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Desc, Driver, activation, memory, wait_until};
    use super::*;
    use std::time::Duration;

    #[test]
    fn requests_get_different_bytes() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add(&[Desc::write(0x8000, 32), Desc::write(0x9000, 32)]);
        let mut device = Rng::new();
        let (start, failures) = activation(&[&driver], 0);
        device.activate(start).unwrap();
        wait_until("served", || driver.used_index() == 1);
        assert_eq!(driver.used(), vec![(0, 64)]);
        let (a, b) = (driver.bytes(0x8000, 32), driver.bytes(0x9000, 32));
        assert!(a != b && a != vec![0; 32] && b != vec![0; 32]);

        driver.add(&[Desc::write(0x8000, 32)]);
        driver.notify();
        wait_until("served again", || driver.used_index() == 2);
        assert!(driver.bytes(0x8000, 32) != a);
        assert!(failures.try_recv().is_err());
    }

    #[test]
    fn a_huge_request_is_cut_and_an_unwritable_one_gets_nothing() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add(&[Desc::write(0x8000, 0xf_0000)]);
        driver.add(&[Desc::read(0x8000, 8)]);
        let mut device = Rng::new();
        device.activate(activation(&[&driver], 0).0).unwrap();
        wait_until("served", || driver.used_index() == 2);
        assert_eq!(driver.used(), vec![(0, 65536), (1, 0)]);
        assert_eq!(driver.bytes(0x1_8000, 16), vec![0; 16]);
    }

    #[test]
    fn a_hostile_ring_ends_it_with_a_reason_and_reset_revives_it() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.set_available_index(4000);
        let mut device = Rng::new();
        let (start, failures) = activation(&[&driver], 0);
        device.activate(start).unwrap();
        let reason = failures.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(reason.contains("virtio-rng driver broke"), "{reason}");
        device.reset();
        let driver = Driver::new(&memory, 8);
        driver.add(&[Desc::write(0x8000, 4)]);
        device.activate(activation(&[&driver], 0).0).unwrap();
        wait_until("served", || driver.used_index() == 1);
    }
}
