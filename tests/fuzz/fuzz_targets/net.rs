//! The network device: hostile rings, and frames both ways.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::net(data));
