//! What a pod process is in charge of: a machine, or a pod that runs on the host.

use std::fs::File;
use std::io::BufWriter;
use std::sync::Arc;

use caisson_vmm_protocol::VmState;

use crate::host::HostPod;
use crate::logs::{Dial, LogManager};
use crate::virtio::blk::Layers;
use crate::vm::{Ending, Machine, MachineSize};

/// What a saved machine writes at a time, in bytes.
const BUFFER: usize = 256 << 10;

/// A pod that runs, and the ways to its agent.
pub struct Running {
    /// The pod.
    pub pod: Pod,
    /// The containers' logs; there are none without a way to the agent.
    pub logs: Option<LogManager>,
    /// The disk of image layers, where the machine has one.
    pub layers: Option<Arc<Layers>>,
    /// The version of Landlock that confines this process; 0: none.
    pub landlock: u32,
    /// Connections to the agent.
    pub connector: Option<Arc<dyn Dial>>,
}

/// The two kinds.
pub enum Pod {
    /// A machine of this process's own.
    Machine(Machine),
    /// Processes beside this one.
    Host(HostPod),
}

impl Pod {
    /// What it is doing.
    pub fn state(&self) -> VmState {
        match self {
            Self::Machine(machine) => machine.state(),
            Self::Host(pod) => pod.state(),
        }
    }

    /// Where its end is told.
    pub fn ending(&self) -> &Arc<Ending> {
        match self {
            Self::Machine(machine) => machine.ending(),
            Self::Host(pod) => pod.ending(),
        }
    }

    /// Stops it until [`Pod::resume`].
    ///
    /// # Errors
    /// A pod of the host has no such state.
    pub fn pause(&self) -> Result<(), &'static str> {
        match self {
            Self::Machine(machine) => machine.pause(),
            Self::Host(_) => return Err("a pod of the host has no machine that could pause"),
        }
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// As [`Pod::pause`].
    pub fn resume(&self) -> Result<(), &'static str> {
        match self {
            Self::Machine(machine) => machine.resume(),
            Self::Host(_) => return Err("a pod of the host has no machine that could resume"),
        }
        Ok(())
    }

    /// Writes it down, and parks it; how large it is. See [`Machine::write`].
    ///
    /// # Errors
    /// A sentence. A pod of the host cannot be written down.
    pub fn write(&self, to: File) -> Result<MachineSize, String> {
        let Self::Machine(machine) = self else {
            return Err("a pod of the host has no machine that could be saved".into());
        };
        let mut to = BufWriter::with_capacity(BUFFER, to);
        machine.write(&mut to).map_err(|error| error.to_string())?;
        Ok(machine.size())
    }

    /// Notes that its end was asked for, so that it is no failure.
    pub fn expect_end(&self) {
        if let Self::Host(pod) = self {
            pod.expect_end();
        }
    }

    /// Ends what still runs of it, after its end was told.
    pub fn stop(&self) {
        match self {
            Self::Machine(machine) => machine.stop(),
            Self::Host(pod) => pod.stop(),
        }
    }
}
