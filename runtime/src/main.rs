//! The `caisson` program: the daemon and the command line.

fn main() -> std::process::ExitCode {
    caisson::cli::main()
}
