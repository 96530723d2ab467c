//! A layer from anybody: the tar reader, the rules of layers, the EROFS writer and the recipe.
#![no_main]

libfuzzer_sys::fuzz_target!(init: caisson_fuzz::init(), |data: &[u8]| caisson::fuzzing::layer(data));
