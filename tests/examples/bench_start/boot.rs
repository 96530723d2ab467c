//! From the start of a VMM to an agent that is ready, with the same kernel, initramfs and command line.
//!
//! Every VMM is asked the same way: the serial console is a pipe, and the clock stops at the agent's line there. A machine
//! has a console and what its VMM adds of itself: no disk, no network, no share, no vsock.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use caisson_tests::runtime::Result;
use caisson_vmm_protocol::{CONTROL_FD, Channel, FdIndex, Reply, Request, VmConfig};
use nix::unistd::dup2_raw;

use crate::Bench;
use crate::figures::{Aim, Line, Samples, Unit};

/// What Caisson gives its guests, but for the early console: that is for people, and costs a VMM the more the longer
/// its map of memory is.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check random.trust_cpu=on \
                       cryptomgr.notests pci=off caisson.log=info";
const MEMORY_MIB: u32 = 128;
/// The agent's line.
const READY: &str = " ready after ";
/// How long a guest may take for it.
const PATIENCE: Duration = Duration::from_secs(60);

impl Bench {
    /// Boots machines of Caisson's VMM and of the other one in turn.
    pub fn boot(&mut self) -> Result<()> {
        let build = self.options.build.clone();
        let (peer, other) = match &self.options.firecracker {
            Some(binary) => {
                let config = self.options.logs.join("firecracker.json");
                ("Firecracker", firecracker(binary, &build, &config)?)
            }
            None => ("qemu -M microvm", qemu(&build)),
        };
        let other = || -> Result<Machine> {
            let (program, arguments) = &other;
            let mut command = Command::new(program);
            command.args(arguments).stdin(Stdio::null());
            let (console, writer) = std::io::pipe()?;
            command.stderr(writer.try_clone()?).stdout(writer);
            Machine::start(command, console)
        };
        let ours = || caisson(&build);
        let mut times = [Samples::default(), Samples::default()];
        for round in 0..=self.options.rounds {
            for number in [round % 2, (round + 1) % 2] {
                let (name, took) = match number {
                    0 => ("Caisson", self.try_twice("Caisson's VMM", ours)?),
                    _ => (peer, self.try_twice(peer, other)?),
                };
                eprintln!("{name}: booted in {:.0} ms", took * 1e3);
                // The first reads the files.
                if round > 0 {
                    times[number].push(took);
                }
            }
        }
        let [ours, theirs] = times;
        self.report.line(Line {
            what: "VMM start to agent ready".into(),
            unit: Unit::Seconds,
            ours,
            peer,
            theirs,
            aim: Aim::AtMost(1.0),
        });
        Ok(())
    }

    /// The time that a machine takes, in seconds. One that fails is started once more, and that is told.
    fn try_twice(&mut self, name: &str, start: impl Fn() -> Result<Machine>) -> Result<f64> {
        match start().and_then(Machine::ready) {
            Ok(took) => Ok(took),
            Err(error) => {
                self.report
                    .note(format!("{name} was started once more after: {error}"));
                start().and_then(Machine::ready)
            }
        }
    }
}

/// A VMM that was started. It is killed when it is dropped.
struct Machine {
    begun: Instant,
    child: Child,
    console: PipeReader,
    /// Caisson's control channel, which must stay open, and has its answer.
    control: Option<Channel>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    fn start(mut command: Command, console: PipeReader) -> Result<Self> {
        let begun = Instant::now();
        let child = command.spawn().map_err(|error| {
            let program = command.get_program().display();
            format!("{program} cannot be run: {error}")
        })?;
        // The command has the pipe's other end, which only the child is to have.
        drop(command);
        Ok(Self {
            begun,
            child,
            console,
            control: None,
        })
    }

    /// Waits until the agent is ready; the seconds since the start.
    fn ready(mut self) -> Result<f64> {
        let (tell, told) = mpsc::channel();
        let console = self.console.try_clone()?;
        let reader = std::thread::spawn(move || {
            let mut all = String::new();
            for line in BufReader::new(console).lines() {
                let Ok(line) = line else { break };
                if line.contains(READY) {
                    let _ = tell.send(Ok(Instant::now()));
                    return;
                }
                all += &line;
                all.push('\n');
            }
            let _ = tell.send(Err(all));
        });
        let heard = told.recv_timeout(PATIENCE);
        let answer = match (&heard, &mut self.control) {
            (Ok(Ok(_)), _) | (_, None) => None,
            (_, Some(control)) => control.recv::<Reply>().ok().map(|frame| frame.message),
        };
        let begun = self.begun;
        // The console ends with its process, and the reader with the console.
        drop(self);
        let _ = reader.join();
        match heard {
            Ok(Ok(when)) => Ok((when - begun).as_secs_f64()),
            Ok(Err(console)) => Err(format!(
                "the machine ended before its agent was ready ({answer:?}):\n{console}"
            )
            .into()),
            Err(_) => {
                Err(format!("the agent was not ready within {PATIENCE:?} ({answer:?})").into())
            }
        }
    }
}

/// Starts Caisson's VMM as the daemon does, with a control socket, and asks it to boot.
fn caisson(build: &Path) -> Result<Machine> {
    let (console, writer) = std::io::pipe()?;
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    let theirs: OwnedFd = theirs.into();
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut lend = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u16 - 1)
    };
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let (kvm, kernel) = (
        lend(kvm.into()),
        lend(File::open(build.join("vmlinux"))?.into()),
    );
    let config = VmConfig {
        memory_mib: MEMORY_MIB,
        initramfs: Some(lend(File::open(build.join("initramfs.cpio"))?.into())),
        cmdline: CMDLINE.into(),
        ..VmConfig::bare("bench", kvm, kernel, lend(writer.into()))
    };
    let mut command = Command::new(build.join("caisson-vmm"));
    command.stdin(Stdio::null());
    let control = theirs.as_raw_fd();
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe, on a descriptor that is open until
    // the child was made: the parent drops it below.
    unsafe {
        command.pre_exec(move || {
            let copy = dup2_raw(BorrowedFd::borrow_raw(control), CONTROL_FD)?;
            // It is the new program's.
            let _ = copy.into_raw_fd();
            Ok(())
        });
    }
    let mut machine = Machine::start(command, console)?;
    drop(theirs);
    let mut channel = Channel::new(ours);
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    channel.send(&Request::Boot(Box::new(config)), &raw)?;
    machine.control = Some(channel);
    Ok(machine)
}

/// A program and its arguments.
type Arguments = (PathBuf, Vec<String>);

fn qemu(build: &Path) -> Arguments {
    let memory = MEMORY_MIB.to_string();
    let [kernel, initramfs] = files(build);
    let arguments = [
        "-M",
        "microvm,x-option-roms=off,rtc=off,pit=off,pic=off",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        "-kernel",
        &kernel,
        "-initrd",
        &initramfs,
        "-append",
        CMDLINE,
    ];
    let arguments = arguments.map(str::to_owned).to_vec();
    ("qemu-system-x86_64".into(), arguments)
}

/// Firecracker with a configuration file and without its API's socket; its console is its standard output.
fn firecracker(binary: &Path, build: &Path, file: &Path) -> Result<Arguments> {
    let [kernel, initramfs] = files(build);
    let config = serde_json::json!({
        "boot-source": { "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": CMDLINE },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
    });
    std::fs::write(file, config.to_string())?;
    let arguments = ["--no-api", "--config-file", &file.display().to_string()];
    Ok((binary.into(), arguments.map(str::to_owned).to_vec()))
}

fn files(build: &Path) -> [String; 2] {
    ["vmlinux", "initramfs.cpio"].map(|name| build.join(name).display().to_string())
}
