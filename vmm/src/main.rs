//! The `caisson-vmm` binary.

fn main() {}
