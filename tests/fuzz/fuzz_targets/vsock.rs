//! The vsock device: hostile rings and packets, and clients on the host.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::vsock(data));
