//! Ports and virtio-mmio windows: what vCPUs read and write.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::bus(data));
