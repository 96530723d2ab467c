//! What a reboot of the node has ended: every pod, without anybody having been there to note it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use super::super::registry::Pod;
use super::super::{Context, CriError};
use super::identity;
use crate::store::SandboxState;

/// The kernel's name for the time since it was booted.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The reason of a pod that a reboot has ended.
const REASON: &str = "the node was rebooted";

/// Notes that the pods of the records do not run, if the node was booted since they were written. Their networks are
/// released behind the caller: the addresses are kept on disk, and nobody else gives them back.
///
/// # Errors
/// The disk fails.
pub async fn note(context: &Arc<Context>) -> Result<(), CriError> {
    let failed = |what: &str, path: &Path, cause: io::Error| {
        CriError::internal(format!("cannot {what} {}: {cause}", path.display()))
    };
    let now = fs::read_to_string(BOOT_ID).map_err(|e| failed("read", Path::new(BOOT_ID), e))?;
    let file = context.config.root.join("boot_id");
    let before = match fs::read_to_string(&file) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.map_err(|cause| failed("read", &file, cause))?),
    };
    if before.as_ref() == Some(&now) {
        return Ok(());
    }
    if before.is_some() {
        for pod in context.registry.pods() {
            ended(context, &pod).await?;
        }
    }
    // Last: whoever dies before it does all of this once more.
    write(&file, &now).map_err(|cause| failed("write", &file, cause))
}

async fn ended(context: &Arc<Context>, pod: &Arc<Pod>) -> Result<(), CriError> {
    let ran = pod.change(|record| {
        let ran = record.state == SandboxState::Ready;
        if ran {
            record.state = SandboxState::NotReady;
            record.reason = REASON.to_owned();
        }
        ran
    });
    if !ran {
        return Ok(());
    }
    tracing::warn!(pod = pod.id, "the pod has ended: {REASON}");
    context.registry.save_pod(pod).await?;
    let (context, pod) = (context.clone(), pod.clone());
    tokio::spawn(async move {
        let _apart = pod.lifecycle.write().await;
        let record = pod.record();
        if record.network.is_none() {
            return;
        }
        let released = async {
            context.network.teardown(&identity(&record)).await?;
            pod.change(|record| record.network = None);
            context.registry.save_pod(&pod).await
        };
        if let Err(error) = released.await {
            // StopPodSandbox tries again.
            tracing::warn!(pod = pod.id, %error, "the network of a pod from before the reboot is not released");
        }
    });
    Ok(())
}

fn write(file: &PathBuf, text: &str) -> io::Result<()> {
    let new = file.with_extension("new");
    let mut out = fs::File::create(&new)?;
    io::Write::write_all(&mut out, text.as_bytes())?;
    out.sync_all()?;
    fs::rename(new, file)
}
