//! The balloon device: reports of free pages, hostile rings.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::balloon(data));
