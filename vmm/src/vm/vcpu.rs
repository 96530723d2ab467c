//! The vCPU threads.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use caisson_vmm_protocol::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::Bus;
use super::ending::Ending;
use crate::threads::{self, Kind};

/// A signal that comes between the look at the order and `KVM_RUN` is lost; so it is sent again after this.
const KICK_AGAIN: Duration = Duration::from_millis(2);
/// How long the end of a machine waits for its vCPUs.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// KVM_SYSTEM_EVENT_SHUTDOWN, _RESET and _CRASH.
const SYSTEM_SHUTDOWN: u32 = 1;
const SYSTEM_RESET: u32 = 2;
const SYSTEM_CRASH: u32 = 3;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    Run,
    Park,
    Stop,
}

struct State {
    order: Order,
    parked: usize,
    ended: usize,
}

/// What the vCPU threads are told, and what they tell.
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the vCPU is to run; false when it is to end. `parking` is called before it waits.
    fn pass(&self, mut parking: impl FnMut()) -> bool {
        let mut state = self.lock();
        if state.order == Order::Park {
            parking();
            state.parked += 1;
            self.changed.notify_all();
            while state.order == Order::Park {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.parked -= 1;
        }
        state.order == Order::Run
    }
}

/// All vCPUs of a machine.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. They run at once.
    ///
    /// # Errors
    /// What the system says when it cannot make the threads.
    pub fn start(fds: Vec<VcpuFd>, bus: &Arc<Bus>, ending: &Arc<Ending>) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)?;
        let gate = Arc::new(Gate {
            state: Mutex::new(State {
                order: Order::Run,
                parked: 0,
                ended: 0,
            }),
            changed: Condvar::new(),
        });
        let mut vcpus = Self {
            gate: Arc::clone(&gate),
            threads: Vec::with_capacity(fds.len()),
        };
        for (index, fd) in fds.into_iter().enumerate() {
            let (gate, bus, ending) = (Arc::clone(&gate), Arc::clone(bus), Arc::clone(ending));
            let run = move || {
                let _ended = Ended(&gate);
                run(index, fd, &gate, &bus, &ending);
            };
            let thread = threads::spawn(Kind::Vcpu, &format!("vcpu{index}"), 0, run);
            match thread {
                Ok(thread) => vcpus.threads.push(thread),
                Err(error) => {
                    vcpus.stop();
                    return Err(error);
                }
            }
        }
        Ok(vcpus)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Parks all vCPUs and returns when none is in the guest.
    pub fn pause(&self) {
        self.order(Order::Park, None, |state| state.parked);
    }

    /// Lets parked vCPUs go on.
    pub fn resume(&self) {
        self.gate.lock().order = Order::Run;
        self.gate.changed.notify_all();
    }

    /// Ends all vCPUs. One that does not come back in time is left to the end of the process.
    pub fn stop(&self) {
        self.order(Order::Stop, Some(STOP_LIMIT), |_| 0);
    }

    fn order(&self, order: Order, limit: Option<Duration>, count: impl Fn(&State) -> usize) {
        let begun = Instant::now();
        let mut state = self.gate.lock();
        state.order = order;
        self.gate.changed.notify_all();
        while count(&state) + state.ended < self.threads.len() {
            if limit.is_some_and(|limit| begun.elapsed() > limit) {
                return;
            }
            for thread in &self.threads {
                // One that has ended meanwhile cannot be signalled, and need not.
                let _ = thread.kill(SIGRTMIN());
            }
            state = self
                .gate
                .changed
                .wait_timeout(state, KICK_AGAIN)
                .map_or_else(|e| e.into_inner().0, |(guard, _)| guard);
        }
    }
}

/// Counts a thread as ended, however it ends.
struct Ended<'a>(&'a Gate);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.lock().ended += 1;
        self.0.changed.notify_all();
    }
}

/// The signal only has to interrupt `KVM_RUN`.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run(index: usize, mut vcpu: VcpuFd, gate: &Gate, bus: &Bus, ending: &Ending) {
    loop {
        let go_on = gate.pass(|| {
            // Tells the guest that it was stopped, so that its watchdogs do not take it for a hang.
            // A guest that has no KVM clock yet cannot be told.
            let _ = vcpu.kvmclock_ctrl();
        });
        if !go_on {
            return;
        }
        if let Some(reason) = enter(index, &mut vcpu, bus) {
            ending.end(reason);
            return;
        }
        if ending.reason().is_some() {
            return;
        }
    }
}

/// Runs the guest until its next exit, and serves that. A reason ends the machine.
fn enter(index: usize, vcpu: &mut VcpuFd, bus: &Bus) -> Option<ExitReason> {
    let failed = |what: String| Some(ExitReason::InternalError(format!("vCPU {index} {what}")));
    match vcpu.run() {
        Ok(
            access @ (VcpuExit::IoIn(..)
            | VcpuExit::IoOut(..)
            | VcpuExit::MmioRead(..)
            | VcpuExit::MmioWrite(..)),
        ) => {
            serve(access, bus);
        }
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        // A triple fault: what a PC answers with a reset.
        Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(SYSTEM_RESET, _)) => {
            return Some(ExitReason::Reset);
        }
        Ok(VcpuExit::SystemEvent(SYSTEM_SHUTDOWN, _)) => return Some(ExitReason::PoweredOff),
        Ok(VcpuExit::SystemEvent(SYSTEM_CRASH, _)) => return Some(ExitReason::Panicked),
        Ok(VcpuExit::InternalError) => return failed(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return failed(format!(
                "could not enter the guest: hardware reason {reason:#x}"
            ));
        }
        Ok(exit) => {
            return failed(format!(
                "stopped with an exit that nothing asked for: {exit:?}"
            ));
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
        Err(error) => return failed(format!("cannot run: {error}")),
    }
    None
}

/// Serves an access of the guest. False for any other exit.
pub fn serve(exit: VcpuExit<'_>, bus: &Bus) -> bool {
    match exit {
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => bus.port_write(port, data),
        VcpuExit::MmioRead(address, data) => bus.memory_read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.memory_write(address, data),
        _ => return false,
    }
    true
}

/// What KVM says of an internal error, and where the guest was.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    match suberror {
        1 => format!(
            "met an instruction at {rip:#x} that this host's KVM cannot emulate; the host needs hardware virtualization"
        ),
        other => format!("stopped at {rip:#x}: KVM internal error {other}"),
    }
}
