//! A layer from anybody: the tar reader, the rules of layers, the EROFS writer and the recipe.
#![no_main]

libfuzzer_sys::fuzz_target!(|blob: &[u8]| caisson::image::fuzz_layer(blob));
