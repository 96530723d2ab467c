//! An agent in namespaces of its own, an EROFS layer with busybox for its containers, and a client.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use caisson_proto::agent::agent_client::AgentClient;
use caisson_proto::agent::*;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Why these tests cannot run here, if they cannot.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let controllers =
        std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers.split_whitespace().any(|name| name == "memory") {
        return Some(
            "needs cgroup v2 with the memory controller; scripts/test runs this in the KVM lab"
                .into(),
        );
    }
    let tools = ["/bin/busybox", "/usr/bin/mkfs.erofs", "/usr/bin/unshare"];
    tools
        .into_iter()
        .find(|tool| !Path::new(tool).exists())
        .map(|tool| format!("needs {tool}"))
}

/// A running agent.
pub struct Agent {
    process: Child,
    directory: TempDir,
    /// Containers that were asked for: what the end has to clear away.
    ids: Mutex<Vec<String>>,
    /// Its gRPC client.
    pub client: AgentClient<Channel>,
}

impl Agent {
    /// Starts an agent that has not been asked for anything.
    pub async fn start() -> Self {
        // Not in the temporary directory, which may be below /run: the agent gets a /run of its own.
        let directory = tempfile::tempdir_in("/var/lib").unwrap();
        make_layer(directory.path());
        let grpc = directory.path().join("grpc.sock");
        let process = Command::new("unshare")
            .args([
                "-m",
                "-u",
                "-i",
                "-n",
                "-p",
                "-f",
                "--mount-proc",
                "--kill-child",
            ])
            .args([
                "sh",
                "-c",
                "mount -t tmpfs -o mode=755 tmpfs /run && exec \"$@\"",
                "sh",
            ])
            .arg(env!("CARGO_BIN_EXE_caisson-agent"))
            .args(["--listen", &format!("unix:{}", grpc.display())])
            .args([
                "--stream-listen",
                &format!("unix:{}", directory.path().join("streams.sock").display()),
            ])
            .spawn()
            .unwrap();
        let client = AgentClient::new(connect(grpc).await);
        Self {
            process,
            directory,
            ids: Mutex::default(),
            client,
        }
    }

    /// Starts an agent and sets its sandbox up.
    pub async fn ready() -> Self {
        let mut agent = Self::start().await;
        agent.client.setup_sandbox(sandbox()).await.unwrap();
        agent
    }

    /// The path of the layer with busybox.
    pub fn layer(&self) -> String {
        self.directory
            .path()
            .join("layer.erofs")
            .display()
            .to_string()
    }

    /// A request for a container.
    pub fn request(&self, id: &str, spec: &Value) -> CreateContainerRequest {
        self.ids.lock().unwrap().push(id.into());
        CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            rootfs: Some(RootFs {
                layers: vec![file_layer(&self.layer())],
            }),
            stdin: false,
            ..Default::default()
        }
    }

    /// Creates and starts a container.
    pub async fn run(&mut self, id: &str, spec: &Value) {
        let request = self.request(id, spec);
        self.client.create_container(request).await.unwrap();
        let request = StartContainerRequest {
            container_id: id.into(),
        };
        self.client.start_container(request).await.unwrap();
    }

    /// How a process ended.
    pub async fn wait(&mut self, id: &str, exec: &str) -> ExitStatus {
        let request = WaitRequest {
            container_id: id.into(),
            exec_id: exec.into(),
        };
        let answer = tokio::time::timeout(Duration::from_secs(60), self.client.wait(request)).await;
        answer
            .expect("it ends within a minute")
            .unwrap()
            .into_inner()
            .status
            .unwrap()
    }

    /// Starts an exec with all its streams.
    pub async fn exec(&mut self, id: &str, exec: &str, process: Value) {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: process.to_string().into_bytes(),
            stdin: true,
            stdout: true,
            stderr: true,
        };
        self.client.exec(request).await.unwrap();
    }

    /// Removes a container.
    pub async fn remove(&mut self, id: &str) {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        self.client.remove_container(request).await.unwrap();
    }

    /// Connects a stream; the agent's answer line if that is not `OK`.
    pub async fn try_stream(&self, id: &str, exec: &str, name: &str) -> Result<UnixStream, String> {
        let mut stream = UnixStream::connect(self.directory.path().join("streams.sock"))
            .await
            .unwrap();
        stream
            .write_all(format!("STREAM {id} {exec} {name}\n").as_bytes())
            .await
            .unwrap();
        let mut line = Vec::new();
        loop {
            match stream.read_u8().await.unwrap() {
                b'\n' => break,
                byte => line.push(byte),
            }
        }
        match String::from_utf8(line).unwrap().as_str() {
            "OK" => Ok(stream),
            line => Err(line.to_owned()),
        }
    }

    /// Connects a stream.
    pub async fn stream(&self, id: &str, exec: &str, name: &str) -> UnixStream {
        self.try_stream(id, exec, name).await.unwrap()
    }

    /// Reads a stream to its end.
    pub async fn read(&self, id: &str, exec: &str, name: &str) -> String {
        let mut text = String::new();
        let mut stream = self.stream(id, exec, name).await;
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    /// The agent's own process, in the PID namespace of the test.
    pub fn pid(&self) -> String {
        let unshare = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
        children.unwrap().trim().to_owned()
    }

    /// Runs a command in the agent's network, and gives its output.
    pub fn in_network(&self, arguments: &[&str]) -> String {
        let output = Command::new("nsenter")
            .args(["-t", &self.pid(), "-n"])
            .args(arguments)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command where the agent sees its mounts.
    pub fn in_mounts(&self, arguments: &[&str]) {
        let status = Command::new("nsenter")
            .args(["-t", &self.pid(), "-m"])
            .args(arguments)
            .status()
            .unwrap();
        assert!(status.success(), "{arguments:?}");
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until the agent's process has ended.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The agent was killed in the midst of its work; only its cgroups outlive its namespaces.
        for id in self
            .ids
            .lock()
            .unwrap()
            .drain(..)
            .filter(|id| !id.contains('/'))
        {
            let cgroup = Path::new("/sys/fs/cgroup/caisson").join(id);
            for _ in 0..100 {
                match std::fs::remove_dir(&cgroup) {
                    Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// Waits for the agent's socket and connects.
async fn connect(path: PathBuf) -> Channel {
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(&path).is_err() {
        assert!(
            Instant::now() < deadline,
            "the agent does not listen on {}",
            path.display()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    Endpoint::from_static("http://agent")
        .connect_with_connector(connector)
        .await
        .unwrap()
}

/// The smallest useful root file system, as an EROFS image.
fn make_layer(directory: &Path) {
    let root = directory.join("root");
    for name in ["bin", "dev", "proc", "sys", "tmp", "etc", "run"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "sleep", "dd", "head", "yes", "stty", "ls", "kill", "true", "touch",
        "tty",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
    let made = Command::new("mkfs.erofs")
        .arg(directory.join("layer.erofs"))
        .arg(&root)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

/// A small sandbox.
pub fn sandbox() -> SetupSandboxRequest {
    SetupSandboxRequest {
        hostname: "pod-0".into(),
        dns_servers: vec!["10.96.0.10".into()],
        dns_searches: vec!["default.svc.cluster.local".into()],
        entropy: vec![7; 64],
        shared_pid_namespace: true,
        scratch: Some(Scratch {
            disk_serial: String::new(),
            tmpfs_size_bytes: 256 << 20,
        }),
        ..Default::default()
    }
}

/// A process of a spec.
pub fn process(arguments: &[&str]) -> Value {
    json!({
        "args": arguments,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": { "uid": 0, "gid": 0 },
    })
}

/// The spec of a container that runs these arguments.
pub fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(arguments),
        "root": { "path": "rootfs", "readonly": false },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" }],
        },
    })
}

/// A layer that is a file.
pub fn file_layer(path: &str) -> Layer {
    Layer {
        source: Some(layer::Source::Path(path.into())),
    }
}
