//! Guests that attack: each device's registers and rings, the streams, the file server. A guest here is a machine
//! without a kernel that runs a test's steps ([`machine`]), or Linux where it takes a file system.
//!
//! An attack has failed if the pod process goes on until the guest switches the machine off, or ends with a reason that
//! names the guest's fault; and if of the host's files nothing but the share was read or written.

mod driver;
mod files;
mod machine;
mod registers;
mod rings;
mod streams;
#[path = "../support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use caisson_vmm_protocol::{
    DiskConfig, ExitReason, JailConfig, NetConfig, ShareConfig, VsockConfig,
};

use machine::Program;
use support::host::{Shared, run, tap, vhost_net};
use support::{Spec, Vm};

/// What no guest may see.
const SECRET: &str = "a secret of the host";
/// The most bytes of a console that are kept here.
const CONSOLE_LIMIT: u64 = 16 << 10;

/// The host of the guests: what their devices work on, and what must stay as it is.
pub struct Host {
    shared: Shared,
    taps: [OwnedFd; 2],
}

/// How an attack ended.
#[derive(Debug)]
pub struct End {
    /// Why.
    pub reason: ExitReason,
    /// What it has printed.
    pub console: String,
}

impl Host {
    /// `None`, loudly, where there is no KVM.
    pub fn new() -> Option<Self> {
        support::kernel("vmlinux")?;
        let shared = Shared::new();
        fs::create_dir(shared.path("share")).unwrap();
        fs::write(shared.path("secret"), SECRET).unwrap();
        let taps = ["caisson-host", "caisson-kernel"].map(|name| {
            let tap = tap(name);
            run("ip", &["link", "set", name, "up"]);
            tap
        });
        Some(Self { shared, taps })
    }

    /// The directory that guests share.
    pub fn share(&self) -> PathBuf {
        self.shared.path("share")
    }

    /// Gives a machine all devices, in the order of [`driver::DEVICES`], and a jail.
    pub fn equip(&self, spec: &mut Spec) {
        let disk = spec.dir.path().join("disk");
        fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let disk = File::options().read(true).write(true).open(disk).unwrap();
        let disk = DiskConfig {
            serial: "disk".into(),
            file: spec.lend(disk),
            read_only: false,
        };
        spec.config.disks.push(disk);
        spec.config.layers = Some("layers".into());
        for (number, tap) in (9..).zip(&self.taps) {
            let tap = spec.lend(tap.try_clone().unwrap());
            let vhost = if number == 9 { None } else { vhost_net() };
            let vhost = vhost.map(|device| spec.lend(device));
            spec.config.nets.push(NetConfig {
                tap,
                vhost,
                mac: format!("02:00:00:00:00:{number:02}"),
                mtu: 1500,
            });
        }
        let listener = UnixListener::bind(spec.dir.path().join("vsock")).unwrap();
        spec.config.vsock = Some(VsockConfig {
            cid: 3,
            listener: Some(spec.lend(listener)),
        });
        let root = File::open(self.share()).unwrap();
        spec.config.share = Some(ShareConfig {
            tag: "share".into(),
            root: spec.lend(root),
        });
        spec.config.jail = Some(JailConfig {
            uid: 70_001,
            gid: 70_002,
        });
        spec.config.console_limit = CONSOLE_LIMIT;
    }

    /// Boots a machine that only does these steps.
    pub fn boot(&self, steps: impl FnOnce(&mut Program)) -> Vm {
        let mut program = Program::default();
        steps(&mut program);
        let kernel = tempfile::NamedTempFile::new().unwrap();
        fs::write(kernel.path(), program.kernel()).unwrap();
        let mut spec = Spec::bare(kernel.path());
        spec.config.memory_mib = machine::MEMORY_MIB;
        self.equip(&mut spec);
        spec.boot().unwrap()
    }

    /// Waits for the end of a machine, which must be one that the guest can bring about.
    pub fn end(&self, name: &str, mut vm: Vm) -> End {
        let status = vm.wait();
        let console = vm.console();
        // A filter of system calls that is too narrow shows here, too.
        assert!(
            status.code().is_some(),
            "{name}: {status}; the console:\n{console}"
        );
        let reason = vm.exit_file();
        match (status.code(), &reason) {
            (Some(0), ExitReason::PoweredOff) => {}
            (Some(13), ExitReason::GuestError(_)) | (Some(10), ExitReason::Reset) => {}
            other => panic!("{name}: {other:?}, {status}; the console:\n{console}"),
        }
        assert!(!console.contains(SECRET), "{name}:\n{console}");
        self.is_untouched(name);
        End { reason, console }
    }

    /// Nothing beside the share was changed or made.
    pub fn is_untouched(&self, name: &str) {
        let secret = fs::read_to_string(self.shared.path("secret")).unwrap();
        assert_eq!(secret, SECRET, "{name}");
        let entries = fs::read_dir(self.shared.0.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["secret", "share"], "{name}");
    }

    /// Runs an attack to its end.
    pub fn attack(&self, name: &str, steps: impl FnOnce(&mut Program)) -> End {
        let end = self.end(name, self.boot(steps));
        println!("{name}: {:?}", end.reason);
        end
    }

    /// Runs an attack that the machine must live through.
    pub fn survived(&self, name: &str, steps: impl FnOnce(&mut Program)) -> String {
        let end = self.attack(name, steps);
        assert_eq!(end.reason, ExitReason::PoweredOff, "{name}");
        assert!(end.console.ends_with("done\n"), "{name}: {}", end.console);
        end.console
    }
}
