//! What the fuzzers begin with, and what they have found.

include!("../../../tests/fuzz/seed_tests.rs");

seeds!(balloon blk bus control fs fuse logs mem net rng vsock vsock_packets);
