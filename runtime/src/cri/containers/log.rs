//! Log files: the daemon opens them, the pod process writes them.

use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::super::CriError;
use super::super::registry::Container;
use crate::store::ContainerState;

/// Opens a container's log for appending, and makes it and its directories where they are missing.
///
/// # Errors
/// The file cannot be opened; a symbolic link in its place is not followed.
pub async fn open(path: &Path) -> Result<Option<OwnedFd>, CriError> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let path: PathBuf = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let opened = path
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| {
                std::fs::OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o640)
                    .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                    .open(&path)
            });
        opened
            .map(|file| Some(OwnedFd::from(file)))
            .map_err(|error| {
                CriError::internal(format!("cannot open the log {}: {error}", path.display()))
            })
    })
    .await
    .unwrap_or_else(|error| Err(CriError::internal(format!("cannot open the log: {error}"))))
}

/// Goes on in a new file at the same path, after a rotation (CRI `ReopenContainerLog`).
///
/// # Errors
/// FAILED_PRECONDITION for a container that does not run; the file cannot be opened or handed over.
pub async fn reopen(container: &Container) -> Result<(), CriError> {
    let record = container.record();
    if record.state != ContainerState::Running {
        return Err(CriError::precondition(format!(
            "container {} does not run, so its log is closed",
            container.id
        )));
    }
    if let Some(file) = open(&record.log_path).await? {
        let sandbox = container.pod.ready()?;
        sandbox.reopen_log(&container.id, file).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    #[tokio::test]
    async fn a_log_is_made_appended_and_never_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/0.log");
        for _ in 0..2 {
            let fd = open(&path).await.unwrap().unwrap();
            std::fs::File::from(fd).write_all(b"x").unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"xx");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !0o640, 0);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(open(&link).await.is_err());
        assert!(open(Path::new("")).await.unwrap().is_none());
    }
}
