//! Programs that a spec wants run at points of the container's life (config.md, "POSIX-platform Hooks").

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{During, Step};
use crate::engine::plan::State;
use crate::engine::spec::Hook;

/// Runs hooks one after the other; the first that fails ends it.
///
/// The caller must be a process whose children nobody else waits for.
pub(super) fn run(hooks: &[Hook], state: &State) -> Result<(), Step> {
    for hook in hooks {
        one(hook, state).during(|| format!("run the hook {}", hook.path))?;
    }
    Ok(())
}

fn one(hook: &Hook, state: &State) -> io::Result<()> {
    let mut command = Command::new(&hook.path);
    command.env_clear().stdin(Stdio::piped());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    for variable in &hook.env {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    let mut child = command.spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // A hook need not read it; then this fails, or it stays in the pipe.
        let _ = input.write_all(&serde_json::to_vec(state)?);
    }
    let end = hook
        .timeout
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let status = loop {
        if end.is_none() {
            break child.wait()?;
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "it did not end in its time",
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("it ended with {status}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            oci_version: "1.2.0".into(),
            id: "c".into(),
            status: "creating".into(),
            pid: Some(1),
            bundle: "/".into(),
            annotations: Default::default(),
        }
    }

    fn shell(script: &str, timeout: Option<u32>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["A=b".into()],
            timeout,
        }
    }

    #[test]
    fn a_hook_gets_the_state_and_its_environment() {
        let script = r#"read line; case $line in *'"id":"c"'*) test "$A" = b;; *) exit 1;; esac"#;
        run(&[shell(script, None)], &state()).unwrap();
    }

    #[test]
    fn a_failing_or_slow_hook_is_an_error_that_names_it() {
        let error = run(&[shell("exit 3", None)], &state()).unwrap_err();
        assert!(error.to_string().contains("/bin/sh"), "{error}");
        let error = run(&[shell("sleep 30", Some(1))], &state()).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
