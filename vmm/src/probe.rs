//! Whether this machine's KVM is good for anything: some run every instruction through an emulator.

use std::os::fd::OwnedFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::regs;

/// Where the loop is in guest memory, behind the boot tables.
const CODE: GuestAddress = GuestAddress(0x2_0000);
/// `dec rcx; jnz .-3; hlt`, in 64-bit mode.
const LOOP: [u8; 6] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
const INSTRUCTIONS_A_ROUND: u64 = 2;
/// What a guest that is not interrupted runs in a few milliseconds: on a machine that does much else, one of several tries
/// is such a one.
const ROUNDS: u64 = 200_000;
/// Below so many instructions a second a kernel does not boot in a sensible time. KVM that emulates each
/// instruction manages two million at most, in every try; one that works, in a lab on a very busy machine, 37 million.
const ENOUGH_A_SECOND: u64 = 10_000_000;
/// How long tries are made. The last one is interrupted and counted as far as it came.
const LIMIT: Duration = Duration::from_millis(2000);

/// What the probe found.
#[derive(Debug)]
pub struct Probe {
    /// Whether guests run at a usable speed.
    pub works: bool,
    /// How many guest instructions were run.
    pub instructions: u64,
    /// How long they took.
    pub time: Duration,
    /// Why it works or not, in one sentence.
    pub reason: String,
}

impl Probe {
    fn failed(reason: impl ToString) -> Self {
        Self {
            works: false,
            instructions: 0,
            time: Duration::ZERO,
            reason: reason.to_string(),
        }
    }

    /// One line of JSON.
    pub fn to_json(&self) -> String {
        json!({
            "works": self.works,
            "instructions": self.instructions,
            "microseconds": self.time.as_micros() as u64,
            "reason": self.reason,
        })
        .to_string()
    }
}

/// Opens `/dev/kvm` and runs a counted loop in a guest.
pub fn probe() -> Probe {
    match Kvm::new() {
        Err(error) if error.errno() == libc::ENOENT => Probe::failed(
            "there is no /dev/kvm: the processor or the virtual machine this runs in offers no virtualization, or the kvm module is not loaded",
        ),
        Err(error) => Probe::failed(format!("/dev/kvm cannot be opened: {error}")),
        Ok(kvm) => match prepare(&kvm) {
            Err(reason) => Probe::failed(reason),
            Ok((vcpu, keep)) => {
                let found = run(vcpu);
                drop(keep);
                found
            }
        },
    }
}

/// As [`probe`], on a descriptor of `/dev/kvm` that is already open.
pub fn probe_device(device: OwnedFd) -> Probe {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is ours and is given away; nobody else closes it.
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    match prepare(&kvm) {
        Err(reason) => Probe::failed(reason),
        Ok((vcpu, _keep)) => run(vcpu),
    }
}

/// A vCPU at the loop's first instruction, and what must outlive it.
fn prepare(kvm: &Kvm) -> Result<(VcpuFd, (kvm_ioctls::VmFd, GuestMemoryMmap)), String> {
    let refused =
        |what: &'static str| move |e: kvm_ioctls::Error| format!("KVM refused to {what}: {e}");
    let vm = kvm.create_vm().map_err(refused("make a VM"))?;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])
        .map_err(|e| format!("1 MiB of guest memory cannot be mapped: {e}"))?;
    let Some(region) = memory.iter().next() else {
        return Err("guest memory has no region".to_owned());
    };
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the mapping has this length and is dropped after the VM: see the order in `probe`.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("take guest memory"))?;
    regs::write_boot_tables(&memory).map_err(|e| e.to_string())?;
    memory
        .write_slice(&LOOP, CODE)
        .map_err(|e| format!("the loop cannot be written: {e}"))?;
    let vcpu = vm.create_vcpu(0).map_err(refused("make a vCPU"))?;
    regs::enter_long_mode(&vcpu).map_err(|e| e.to_string())?;
    let start = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&start).map_err(refused("set registers"))?;
    Ok((vcpu, (vm, memory)))
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run(mut vcpu: VcpuFd) -> Probe {
    if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
        return Probe::failed(format!("no signal handler could be set: {error}"));
    }
    let (tell, told) = mpsc::channel();
    let guest = thread::spawn(move || {
        let begun = Instant::now();
        let mut best = (0, Duration::MAX);
        let outcome = loop {
            let tried = attempt(&mut vcpu);
            let (instructions, time) = match tried {
                Ok(counted) => counted,
                Err(reason) => break Err(reason),
            };
            if rate(instructions, time) >= rate(best.0, best.1) {
                best = (instructions, time);
            }
            if rate(best.0, best.1) >= ENOUGH_A_SECOND || begun.elapsed() >= LIMIT {
                break Ok(());
            }
        };
        let _ = tell.send((outcome, best.0, best.1));
    });
    let found = told.recv_timeout(LIMIT).or_else(|_| {
        for _ in 0..100 {
            // SAFETY: the thread has not been joined, so its handle names it still.
            unsafe { libc::pthread_kill(guest.as_pthread_t(), SIGRTMIN()) };
            if let Ok(found) = told.recv_timeout(Duration::from_millis(20)) {
                return Ok(found);
            }
        }
        Err(())
    });
    match found {
        Err(()) => Probe::failed("KVM does not come back from guest code when it is interrupted"),
        Ok((Err(reason), instructions, time)) => Probe {
            instructions,
            time,
            ..Probe::failed(reason)
        },
        Ok((Ok(()), instructions, time)) => judge(instructions, time),
    }
}

/// Runs the loop once: how many instructions in what time. An interrupted one is counted as far as it came.
fn attempt(vcpu: &mut VcpuFd) -> Result<(u64, Duration), String> {
    let mut regs = vcpu
        .get_regs()
        .map_err(|e| format!("KVM refused to tell registers: {e}"))?;
    (regs.rip, regs.rcx) = (CODE.0, ROUNDS);
    vcpu.set_regs(&regs)
        .map_err(|e| format!("KVM refused to set registers: {e}"))?;
    let begun = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::Hlt | VcpuExit::Intr) => {}
        Err(e) if e.errno() == libc::EINTR => {}
        Ok(other) => {
            return Err(format!(
                "KVM cannot run plain guest code: it stopped with {other:?}"
            ));
        }
        Err(e) => return Err(format!("KVM cannot run a vCPU: {e}")),
    }
    let time = begun.elapsed();
    let left = vcpu.get_regs().map_or(ROUNDS, |regs| regs.rcx.min(ROUNDS));
    Ok(((ROUNDS - left) * INSTRUCTIONS_A_ROUND, time))
}

/// Instructions a second.
fn rate(instructions: u64, time: Duration) -> u64 {
    (instructions as f64 / time.as_secs_f64().max(1e-6)) as u64
}

fn judge(instructions: u64, time: Duration) -> Probe {
    let a_second = rate(instructions, time);
    let works = a_second >= ENOUGH_A_SECOND;
    let millions = a_second / 1_000_000;
    Probe {
        works,
        instructions,
        time,
        reason: if works {
            format!("KVM works: {millions} million guest instructions a second")
        } else {
            format!(
                "/dev/kvm is there, but emulates each instruction ({millions} million a second): the processor offers this machine no virtualization"
            )
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_kvm_is_told_from_a_working_one() {
        assert!(!judge(2_000_000, Duration::from_secs(1)).works);
        assert!(judge(20_000_000, Duration::from_millis(60)).works);
    }
}
