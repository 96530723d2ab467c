//! The file system device: hostile rings and requests.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::fs(data));
