//! What all fuzz targets need.

/// Ignores SIGPIPE, as the start of every Rust program does. A fuzz target's `main` is libFuzzer's.
pub fn init() {
    // SAFETY: the call sets a signal's disposition, before any other thread is there.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
