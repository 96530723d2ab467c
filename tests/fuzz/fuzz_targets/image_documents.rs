//! Manifests, indexes, image configurations, names and challenges.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson::fuzzing::image_documents(data));
