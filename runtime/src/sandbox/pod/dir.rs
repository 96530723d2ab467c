//! Where a pod has its files on the host.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use caisson_vmm_protocol::{AGENT_SOCKET, STREAM_SOCKET};

use super::{PodConfig, SandboxError};
use crate::mounts;
use crate::steps::{self, Step};

/// How much of an ID names the pod's directory: enough to be unique, short enough for a socket's path.
const SHORT_ID: usize = 24;
/// The longest path of a unix socket, its final NUL not counted (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// How much of the console's end is shown to a person.
const TAIL: u64 = 4096;
/// How many of its lines.
const LAST_LINES: usize = 12;
/// How a guest's kernel says that it cannot go on.
const PANIC: &str = "Kernel panic";

/// A pod's directories.
#[derive(Clone, Debug)]
pub struct PodDir {
    state: PathBuf,
    data: PathBuf,
}

impl PodDir {
    /// The directories of this pod, which need not exist.
    pub fn new(id: &str, config: &PodConfig) -> Result<Self, SandboxError> {
        let error = |cause: String| SandboxError::Start {
            id: id.to_owned(),
            step: "name its directory",
            cause,
        };
        let short = id
            .get(..SHORT_ID)
            .filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(|| error(format!("{id:?} is not a pod sandbox's ID")))?;
        let dir = Self {
            state: config.state_dir.join("pods").join(short),
            data: config.data_dir.join("pods").join(short),
        };
        let sockets = [dir.control(), dir.vsock(), dir.agent_streams()];
        let longest = sockets.iter().map(|path| path.as_os_str().len()).max();
        let longest = longest.unwrap_or_default();
        if longest > MAX_SOCKET_PATH {
            return Err(error(format!(
                "its longest socket's path would have {longest} bytes, more than {MAX_SOCKET_PATH}; configure a shorter state_dir"
            )));
        }
        Ok(dir)
    }

    /// Makes the directories, for root only.
    pub fn create(&self) -> io::Result<()> {
        for path in [&self.state, &self.data] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
        }
        steps::done(Step::DirectoriesMade);
        Ok(())
    }

    /// The socket on which the pod process takes requests.
    pub fn control(&self) -> PathBuf {
        self.state.join("control.sock")
    }

    /// The socket that leads to the guest's vsock ports.
    pub fn vsock(&self) -> PathBuf {
        self.state.join("vsock.sock")
    }

    /// The directory with the sockets of an agent that runs on the host.
    pub fn agent(&self) -> PathBuf {
        self.state.join("agent")
    }

    /// That agent's gRPC socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.agent().join(AGENT_SOCKET)
    }

    /// That agent's socket of raw streams.
    pub fn agent_streams(&self) -> PathBuf {
        self.agent().join(STREAM_SOCKET)
    }

    /// The empty directory on which that agent mounts its root, for itself alone.
    pub fn agent_root(&self) -> PathBuf {
        self.state.join("root")
    }

    /// The guest's serial console, or what the agent on the host says.
    pub fn console(&self) -> PathBuf {
        self.state.join("console.log")
    }

    /// What the pod process itself says.
    pub fn vmm_log(&self) -> PathBuf {
        self.state.join("vmm.log")
    }

    /// Why the machine ended, written by the pod process.
    pub fn exit(&self) -> PathBuf {
        self.state.join("exit.json")
    }

    /// The pod process's ID and start time.
    pub fn pid(&self) -> PathBuf {
        self.state.join("vmm.pid")
    }

    /// The path of the pod's cgroup.
    pub fn cgroup(&self) -> PathBuf {
        self.state.join("cgroup")
    }

    /// The path of the cgroup that its process is being moved from.
    pub fn cgroup_before(&self) -> PathBuf {
        self.state.join("cgroup.before")
    }

    /// The directory that the share shows; the daemon makes mount points here.
    pub fn share_source(&self) -> PathBuf {
        self.state.join("share.host")
    }

    /// The share: a read-only view of [`PodDir::share_source`]. The pod's volumes are mounted in the pod process's alone.
    pub fn share(&self) -> PathBuf {
        self.state.join("share")
    }

    /// The disk of the writable layers.
    pub fn scratch(&self) -> PathBuf {
        self.data.join("scratch.img")
    }

    /// The name by which this pod's cgroup is known.
    pub fn name(&self) -> String {
        let name = self.state.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The end of the console log, as text; empty if there is none.
    pub fn console_tail(&self) -> String {
        tail(&self.console()).unwrap_or_default()
    }

    /// The console's last lines in one, fit to be shown; of a kernel that panicked, from there on.
    pub fn last_words(&self) -> String {
        let console = self.console_tail();
        let lines: Vec<_> = console.lines().map(str::trim).collect();
        let panicked = lines.iter().rposition(|line| line.contains(PANIC));
        let from = panicked.unwrap_or_else(|| lines.len().saturating_sub(LAST_LINES));
        let last: Vec<String> = lines[from..]
            .iter()
            .filter(|line| !line.is_empty())
            .take(LAST_LINES)
            // It is the guest's word.
            .map(|line| line.chars().filter(|c| !c.is_control()).collect())
            .collect();
        last.join(" / ")
    }

    /// The end of what the pod process said; empty if it said nothing.
    pub fn vmm_tail(&self) -> String {
        tail(&self.vmm_log()).unwrap_or_default()
    }

    /// Removes all of it. Refuses while anything is mounted there: a volume must never be emptied.
    pub async fn remove(&self) -> io::Result<()> {
        let dir = self.clone();
        tokio::task::spawn_blocking(move || {
            for path in [&dir.state, &dir.data] {
                if let Some(mount) = mounts::below(path)?.next() {
                    return Err(io::Error::other(format!(
                        "{} is still mounted; unmount it",
                        mount.point.display()
                    )));
                }
                match fs::remove_dir_all(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
                if path == &dir.state {
                    steps::done(Step::StateRemoved);
                }
            }
            Ok(())
        })
        .await?
    }
}

/// Listens on a new socket, for root only.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(state: &Path) -> PodConfig {
        PodConfig {
            vmm: "/x".into(),
            state_dir: state.join("s"),
            data_dir: state.join("d"),
            cgroup_parent: String::new(),
        }
    }

    #[tokio::test]
    async fn directories_are_made_and_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PodDir::new(&"a1".repeat(32), &config(temp.path())).unwrap();
        dir.create().unwrap();
        fs::write(dir.console(), "x".repeat(5000) + "end").unwrap();
        assert!(dir.console_tail().ends_with("end"));
        assert_eq!(dir.console_tail().len() as u64, TAIL);
        let many: String = (0..30).map(|n| format!("line {n}\r\n")).collect();
        fs::write(dir.console(), &many).unwrap();
        assert!(dir.last_words().starts_with("line 18 / line 19 / "));
        let panic = format!("{many}\x1b[1mKernel panic - not syncing: x\nCPU: 0\n");
        fs::write(dir.console(), panic).unwrap();
        assert_eq!(
            dir.last_words(),
            "[1mKernel panic - not syncing: x / CPU: 0"
        );
        dir.remove().await.unwrap();
        assert!(!dir.state.exists() && !dir.data.exists());
        dir.remove().await.unwrap();
    }

    #[test]
    fn a_bad_id_and_a_long_path_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        assert!(PodDir::new("../../etc", &config(temp.path())).is_err());
        let long = temp.path().join("l".repeat(90));
        let error = PodDir::new(&"a1".repeat(32), &config(&long)).unwrap_err();
        assert!(error.to_string().contains("shorter state_dir"), "{error}");
    }
}
