//! The engine on a real kernel: containers of a busybox root file system, made, looked at from inside, and removed.
//!
//! Needs root, cgroup v2 with its controllers, loop devices, EROFS and overlayfs, `mkfs.erofs` and a static busybox:
//! the KVM lab has them all. Where something is missing, it says so aloud.

mod confinement;
mod failures;
mod files;
mod life;
mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use caisson_agent::engine;

type Test = (&'static str, fn());

fn main() -> ExitCode {
    // The engine starts this very program anew for the containers' processes.
    if std::env::args().nth(1).as_deref() == Some(engine::INIT) {
        engine::init_main();
    }
    if let Err(missing) = support::prepare() {
        println!("skipped: the engine's tests on a real kernel: {missing}");
        return ExitCode::SUCCESS;
    }
    // As with cargo's own harness: a part of a name. Its options have no meaning here.
    let wanted = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_default();
    let tests = [
        life::TESTS,
        files::TESTS,
        confinement::TESTS,
        failures::TESTS,
    ]
    .concat();
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in tests.iter().filter(|(name, _)| name.contains(&wanted)) {
        let begin = Instant::now();
        let before = support::traces();
        let mut result = catch_unwind(AssertUnwindSafe(test));
        support::reap();
        let after = support::traces();
        if result.is_ok() && before != after {
            println!("left behind:\nbefore {before:#?}\nafter {after:#?}");
            result = Err(Box::new("traces"));
        }
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        println!(
            "test {name} ... {verdict} ({} ms)",
            begin.elapsed().as_millis()
        );
        passed += usize::from(result.is_ok());
        failed += usize::from(result.is_err());
    }
    println!(
        "test result: {}. {passed} passed; {failed} failed; {} filtered out",
        if failed == 0 { "ok" } else { "FAILED" },
        tests.len() - passed - failed
    );
    ExitCode::from(u8::from(failed > 0))
}
