//! The memory device: what a guest takes into use and gives back, hostile rings.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::mem(data));
