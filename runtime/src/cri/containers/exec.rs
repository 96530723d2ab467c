//! Further processes in a container: ExecSync, and what the CLI's exec is made of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use caisson_proto::{agent, cri};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::super::registry::Container;
use super::super::spec::{self, signal};
use super::super::{CriError, guest, new_exec_id};
use crate::sandbox::{Sandbox, StreamKind};
use crate::store::ContainerState;

/// The most bytes of each stream that ExecSync returns; what is more is read and dropped.
const MAX_OUTPUT: usize = 16 << 20;
/// How long the output may be silent after the process has ended, while something it left behind holds it open.
const SILENCE: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Whether it has a standard input.
    pub stdin: bool,
    /// KEY=value, beside the container's own.
    pub env: Vec<String>,
    /// Empty: the container's.
    pub working_dir: String,
    /// Empty: the container's.
    pub user: String,
}

/// A process that runs in a container.
pub struct Exec {
    /// Where.
    pub sandbox: Arc<dyn Sandbox>,
    container_id: String,
    exec_id: String,
}

impl Exec {
    /// Starts the process. Its output waits until a stream is connected.
    ///
    /// # Errors
    /// FAILED_PRECONDITION for a container that does not run; INVALID_ARGUMENT for a command that cannot be; what the
    /// agent says, such as a program that is not there.
    pub async fn begin(container: &Container, plan: &Plan) -> Result<Self, CriError> {
        let record = container.record();
        if record.state != ContainerState::Running {
            return Err(CriError::precondition(format!(
                "nothing can be run in container {}: it is {}",
                container.id,
                super::view::word(record.state)
            )));
        }
        let process = spec::exec_process(
            &record.process,
            &plan.command,
            plan.tty,
            &plan.env,
            &plan.working_dir,
            &plan.user,
        )?;
        let process_json = serde_json::to_vec(&process)
            .map_err(|error| CriError::internal(format!("cannot encode the process: {error}")))?;
        let exec = Self {
            sandbox: container.pod.ready()?,
            container_id: container.id.clone(),
            exec_id: new_exec_id(),
        };
        let mut client = exec.sandbox.agent();
        let request = agent::ExecRequest {
            container_id: exec.container_id.clone(),
            exec_id: exec.exec_id.clone(),
            process_json,
            stdin: plan.stdin,
            stdout: true,
            stderr: !plan.tty,
        };
        let what = format!("run a command in container {}", container.id);
        guest::call(
            exec.sandbox.as_ref(),
            &what,
            guest::START,
            client.exec(request),
        )
        .await?;
        Ok(exec)
    }

    /// One of its streams.
    ///
    /// # Errors
    /// The sandbox does not connect it.
    pub async fn stream(&self, kind: StreamKind) -> Result<UnixStream, CriError> {
        Ok(self
            .sandbox
            .stream(&self.container_id, &self.exec_id, kind)
            .await?)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// The sandbox has ended, or its agent does not know any more.
    pub async fn wait(&self) -> Result<agent::ExitStatus, CriError> {
        let mut client = self.sandbox.agent();
        let request = agent::WaitRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
        };
        let forever = Duration::from_secs(u64::from(u32::MAX));
        let status = guest::call(
            self.sandbox.as_ref(),
            "wait for a command",
            forever,
            client.wait(request),
        )
        .await?
        .status
        .ok_or_else(|| CriError::internal("the agent told no exit status"))?;
        Ok(agent::ExitStatus {
            code: status.code.clamp(0, 255),
            ..status
        })
    }

    /// Kills it. One that has ended is no error.
    pub async fn kill(&self) {
        let mut client = self.sandbox.agent();
        let request = agent::SignalRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            signal: signal::KILL,
            all: false,
        };
        let killed = guest::call(
            self.sandbox.as_ref(),
            "kill a command",
            guest::QUICK,
            client.signal(request),
        );
        if let Err(error) = killed.await {
            tracing::debug!(container = self.container_id, %error, "a command was not killed");
        }
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn resize(&self, columns: u32, rows: u32) -> Result<(), CriError> {
        resize(
            self.sandbox.as_ref(),
            &self.container_id,
            &self.exec_id,
            columns,
            rows,
        )
        .await
    }
}

/// Sets a terminal's size: a container's own with an empty `exec_id`.
///
/// # Errors
/// What the agent says.
pub async fn resize(
    sandbox: &dyn Sandbox,
    container_id: &str,
    exec_id: &str,
    columns: u32,
    rows: u32,
) -> Result<(), CriError> {
    let mut client = sandbox.agent();
    let request = agent::ResizeTtyRequest {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
        columns: columns.clamp(1, 65_535),
        rows: rows.clamp(1, 65_535),
    };
    guest::call(
        sandbox,
        "resize a terminal",
        guest::QUICK,
        client.resize_tty(request),
    )
    .await
    .map(drop)
}

/// Runs a command and returns all it says (CRI `ExecSync`). A `timeout` of zero is none.
///
/// # Errors
/// DEADLINE_EXCEEDED after `timeout`, the command is then killed; see also [`Exec::begin`].
pub async fn sync(
    container: &Container,
    command: Vec<String>,
    timeout: Duration,
) -> Result<cri::ExecSyncResponse, CriError> {
    let plan = Plan {
        command,
        ..Plan::default()
    };
    let exec = Exec::begin(container, &plan).await?;
    let work = output(&exec);
    if timeout.is_zero() {
        return work.await;
    }
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => {
            exec.kill().await;
            Err(CriError::deadline(format!(
                "the command {:?} in container {} did not end within {} s and was killed",
                plan.command.first().map(String::as_str).unwrap_or_default(),
                container.id,
                timeout.as_secs()
            )))
        }
    }
}

async fn output(exec: &Exec) -> Result<cri::ExecSyncResponse, CriError> {
    let stdout = exec.stream(StreamKind::Stdout).await?;
    let stderr = exec.stream(StreamKind::Stderr).await?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let progress = AtomicU64::new(0);
    let status = {
        let both = async {
            tokio::join!(
                read(stdout, &mut out, &progress),
                read(stderr, &mut err, &progress)
            );
        };
        tokio::pin!(both);
        let waiting = exec.wait();
        tokio::pin!(waiting);
        // The output is read while the process runs, and to its end afterwards.
        // must-test: exec and logs that lose the tail of the output when the process ends quickly
        let mut status = None;
        let mut complete = false;
        while status.is_none() {
            tokio::select! {
                ended = &mut waiting => status = Some(ended?),
                () = &mut both, if !complete => complete = true,
            }
        }
        while !complete {
            let before = progress.load(Ordering::Relaxed);
            if tokio::time::timeout(SILENCE, &mut both).await.is_ok() {
                complete = true;
            } else if progress.load(Ordering::Relaxed) == before {
                break;
            }
        }
        status.unwrap_or_default()
    };
    Ok(cri::ExecSyncResponse {
        stdout: out,
        stderr: err,
        exit_code: status.code,
    })
}

/// Reads a stream to its end and keeps its first [`MAX_OUTPUT`] bytes.
async fn read(mut stream: UnixStream, kept: &mut Vec<u8>, progress: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return,
            Ok(n) => {
                progress.fetch_add(n as u64, Ordering::Relaxed);
                let room = MAX_OUTPUT - kept.len();
                kept.extend_from_slice(&buffer[..n.min(room)]);
            }
            Err(error) => {
                tracing::debug!(%error, "a stream of a command broke off");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    // must-test: `kubectl cp` and exec hang on large streams: what is over the limit is still read
    #[tokio::test]
    async fn output_over_the_limit_is_read_and_dropped() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let mut kept = Vec::new();
        let progress = AtomicU64::new(0);
        let chunk = vec![7; 1 << 20];
        let write = async {
            for _ in 0..17 {
                writer.write_all(&chunk).await.unwrap();
            }
            drop(writer);
        };
        tokio::join!(write, read(reader, &mut kept, &progress));
        assert_eq!(kept.len(), MAX_OUTPUT);
        assert_eq!(progress.load(Ordering::Relaxed), 17 << 20);
    }
}
