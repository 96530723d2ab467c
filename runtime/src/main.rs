//! The `caisson` program: the daemon and the command line.

fn main() {}
