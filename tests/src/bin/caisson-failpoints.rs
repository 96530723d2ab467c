//! `caisson`, built so that it dies at the step of a call that a test names (see `caisson::steps`).

fn main() -> std::process::ExitCode {
    caisson::cli::main()
}
