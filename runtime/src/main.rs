//! The `caisson` program: the daemon and the command line.

// The command line is in `caisson::cli` (clap, every sub-command). It calls
// `daemon::serve(config: Config) -> Result<(), impl Display>` and
// `doctor::doctor(config: &Config, kvm_works_only: bool) -> ExitCode`; `lib.rs` gets `pub mod cli;` when both are there.
fn main() {}
