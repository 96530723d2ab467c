//! What the fuzzers begin with, and what they have found.

use std::path::Path;

fn seeds(target: &str, run: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds");
    let mut count = 0;
    for entry in std::fs::read_dir(seeds.join(target)).unwrap() {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "{target} has no seeds");
}

macro_rules! seeds {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            seeds(stringify!($target), super::$target);
        })*
    };
}

seeds!(blk bus control fs fuse logs net rng vsock vsock_packets);
