//! The agent's and the pod process's replies, as the daemon reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson::fuzzing::agent_replies(data));
