//! Who holds a device's resources: the device while it is idle, its worker while it is active.

use std::io;
use std::marker::PhantomData;

use vm_memory::GuestAddressSpace;

use super::queue::Ring;
use super::worker::{Handler, Worker};
use super::{Activation, ActiveQueue, DeviceError, FailureSink};
use crate::threads::Kind;

/// A resource `R` (a disk, a tap) that goes to a worker's handler `H` at activation and comes back at reset.
pub struct Service<R, H> {
    kind: Kind,
    device: &'static str,
    idle: Option<R>,
    worker: Option<Worker<R>>,
    handler: PhantomData<fn() -> H>,
}

impl<R: Send + 'static, H: Handler + Into<R>> Service<R, H> {
    /// An idle service, whose worker's thread will be of this kind.
    pub fn new(kind: Kind, device: &'static str, resource: R) -> Self {
        Self {
            kind,
            device,
            idle: Some(resource),
            worker: None,
            handler: PhantomData,
        }
    }

    /// Starts a worker with the handler that `make` makes of the resource.
    ///
    /// # Errors
    /// [`DeviceError::Host`] where it runs already, an earlier worker took the resource to its grave, or the
    /// system cannot make a thread.
    pub fn start(
        &mut self,
        failure: FailureSink,
        make: impl FnOnce(R) -> H,
    ) -> Result<(), DeviceError> {
        let Some(resource) = self.idle.take() else {
            return Err(DeviceError::host(self.device)(io::Error::other(
                "its resources are not at hand",
            )));
        };
        match Worker::spawn(self.kind, self.device, make(resource), failure) {
            Ok(worker) => {
                self.worker = Some(worker);
                Ok(())
            }
            Err(source) => Err(DeviceError::host(self.device)(source)),
        }
    }

    /// Stops the worker and takes the resource back; a no-op while idle.
    pub fn stop(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.idle = worker.stop();
        }
    }

    /// Parks the worker between two events.
    pub fn pause(&mut self) {
        if let Some(worker) = &self.worker {
            worker.pause();
        }
    }

    /// Lets a parked worker go on.
    pub fn resume(&mut self) {
        if let Some(worker) = &self.worker {
            worker.resume();
        }
    }
}

/// Takes all queues of an activation into service; there must be `N`.
///
/// # Errors
/// [`DeviceError`] where there are not `N`, or one is not in guest memory.
pub fn rings<const N: usize>(
    device: &'static str,
    activation: &mut Activation,
) -> Result<[Ring; N], DeviceError> {
    let memory = activation.memory.memory();
    let rings = std::mem::take(&mut activation.queues)
        .into_iter()
        .map(|queue: ActiveQueue| Ring::new(device, queue, activation.interrupt.clone(), &memory))
        .collect::<Result<Vec<_>, _>>()?;
    let count = rings.len();
    rings.try_into().map_err(|_| DeviceError::Host {
        device,
        source: io::Error::other(format!("it was activated with {count} queues, not {N}")),
    })
}
