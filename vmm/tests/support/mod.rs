//! Plays the daemon for one `caisson-vmm` process, with a busybox initramfs whose script is the test's.

// Each test program uses its part of this.
#![allow(dead_code)]

mod cpio;
pub mod host;

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use caisson_vmm_protocol::{
    CONTROL_FD, Channel, Event, ExitReason, FdIndex, PROTOCOL_VERSION, Reply, Request, VmConfig,
    VmStatus,
};
use tempfile::TempDir;

/// How long a guest may take for what a test waits for; the lab is an emulated machine.
pub const LIMIT: Duration = Duration::from_secs(180);

/// The binary under test.
pub fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_caisson-vmm"))
}

/// Where the guest kernel is: what `scripts/build` made. `None`, loudly, where KVM does not work.
pub fn kernel(name: &str) -> Option<PathBuf> {
    let probe = Command::new(binary()).arg("probe").output().unwrap();
    if !probe.status.success() {
        eprintln!(
            "skipped: {}; scripts/test runs this in the KVM lab",
            String::from_utf8_lossy(&probe.stdout).trim()
        );
        return None;
    }
    let build =
        std::env::var("CAISSON_BUILD").expect("CAISSON_BUILD names what scripts/build made");
    Some(Path::new(&build).join(name))
}

/// A machine to be booted.
pub struct Spec {
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
    pub dir: TempDir,
}

impl Spec {
    /// A machine with this kernel whose init is a busybox shell script.
    pub fn new(kernel: &Path, script: &str) -> Self {
        Self::with_programs(kernel, script, &[])
    }

    /// The same with these programs of the host: where they are to be, and where they are.
    pub fn with_programs(kernel: &Path, script: &str, programs: &[(&str, &Path)]) -> Self {
        let mut spec = Self::bare(kernel);
        let initramfs = spec.dir.path().join("initramfs.cpio");
        fs::write(&initramfs, cpio::busybox(script, programs)).unwrap();
        spec.config.initramfs = Some(spec.lend(File::open(&initramfs).unwrap()));
        spec
    }

    /// A machine with this kernel and nothing to go with it.
    pub fn bare(kernel: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let console = File::create(dir.path().join("console")).unwrap();
        let listener = UnixListener::bind(dir.path().join("control")).unwrap();
        let mut spec = Self {
            config: VmConfig {
                cmdline: "console=ttyS0 quiet pci=off panic=-1".into(),
                ..VmConfig::bare("test", FdIndex(0), FdIndex(0), FdIndex(0))
            },
            fds: Vec::new(),
            dir,
        };
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        spec.config.kvm = spec.lend(kvm.unwrap());
        spec.config.kernel = spec.lend(File::open(kernel).unwrap());
        spec.config.console = spec.lend(console);
        spec.config.control_listener = Some(spec.lend(listener));
        let exit_file = File::create(spec.dir.path().join("exit")).unwrap();
        spec.config.exit_file = Some(spec.lend(exit_file));
        spec
    }

    /// Adds a descriptor to those that go with the boot request.
    pub fn lend(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.fds.push(fd.into());
        FdIndex(self.fds.len() as u16 - 1)
    }

    /// Starts the process and asks it to boot.
    pub fn boot(self) -> Result<Vm, String> {
        let (child, channel) = spawn();
        let mut vm = Vm {
            child,
            channel,
            dir: self.dir,
        };
        let raw: Vec<_> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let boot = Request::Boot(Box::new(self.config));
        vm.channel.send(&boot, &raw).unwrap();
        match vm.channel.recv::<Reply>().unwrap().message {
            Reply::Done => Ok(vm),
            Reply::Error { message } => {
                assert_eq!(vm.wait().code(), Some(1), "{message}");
                Err(message)
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A `caisson-vmm` with a control socket.
pub fn spawn() -> (Child, Channel) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs_fd = theirs.as_raw_fd();
    let mut command = Command::new(binary());
    // SAFETY: dup2 is async-signal-safe, and both descriptors are open in the child.
    unsafe {
        command.pre_exec(move || match libc::dup2(theirs_fd, CONTROL_FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let child = command.spawn().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    (child, Channel::new(ours))
}

/// A machine that was booted. It is killed when it is dropped.
pub struct Vm {
    pub child: Child,
    pub channel: Channel,
    pub dir: TempDir,
}

impl Vm {
    pub fn ask(&mut self, request: &Request) -> Reply {
        self.channel.send(request, &[]).unwrap();
        self.channel.recv::<Reply>().unwrap().message
    }

    /// Another control connection, as a daemon that was started anew makes it.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("control")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    pub fn status(&mut self) -> VmStatus {
        match self.ask(&Request::Status {
            version: PROTOCOL_VERSION,
        }) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.path().join("console")).unwrap();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until the console has this text.
    pub fn wait_for(&self, text: &str) {
        let begun = Instant::now();
        while !self.console().contains(text) {
            assert!(
                begun.elapsed() < LIMIT,
                "no {text:?} on the console:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the machine's end by the events on a connection of its own.
    pub fn reason(&self) -> ExitReason {
        let mut channel = Channel::new(self.connect());
        channel.send(&Request::Watch, &[]).unwrap();
        assert!(matches!(
            channel.recv::<Reply>().unwrap().message,
            Reply::Done
        ));
        loop {
            if let Event::Exited(reason) = channel.recv::<Event>().unwrap().message {
                return reason;
            }
        }
    }

    /// The same from the exit file, once the process is gone.
    pub fn exit_file(&self) -> ExitReason {
        let json = fs::read(self.dir.path().join("exit")).unwrap();
        serde_json::from_slice(&json).unwrap()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                begun.elapsed() < LIMIT,
                "the process does not end; its console:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
