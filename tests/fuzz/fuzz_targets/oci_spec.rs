//! OCI runtime specs in the agent, and what is computed of them.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_agent::engine::fuzzing::oci_spec(data));
