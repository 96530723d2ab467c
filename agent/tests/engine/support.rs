//! Images, specs and containers for the tests.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::JoinHandle;

use caisson_agent::engine::spec::{Process, Spec};
use caisson_agent::engine::{Container, EngineError, Layer, RootFs, Stdio, paths};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde_json::{Value, json};

/// Where everything of these tests is; on the lab's real ext4.
pub const BASE: &str = "/var/lib/caisson-engine-test";

/// Where layers are mounted.
const LAYER_MOUNTS: &str = "/run/caisson-test/layers";

/// Where image volumes are mounted.
pub const VOLUMES: &str = "/run/caisson-test/volumes";

static LAYERS: OnceLock<Vec<Layer>> = OnceLock::new();

/// Makes the images, and says what is missing if they or containers cannot be made.
pub fn prepare() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".into());
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    for needed in ["memory", "cpu", "pids"] {
        if !controllers.split_whitespace().any(|one| one == needed) {
            return Err(format!("cgroup v2 has no {needed} controller here"));
        }
    }
    for needed in ["/bin/busybox", "/usr/bin/mkfs.erofs", "/dev/loop-control"] {
        if !Path::new(needed).exists() {
            return Err(format!("no {needed}"));
        }
    }
    // Nothing here takes longer; a hang ends as one.
    nix::unistd::alarm::set(600);
    fs::create_dir_all(BASE).unwrap();
    let base = PathBuf::from(BASE);
    paths::set(paths::Paths {
        // Short, so that 127 of them fit into a page.
        layers: LAYER_MOUNTS.into(),
        scratch: base.join("scratch"),
        containers: base.join("containers"),
        volumes: VOLUMES.into(),
        memory: base.join("memory"),
        ..paths::Paths::default()
    })
    .unwrap();
    let lower = image("lower", |root| {
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "echo", "id", "ls", "mkdir", "sleep", "true", "touch", "stat", "mount",
            "mknod", "dd", "tty", "stty", "hostname", "umount", "chown", "rm", "seq", "head",
            "grep", "date", "kill", "env", "readlink",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        for directory in ["proc", "sys", "dev", "tmp", "etc", "run"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        set_mode(&root.join("tmp"), 0o1777);
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(root.join("etc/replaced"), "lower\n").unwrap();
        fs::write(root.join("not-a-program"), "\x7fnothing a kernel runs\n").unwrap();
        set_mode(&root.join("not-a-program"), 0o755);
    });
    let upper = image("upper", |root| {
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/replaced"), "upper\n").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link-to-etc")).unwrap();
        std::os::unix::fs::symlink("../../../../../../..", root.join("link-up")).unwrap();
    });
    LAYERS.set(vec![lower, upper]).unwrap();
    Ok(())
}

fn set_mode(file: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

/// An EROFS image of what `fill` puts into a directory.
pub fn image(name: &str, fill: impl FnOnce(&Path)) -> Layer {
    let root = Path::new(BASE).join(format!("{name}.d"));
    let file = Path::new(BASE).join(format!("{name}.erofs"));
    let _ = fs::remove_dir_all(&root);
    let _ = fs::remove_file(&file);
    fs::create_dir_all(&root).unwrap();
    fill(&root);
    let made = Command::new("mkfs.erofs")
        .args([&file, &root])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    file.into()
}

pub fn layers() -> RootFs {
    RootFs {
        layers: LAYERS.get().unwrap().clone(),
        ..RootFs::default()
    }
}

/// A directory of the guest for bind mounts.
pub fn directory(name: &str) -> PathBuf {
    let path = Path::new(BASE).join("shared").join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// A new id.
pub fn id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A spec like those that a daemon makes, running a shell script.
pub fn spec(script: &str) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": capabilities, "permitted": capabilities, "effective": capabilities},
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}, {"type": "network"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/does-not-exist"],
            "readonlyPaths": ["/proc/sys", "/proc/irq"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    })
}

/// The namespaces of [`spec`] and more.
pub fn add_namespace(spec: &mut Value, kind: &str, path: &str) {
    let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
    list.retain(|one| one["type"] != kind);
    list.push(json!({"type": kind, "path": path}));
}

/// Adds a mount at the end.
pub fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// A pipe whose reading end is read to its end.
pub fn collector() -> (OwnedFd, JoinHandle<String>) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let thread = std::thread::spawn(move || {
        let mut text = Vec::new();
        File::from(read).read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    (write, thread)
}

/// A container with its collected output.
pub struct Running {
    pub container: Container,
    pub stdout: JoinHandle<String>,
    pub stderr: JoinHandle<String>,
}

pub fn create(spec: &Value) -> Result<Running, EngineError> {
    create_with(&id(), spec, layers())
}

pub fn create_with(id: &str, spec: &Value, rootfs: RootFs) -> Result<Running, EngineError> {
    let spec = Spec::parse(&serde_json::to_vec(spec).unwrap())?;
    let (out, stdout) = collector();
    let (err, stderr) = collector();
    let stdio = Stdio {
        stdin: None,
        stdout: Some(out),
        stderr: Some(err),
    };
    let (container, terminal) = Container::create(id, spec, rootfs, stdio)?;
    assert!(terminal.is_none());
    Ok(Running {
        container,
        stdout,
        stderr,
    })
}

pub fn start(spec: &Value) -> Running {
    let running = create(spec).unwrap();
    running.container.start().unwrap();
    running
}

/// How processes ended that nobody has asked for yet. As in a guest, everything that ends is waited for at once:
/// the first process of a PID namespace cannot end before.
static ENDED: Mutex<BTreeMap<i32, i32>> = Mutex::new(BTreeMap::new());

/// Waits for everything that has ended; whether anything is left that has not.
fn collect() -> bool {
    let mut ended = ENDED.lock().unwrap();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => drop(ended.insert(pid.as_raw(), code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                ended.insert(pid.as_raw(), 128 + signal as i32);
            }
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

/// Exit code, or 128 and the signal.
pub fn wait(pid: i32) -> i32 {
    until(|| {
        collect();
        ENDED.lock().unwrap().contains_key(&pid)
    });
    ENDED.lock().unwrap().remove(&pid).unwrap()
}

impl Running {
    /// Waits until the container's script has made `/tmp/ready`.
    pub fn ready(&self) {
        let file = format!("{BASE}/scratch/{}/upper/tmp/ready", self.container.id());
        until(|| Path::new(&file).exists());
    }

    /// Waits for its end and removes it.
    pub fn end(self) -> (i32, String, String) {
        let code = wait(self.container.pid());
        self.container.destroy().unwrap();
        (
            code,
            self.stdout.join().unwrap(),
            self.stderr.join().unwrap(),
        )
    }

    /// Runs one more process to its end.
    pub fn exec(&self, process: Value) -> (i32, String, String) {
        let (out, stdout) = collector();
        let (err, stderr) = collector();
        let process = Process::parse(&serde_json::to_vec(&process).unwrap()).unwrap();
        let stdio = Stdio {
            stdin: None,
            stdout: Some(out),
            stderr: Some(err),
        };
        let (pid, terminal) = self.container.exec(process, stdio).unwrap();
        assert!(terminal.is_none());
        let code = wait(pid);
        (code, stdout.join().unwrap(), stderr.join().unwrap())
    }
}

/// Runs a container to its end; its output, if it ended well.
pub fn output(spec: &Value) -> String {
    let (code, out, err) = start(spec).end();
    assert_eq!(code, 0, "{out}{err}");
    out
}

/// Waits for something to become true.
pub fn until(condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("it did not come true in 20 seconds");
}

/// Reads a terminal until a text appears.
pub fn read_until(terminal: &File, text: &str) -> String {
    let mut seen = String::new();
    let mut bytes = [0u8; 1024];
    let mut terminal = terminal;
    while !seen.contains(text) {
        match terminal.read(&mut bytes) {
            Ok(0) | Err(_) => panic!("the terminal ended after {seen:?}, before {text:?}"),
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&bytes[..length])),
        }
    }
    seen
}

pub fn type_in(mut terminal: &File, text: &str) {
    terminal.write_all(text.as_bytes()).unwrap();
}

/// Waits for helpers that have ended; says so if a process has not.
pub fn reap() {
    for _ in 0..100 {
        if !collect() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    println!("a process is left");
}

/// What could be left behind: mounts, loop devices, groups, files.
pub fn traces() -> Vec<String> {
    let mut traces: Vec<String> = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains(BASE) || line.contains(LAYER_MOUNTS))
        .map(str::to_owned)
        .collect();
    let list = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten();
        entries
            .map(|entry| entry.unwrap().path().display().to_string())
            .collect::<Vec<_>>()
    };
    traces.extend(list(LAYER_MOUNTS));
    for directory in ["scratch", "containers"] {
        traces.extend(list(&format!("{BASE}/{directory}")));
    }
    traces.extend(
        list("/sys/fs/cgroup/caisson")
            .into_iter()
            .filter(|path| path.contains("test-")),
    );
    for device in list("/sys/block") {
        if Path::new(&device).join("loop").exists() {
            traces.push(device);
        }
    }
    traces
}
