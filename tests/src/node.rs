//! A node: a daemon with directories, a network and an image of its own.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use caisson_proto::cli::cli_client::CliClient;
use caisson_proto::cri;
use caisson_proto::cri::image_service_client::ImageServiceClient;
use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::{IMAGE, Pod, Traces};

/// The bridge of the tests' pods.
pub const BRIDGE: &str = "caisson-test0";

/// What a test wants otherwise than usual.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// Another guest kernel.
    pub kernel: Option<PathBuf>,
    /// Durable state here.
    pub root: Option<PathBuf>,
    /// Run the daemon where there is no /dev/kvm.
    pub hide_kvm: bool,
    /// No CNI configuration.
    pub no_network: bool,
    /// Another CNI configuration; `{dir}` in it is the node's directory. Its plugins are also looked for in
    /// `{dir}/plugins`, first.
    pub network: Option<String>,
    /// Seconds that a CNI plugin may take.
    pub plugin_seconds: Option<u32>,
    /// Do not load the image.
    pub no_image: bool,
    /// Allow pods on the host.
    pub allow_host: bool,
    /// More lines for the `[microvm]` part of the configuration.
    pub microvm: String,
    /// Layers have fs-verity: for a root on a disk that has it.
    pub verity: bool,
}

type Clients = (
    RuntimeServiceClient<Channel>,
    ImageServiceClient<Channel>,
    CliClient<Channel>,
    Channel,
);

/// A running daemon. Dropping it ends the daemon and every pod process.
pub struct Node {
    /// CRI's pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// CRI's images.
    pub images: ImageServiceClient<Channel>,
    /// What the command line uses beside CRI.
    pub cli: CliClient<Channel>,
    /// The connection under them, for other clients.
    pub channel: Channel,
    dir: TempDir,
    state: TempDir,
    root: PathBuf,
    options: NodeOptions,
    daemon: Child,
    before: Traces,
}

impl Node {
    /// A node as most tests want it; `None`, said aloud, where KVM does not work.
    pub async fn start() -> Option<Self> {
        Self::start_with(NodeOptions::default()).await
    }

    /// A node that has pods on the host, too.
    pub async fn start_allowing_host() -> Option<Self> {
        let options = NodeOptions {
            allow_host: true,
            ..NodeOptions::default()
        };
        Self::start_with(options).await
    }

    /// A node with options.
    pub async fn start_with(options: NodeOptions) -> Option<Self> {
        let probe = Command::new(build().join("caisson-vmm"))
            .arg("probe")
            .output()
            .expect("caisson-vmm probe runs");
        let probe: serde_json::Value =
            serde_json::from_slice(&probe.stdout).expect("the probe answers in JSON");
        if probe["works"] != true {
            eprintln!("skipped: needs KVM: {}", probe["reason"]);
            return None;
        }
        let before = Traces::now();
        let dir = tempfile::Builder::new()
            .prefix("caisson-test-")
            .tempdir_in("/var/lib")
            .expect("a directory in /var/lib");
        let state = tempfile::Builder::new()
            .prefix("ct-")
            .tempdir_in("/run")
            .expect("a directory in /run");
        let root = options
            .root
            .clone()
            .unwrap_or_else(|| dir.path().join("root"));
        configure(dir.path(), state.path(), &root, &options);
        let daemon = spawn(dir.path(), &options, None);
        let (runtime, images, cli, channel) = clients(&state.path().join("caisson.sock"));
        let mut node = Self {
            runtime,
            images,
            cli,
            channel,
            dir,
            state,
            root,
            options,
            daemon,
            before,
        };
        node.wait_until_serving().await;
        if !node.options.no_image {
            node.load_image();
        }
        Some(node)
    }

    /// Loads the tests' image.
    pub fn load_image(&self) {
        let archive = image_archive(self.dir.path());
        let loaded = self.caisson(&["load", "--name", IMAGE, &archive.to_string_lossy()]);
        assert!(loaded.status.success(), "{loaded:?}");
    }

    /// Runs the `caisson` command against this node.
    pub fn caisson(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("caisson runs")
    }

    /// The `caisson` command against this node, to be run by the caller.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(build().join("caisson"));
        command
            .arg("--config")
            .arg(self.dir.path().join("config.toml"))
            .args(arguments);
        command
    }

    /// A directory of this node's for a test's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the daemon keeps its durable state.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the daemon keeps its run-time state.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// The directories of the pods of which there is something.
    pub fn pod_directories(&self) -> Vec<PathBuf> {
        let pods = entries(&self.state.path().join("pods"));
        pods.into_iter().map(PathBuf::from).collect()
    }

    /// The directory of a running pod.
    pub fn pod_directory(&self, pod: &Pod) -> PathBuf {
        self.state.path().join("pods").join(&pod.id[..24])
    }

    /// Kills the daemon (SIGKILL) and starts it again.
    pub async fn restart(&mut self) {
        self.restart_after(|_| ()).await;
    }

    /// Gives the node another CNI configuration, as in [`NodeOptions::network`].
    pub fn set_network(&self, list: &str) {
        write_network(self.dir.path(), list);
    }

    /// Kills the daemon (SIGKILL), lets `meanwhile` do something, and starts it again.
    pub async fn restart_after(&mut self, meanwhile: impl FnOnce(&Self)) {
        self.kill_daemon();
        meanwhile(self);
        self.start_again(None);
        self.wait_until_serving().await;
    }

    /// Starts a daemon in the place of one that is dead; one with debug assertions dies at the step named.
    pub fn start_again(&mut self, die_at: Option<&str>) {
        self.daemon = spawn(self.dir.path(), &self.options, die_at);
        (self.runtime, self.images, self.cli, self.channel) =
            clients(&self.state.path().join("caisson.sock"));
    }

    /// Ends the daemon (SIGKILL).
    pub fn kill_daemon(&mut self) {
        self.daemon.kill().expect("the daemon is killed");
        self.daemon.wait().expect("the daemon is waited for");
    }

    /// Waits until the daemon was killed by SIGKILL.
    pub async fn wait_for_death(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(exit) = self.daemon.try_wait().expect("the daemon can be asked") {
                assert_eq!(exit.signal(), Some(9), "{exit}: {}", self.daemon_log());
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the daemon does not die: {}",
                self.daemon_log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether the daemon has ended.
    pub fn is_dead(&mut self) -> bool {
        let exit = self.daemon.try_wait().expect("the daemon can be asked");
        exit.is_some()
    }

    /// The daemon's process ID.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.id()
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.state.path().join("caisson.sock")
    }

    /// The daemon's resident memory in bytes.
    pub fn daemon_memory(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.daemon.id()));
        let statm = statm.expect("the daemon runs");
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().expect("a number");
        pages * 4096
    }

    /// What the daemon has logged.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// Asserts that pods have left nothing on the machine since the node was started: the daemon's own process and
    /// directories apart, everything is as before.
    pub async fn assert_nothing_left(&self) {
        let limit = Duration::from_secs(10);
        let mut deadline = Instant::now() + limit;
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            // The machine of a template in the making is nobody's pod, and ends by itself.
            if self.makes_a_template() {
                deadline = Instant::now() + limit;
            }
            // A process that was killed may still be on its way out.
            assert!(
                Instant::now() < deadline,
                "left behind: {left:#?}\n{}",
                self.daemon_log()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left = Traces::now().since(&self.before);
        left.retain(|trace| !trace.contains(BRIDGE));
        for pods in [self.state.path().join("pods"), self.root.join("pods")] {
            left.extend(entries(&pods));
        }
        let leases = self.dir.path().join("leases/test");
        left.extend(
            entries(&leases)
                .into_iter()
                .filter(|lease| !lease.contains("last_reserved_ip") && !lease.ends_with("lock")),
        );
        left.extend(entries(&self.root.join("cni")));
        left
    }

    /// Waits until the daemon answers.
    pub async fn wait_until_serving(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let version = self.runtime.version(cri::VersionRequest::default()).await;
            let Err(status) = version else { return };
            if let Some(exit) = self.daemon.try_wait().expect("the daemon can be asked") {
                panic!("the daemon ended ({exit}): {}", self.daemon_log());
            }
            assert!(Instant::now() < deadline, "{status}\n{}", self.daemon_log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.daemon_log());
            for pod in entries(&self.state.path().join("pods")) {
                for file in ["vmm.log", "console.log", "exit.json"] {
                    let text = fs::read_to_string(Path::new(&pod).join(file)).unwrap_or_default();
                    let tail: Vec<_> = text.lines().rev().take(25).collect();
                    let tail: Vec<_> = tail.into_iter().rev().collect();
                    eprintln!("--- {pod}/{file}\n{}", tail.join("\n"));
                }
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // Whatever a failed test left: the next one starts clean.
        Traces::now().kill_new_processes(&self.before);
        for mount in Traces::now().mounts_below(self.state.path()) {
            let _ = nix::mount::umount2(mount.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// The directory with the programs under test.
pub(crate) fn build() -> PathBuf {
    let named = std::env::var_os("CAISSON_BUILD").map(PathBuf::from);
    named.expect("CAISSON_BUILD names the directory that scripts/build made")
}

/// A connection to a server of CRI on a unix socket, made with the first call. With a `window`, so many bytes of a
/// stream are taken before they are read.
pub fn dial(socket: &Path, window: Option<u32>) -> Channel {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .initial_stream_window_size(window)
        .connect_with_connector_lazy(connector)
}

/// A connection to the daemon, and the usual clients on it.
fn clients(socket: &Path) -> Clients {
    let channel = dial(socket, None);
    (
        RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
        ImageServiceClient::new(channel.clone()),
        CliClient::new(channel.clone()),
        channel,
    )
}

/// A CNI configuration with the tests' bridge: the version, the plugin that makes it, lists of address ranges, and what more
/// plugins there are, each after a comma.
pub fn bridged(version: &str, plugin: &str, ranges: &str, more: &str) -> String {
    let default = if ranges.contains('.') {
        "0.0.0.0/0"
    } else {
        "::/0"
    };
    format!(
        r#"{{"cniVersion": "{version}", "name": "test", "plugins": [
            {{"type": "{plugin}", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": false, "mtu": 1400,
              "ipam": {{"type": "host-local", "dataDir": "{{dir}}/leases", "ranges": [{ranges}],
                "routes": [{{"dst": "{default}"}}]}}}}{more}]}}"#
    )
}

/// Puts a CNI configuration in the place of the one that is there.
fn write_network(dir: &Path, list: &str) {
    let list = list.replace("{dir}", &dir.display().to_string());
    let file = dir.join("net.d/10-test.conflist");
    let new = file.with_extension("new");
    fs::write(&new, list).expect("a CNI configuration");
    fs::rename(new, file).expect("a CNI configuration");
}

fn configure(dir: &Path, state: &Path, root: &Path, options: &NodeOptions) {
    let conf = dir.join("net.d");
    fs::create_dir_all(&conf).expect("a directory for CNI");
    if !options.no_network {
        let usual = || {
            let ranges = r#"[{"subnet": "10.99.0.0/16"}], [{"subnet": "fd99::/64"}]"#;
            bridged("1.0.0", "bridge", ranges, "")
        };
        let list = options.network.clone().unwrap_or_else(usual);
        write_network(dir, &list);
    }
    let kernel = options
        .kernel
        .clone()
        .unwrap_or_else(|| build().join("vmlinux"));
    let text = format!(
        r#"
root = "{root}"
state = "{state}"
socket = "{state}/caisson.sock"
log_level = "info"
allow_host = {allow_host}

[host]
agent = "{build}/caisson-agent"
scratch_gib = 2

[microvm]
vmm = "{build}/caisson-vmm"
kernel = "{kernel}"
initramfs = "{build}/initramfs.cpio"
vcpus = 1
memory_mib = 192
scratch_gib = 2
{microvm}

[images]
verity = {verity}

[cni]
conf_dir = "{conf}"
bin_dirs = ["{plugins}", "/usr/lib/cni", "/opt/cni/bin"]
timeout_seconds = {plugin_seconds}
"#,
        plugins = dir.join("plugins").display(),
        plugin_seconds = options.plugin_seconds.unwrap_or(60),
        allow_host = options.allow_host,
        microvm = microvm(options),
        verity = options.verity,
        root = root.display(),
        state = state.display(),
        build = build().display(),
        kernel = kernel.display(),
        conf = conf.display(),
    );
    fs::write(dir.join("config.toml"), text).expect("a configuration");
}

fn spawn(dir: &Path, options: &NodeOptions, die_at: Option<&str>) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("daemon.log"))
        .expect("a log file");
    let caisson = build().join("caisson");
    let mut command = if options.hide_kvm {
        // A mount namespace of its own with a /dev that has everything a daemon needs, but no KVM.
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec"]).arg(
            "d=$(mktemp -d); mount -t tmpfs dev $d; mkdir $d/net $d/pts
             for n in null zero urandom random net/tun; do touch $d/$n; mount --bind /dev/$n $d/$n; done
             mount --move $d /dev; exec \"$@\"",
        );
        command.arg("sh").arg(caisson);
        command
    } else {
        Command::new(caisson)
    };
    if let Some(step) = die_at {
        command.env("CAISSON_DIE_AT", step);
    }
    command
        .arg("--config")
        .arg(dir.join("config.toml"))
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        .spawn()
        .expect("the daemon starts")
}

/// The lines of the `[microvm]` part that tests or who runs them ask for: with `CAISSON_TEMPLATES` pods are clones in
/// tests that do not care.
fn microvm(options: &NodeOptions) -> String {
    let mut lines = options.microvm.clone();
    if std::env::var_os("CAISSON_TEMPLATES").is_some() && !lines.contains("templates") {
        lines.push_str("\ntemplates = true");
    }
    lines
}

/// The image archive in this directory. It is made once by each program: in the lab that takes seconds.
fn image_archive(dir: &Path) -> PathBuf {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let archive = dir.join("busybox.tar");
    let bytes = BYTES.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo-image");
        let made = Command::new(script)
            .arg(&archive)
            .output()
            .expect("scripts/demo-image runs");
        assert!(made.status.success(), "{made:?}");
        fs::read(&archive).expect("the archive can be read")
    });
    fs::write(&archive, bytes).expect("the archive can be written");
    archive
}

fn entries(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path().to_string_lossy().into_owned()))
        .collect()
}
