//! WebSocket: channels and the tunnel, as a client may speak them.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson_streaming::fuzzing::web_socket(data));
