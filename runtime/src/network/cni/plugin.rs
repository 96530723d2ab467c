//! Runs one plugin once (CNI 1.1.0, section 2): parameters in its environment, its configuration on standard input, its
//! answer on standard output.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::super::PodIdentity;
use super::INTERFACE;
use super::list::MAX_JSON;

/// The interface of a pod that ADD, CHECK and DEL are about.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// The pod.
    pub pod: &'a PodIdentity,
    /// Its network namespace.
    pub netns: &'a Path,
}

/// Where plugins are.
#[derive(Clone, Debug)]
pub struct Plugins {
    dirs: Vec<PathBuf>,
}

impl Plugins {
    /// Plugins in these directories, searched in order.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    fn listed(&self, separator: &str) -> String {
        let dirs: Vec<_> = self.dirs.iter().map(|d| d.display().to_string()).collect();
        dirs.join(separator)
    }

    /// A plugin's executable.
    ///
    /// # Errors
    /// A sentence that says where it is not.
    pub fn find(&self, name: &str) -> Result<PathBuf, String> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(format!("{name:?} is not the name of a plugin"));
        }
        self.dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| format!("plugin {name} is not in {}", self.listed(" or ")))
    }

    /// Runs a plugin; its answer, `Null` where it has none. One that takes longer than `limit` is killed, with the
    /// processes it has started.
    ///
    /// # Errors
    /// What the plugin said, or why it could not be run.
    pub async fn run(
        &self,
        name: &str,
        command: &str,
        input: &Value,
        attachment: Option<Attachment<'_>>,
        limit: Duration,
    ) -> Result<Value, String> {
        let path = self.find(name)?;
        match tokio::time::timeout(limit, self.execute(&path, command, input, attachment)).await {
            Ok(done) => done,
            Err(_) => Err(format!(
                "it did not end within {} s and was killed",
                limit.as_secs()
            )),
        }
    }

    async fn execute(
        &self,
        path: &Path,
        command: &str,
        input: &Value,
        attachment: Option<Attachment<'_>>,
    ) -> Result<Value, String> {
        let mut process = Command::new(path);
        process
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", self.listed(":"));
        if let Some(Attachment { pod, netns }) = attachment {
            let arguments = format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                pod.namespace, pod.name, pod.id, pod.uid
            );
            process
                .env("CNI_CONTAINERID", &pod.id)
                .env("CNI_NETNS", netns)
                .env("CNI_IFNAME", INTERFACE)
                .env("CNI_ARGS", arguments);
        }
        let mut child = process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("{} cannot be run: {e}", path.display()))?;
        // Declared after the child, so it is dropped before that is waited for and its number is free.
        let group = Group::of(&child);
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err("its standard streams are not there".into());
        };
        let write = async move {
            // A plugin that does not read its input says why by its exit status.
            let _ = stdin.write_all(input.to_string().as_bytes()).await;
        };
        let mut out = Vec::new();
        let mut err = Vec::new();
        let (mut stdout, mut stderr) = (stdout.take(MAX_JSON), stderr.take(MAX_JSON));
        let ((), read_out, read_err) = tokio::join!(
            write,
            stdout.read_to_end(&mut out),
            stderr.read_to_end(&mut err)
        );
        read_out.and(read_err).map_err(|e| e.to_string())?;
        let status = child.wait().await.map_err(|e| e.to_string())?;
        group.ended();
        if !status.success() {
            return Err(failure(&out, &err, status));
        }
        if !matches!(command, "ADD") || out.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&out).map_err(|e| format!("its answer is not JSON: {e}"))
    }
}

/// The processes of a plugin, which are killed unless it has ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &tokio::process::Child) -> Self {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Self(pid.map(Pid::from_raw))
    }

    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// A failed plugin's own words (CNI 1.1.0, section 5, "Error").
fn failure(out: &[u8], err: &[u8], status: std::process::ExitStatus) -> String {
    if let Ok(error) = serde_json::from_slice::<HashMap<String, Value>>(out)
        && let Some(message) = error.get("msg").and_then(Value::as_str)
    {
        let details = error
            .get("details")
            .and_then(Value::as_str)
            .filter(|d| !d.is_empty())
            .map(|d| format!(" ({d})"))
            .unwrap_or_default();
        return format!("{message}{details}");
    }
    let text = String::from_utf8_lossy(err);
    match text.trim().lines().next_back() {
        Some(line) if !line.is_empty() => format!("{status}: {line}"),
        _ => status.to_string(),
    }
}
