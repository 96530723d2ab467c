//! The configuration, hosts.toml and CNI networks.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson::fuzzing::config_files(data));
