//! A daemon that only has images, and a real registry for it: no KVM is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::node::build;
use crate::sha256;

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(120);

/// Debian's docker-registry, on a port of its own.
pub struct Registry {
    child: Child,
    address: String,
    dir: TempDir,
}

/// An image that was pushed.
pub struct Pushed {
    /// Its name with the registry.
    pub name: String,
    /// `sha256:` and the digest of its configuration.
    pub id: String,
    /// Diff ID (hexadecimal) and unpacked tree of each layer.
    pub layers: Vec<(String, PathBuf)>,
}

impl Registry {
    /// Starts it.
    pub fn start() -> Self {
        let dir = TempDir::new().expect("a directory");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("a port").to_string();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            dir.path().join("data").display()
        );
        fs::write(&config, text).expect("a configuration");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts (package docker-registry)");
        let registry = Self {
            child,
            address,
            dir,
        };
        let deadline = Instant::now() + LIMIT;
        while TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    /// Makes an image of these layers and pushes it as `name`. Of each number a layer is made, the same one each time.
    pub fn push(&self, name: &str, layers: &[u32]) -> Pushed {
        let made: Vec<Layer> = layers.iter().map(|number| self.layer(*number)).collect();
        let ids: Vec<String> = made
            .iter()
            .map(|l| format!("sha256:{}", l.diff_id))
            .collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": [name]},
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let config = config.to_string().into_bytes();
        let mut described = Vec::new();
        for layer in &made {
            let blob = fs::read(&layer.blob).expect("a layer");
            self.upload(name, &blob);
            described.push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": format!("sha256:{}", sha256(&blob)), "size": blob.len(),
            }));
        }
        self.upload(name, &config);
        let id = format!("sha256:{}", sha256(&config));
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": kind, "layers": described,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": id, "size": config.len()},
        });
        let url = format!("http://{}/v2/{name}/manifests/latest", self.address);
        let manifest = manifest.to_string().into_bytes();
        self.curl(
            &["-X", "PUT", "-H", &format!("Content-Type: {kind}"), &url],
            &manifest,
        );
        Pushed {
            name: format!("{}/{name}:latest", self.address),
            id,
            layers: made
                .into_iter()
                .map(|layer| (layer.diff_id, layer.tree))
                .collect(),
        }
    }

    fn layer(&self, number: u32) -> Layer {
        let tree = self.dir.path().join(format!("layer{number}"));
        let tar = tree.with_extension("tar");
        let blob = tree.with_extension("tar.gz");
        if !blob.exists() {
            fs::create_dir_all(tree.join("small")).expect("a directory");
            // Data that does not compress, other in each layer.
            let mut state = u64::from(number) + 1;
            let mut noise = |count: usize| -> Vec<u8> {
                let next = |_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 33) as u8
                };
                (0..count).map(next).collect()
            };
            fs::write(tree.join("big"), noise(600_000)).expect("a file");
            for at in 0..50 {
                fs::write(tree.join(format!("small/{at}")), noise(at * 120)).expect("a file");
            }
            std::os::unix::fs::symlink("big", tree.join("link")).expect("a link");
            run(Command::new("tar")
                .arg("-C")
                .arg(&tree)
                .arg("-cf")
                .arg(&tar)
                .arg("."));
            run(Command::new("gzip").arg("-1k").arg(&tar));
        }
        let diff_id = sha256(&fs::read(&tar).expect("a tar file"));
        Layer {
            tree,
            blob,
            diff_id,
        }
    }

    fn upload(&self, name: &str, blob: &[u8]) {
        let url = format!("http://{}/v2/{name}/blobs/uploads/", self.address);
        let begun = self.curl(&["-D", "-", "-o", "/dev/null", "-X", "POST", &url], b"");
        let begun = String::from_utf8_lossy(&begun.stdout).into_owned();
        let location = begun
            .lines()
            .find_map(|line| line.strip_prefix("Location: "))
            .unwrap_or_else(|| panic!("no place to upload to: {begun}"));
        let url = format!("{}&digest=sha256:{}", location.trim(), sha256(blob));
        let kind = "Content-Type: application/octet-stream";
        self.curl(&["-X", "PUT", "-H", kind, &url], blob);
    }

    fn curl(&self, arguments: &[&str], body: &[u8]) -> Output {
        let file = self.dir.path().join("body");
        fs::write(&file, body).expect("a file");
        let mut command = Command::new("curl");
        command
            .args(["-sSf", "--noproxy", "*", "--data-binary"])
            .arg(format!("@{}", file.display()))
            .args(arguments);
        run(&mut command)
    }
}

struct Layer {
    tree: PathBuf,
    blob: PathBuf,
    diff_id: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon with a store below a directory.
pub struct ImageNode {
    dir: PathBuf,
    state: TempDir,
    daemon: Option<Child>,
}

impl ImageNode {
    /// Starts one whose durable state is in `dir`.
    pub fn start(dir: &Path) -> Self {
        let state = tempfile::Builder::new()
            .prefix("ct-")
            .tempdir_in("/run")
            .expect("a directory in /run");
        let text = format!(
            "root = \"{}\"\nstate = \"{state}\"\nsocket = \"{state}/caisson.sock\"\n[images]\ncerts_dir = \"{state}/certs.d\"\n",
            dir.join("root").display(),
            state = state.path().display(),
        );
        fs::write(state.path().join("config.toml"), text).expect("a configuration");
        let mut node = Self {
            dir: dir.to_owned(),
            state,
            daemon: None,
        };
        node.serve();
        node
    }

    /// Starts the daemon, which must not run, and waits until it answers.
    pub fn serve(&mut self) {
        assert!(self.daemon.is_none(), "the daemon runs");
        let log = fs::File::create(self.state.path().join("daemon.log")).expect("a log file");
        let mut daemon = Command::new(build().join("caisson"))
            .arg("--config")
            .arg(self.state.path().join("config.toml"))
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon starts");
        let deadline = Instant::now() + LIMIT;
        while !self.caisson(&["images"]).status.success() {
            let ended = daemon.try_wait().expect("the daemon can be asked");
            assert!(ended.is_none(), "the daemon ended: {}", self.log());
            assert!(Instant::now() < deadline, "no answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.daemon = Some(daemon);
    }

    /// Kills the daemon: SIGKILL.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().expect("the daemon is killed");
        daemon.wait().expect("the daemon is waited for");
    }

    /// The `caisson` command against this node.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(build().join("caisson"));
        command
            .arg("--config")
            .arg(self.state.path().join("config.toml"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs it.
    pub fn caisson(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("caisson runs")
    }

    /// Runs it, and takes success for granted. Its standard output.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.caisson(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {output:?}\n{}",
            self.log()
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// What the daemon has logged since it was started.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state.path().join("daemon.log")).unwrap_or_default()
    }

    /// The store's directory.
    pub fn store(&self) -> PathBuf {
        self.dir.join("root/images")
    }

    /// Asserts that the store is whole: every image that is listed is one of `known` and complete, verified file for file by
    /// the kernel's reader and layer for layer by saving; and there is no file beside. Returns how many there are.
    pub fn assert_whole(&self, known: &[&Pushed]) -> usize {
        let listed = self.must(&["images", "--quiet"]);
        let ids: BTreeSet<&str> = listed.lines().collect();
        if !ids.is_empty() {
            let archive = self.state.path().join("saved.tar");
            let path = archive.to_string_lossy();
            let save = ["save", "-o", &path].into_iter().chain(ids.iter().copied());
            self.must(&save.collect::<Vec<_>>());
            fs::remove_file(&archive).expect("the archive goes");
        }
        let of_id = |id: &&str| {
            let image = known.iter().find(|image| image.id == *id);
            image.unwrap_or_else(|| panic!("{id} was never made"))
        };
        let layers: BTreeMap<_, _> = ids
            .iter()
            .flat_map(|id| &of_id(id).layers)
            .cloned()
            .collect();
        for (layer, tree) in &layers {
            assert_same_tree(&self.store().join(format!("layers/{layer}.erofs")), tree);
        }
        let names_of = |layer| [format!("{layer}.erofs"), format!("{layer}.recipe")];
        let expected: BTreeSet<_> = layers.keys().flat_map(names_of).collect();
        assert_eq!(
            names(&self.store().join("layers")),
            expected,
            "{}",
            self.log()
        );
        self.assert_blobs(&ids);
        assert_eq!(names(&self.store().join("tmp")), BTreeSet::new());
        ids.len()
    }

    /// Each image has its configuration, and a manifest for each way that it came by; there is nothing else.
    fn assert_blobs(&self, ids: &BTreeSet<&str>) {
        let (mut configurations, mut with_manifest) = (BTreeSet::new(), BTreeSet::new());
        for name in names(&self.store().join("blobs/sha256")) {
            let bytes = fs::read(self.store().join("blobs/sha256").join(&name)).expect("a blob");
            assert_eq!(sha256(&bytes), name);
            let id = format!("sha256:{name}");
            if ids.contains(&*id) {
                configurations.insert(id);
                continue;
            }
            let manifest: serde_json::Value =
                serde_json::from_slice(&bytes).expect("a manifest in JSON");
            let id = manifest["config"]["digest"].as_str().unwrap_or_default();
            assert!(
                ids.contains(id),
                "{name} belongs to no image: {}",
                self.log()
            );
            with_manifest.insert(id.to_owned());
        }
        let all: BTreeSet<_> = ids.iter().map(|id| (*id).to_owned()).collect();
        assert_eq!(
            (&configurations, &with_manifest),
            (&all, &all),
            "{}",
            self.log()
        );
    }
}

impl Drop for ImageNode {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Mounts an EROFS image and compares it with a directory.
fn assert_same_tree(image: &Path, tree: &Path) {
    let target = TempDir::new().expect("a directory");
    run(Command::new("mount")
        .args(["-t", "erofs", "-o", "loop,ro"])
        .args([image, target.path()]));
    let compared = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([tree, target.path()])
        .output();
    run(Command::new("umount").arg(target.path()));
    let compared = compared.expect("diff runs");
    assert!(
        compared.status.success(),
        "{}: {compared:?}",
        image.display()
    );
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("a program runs");
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}
