//! The `caisson-vmm` binary.
//!
//! `caisson-vmm` without arguments is one pod's machine, or the writer of the logs of a pod that runs on the host: the
//! daemon starts it with a control socket as descriptor 3. `caisson-vmm probe` says whether KVM works here.
//!
//! Exit status: 0 the guest powered off, 1 the machine could not be started, 2 wrong use,
//! 10 reset, 11 guest panic, 12 killed, 13 the guest broke a device's rules, 14 internal error.

use std::process::ExitCode;

use caisson_vmm::{probe, process};

const USAGE: &str = "\
usage: caisson-vmm            one pod's machine; started by caisson, with a control socket as descriptor 3
       caisson-vmm probe      say whether KVM works here, as one line of JSON
       caisson-vmm --version";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => process::run(),
        [one] if one == "probe" => {
            let found = probe::probe();
            println!("{}", found.to_json());
            ExitCode::from(u8::from(!found.works))
        }
        [one] if one == "--version" => {
            println!("caisson-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        [one] if one == "--help" => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(process::EXIT_USAGE)
        }
    }
}
