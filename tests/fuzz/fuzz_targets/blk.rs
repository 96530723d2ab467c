//! The block device: hostile rings and requests, on an image and on layers.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::blk(data));
