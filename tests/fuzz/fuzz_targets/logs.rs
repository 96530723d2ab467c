//! The CRI log writer, and the agent's answers as the pod process reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_vmm::fuzzing::logs(data));
