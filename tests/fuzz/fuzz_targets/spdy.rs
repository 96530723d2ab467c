//! SPDY: exec, attach and port-forward, as a client may speak it.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_streaming::fuzzing::spdy(data));
