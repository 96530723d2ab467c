//! Plays the daemon for one machine: boots a kernel, prints its console, says how it ended.
//!
//! `boot KERNEL [INITRAMFS] [-- COMMAND LINE]`, with `CAISSON_VMM` naming the binary, `VCPUS` and `MEMORY_MIB`.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use caisson_vmm_protocol::{
    CONTROL_FD, Channel, Event, FdIndex, PROTOCOL_VERSION, Reply, Request, VmConfig,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut files = Vec::new();
    for argument in arguments.by_ref() {
        match argument.as_str() {
            "--" => break,
            _ => files.push(argument),
        }
    }
    let cmdline = arguments.collect::<Vec<_>>().join(" ");
    let number =
        |name: &str, default: u32| std::env::var(name).map_or(Ok(default), |value| value.parse());
    let binary = std::env::var("CAISSON_VMM")?;

    let (ours, theirs) = UnixStream::pair()?;
    let theirs = theirs.as_raw_fd();
    let mut command = Command::new(binary);
    // SAFETY: dup2 is async-signal-safe, and both descriptors are open in the child.
    unsafe {
        command.pre_exec(move || match libc::dup2(theirs, CONTROL_FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn()?;

    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut lend = |file: OwnedFd| {
        fds.push(file);
        FdIndex(fds.len() as u16 - 1)
    };
    let read_write = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    // SAFETY: a fresh descriptor, which nobody else owns.
    let console = unsafe { OwnedFd::from_raw_fd(libc::dup(1)) };
    let kvm = lend(read_write("/dev/kvm")?.into());
    let kernel = lend(File::open(files.first().ok_or("no kernel")?)?.into());
    let config = VmConfig {
        vcpus: number("VCPUS", 1)? as u8,
        memory_mib: number("MEMORY_MIB", 256)?,
        initramfs: match files.get(1) {
            Some(path) => Some(lend(File::open(path)?.into())),
            None => None,
        },
        cmdline: format!("console=ttyS0 {cmdline}"),
        ..VmConfig::bare("boot", kvm, kernel, lend(console))
    };
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut channel = Channel::new(ours);
    channel.send(&Request::Boot(Box::new(config)), &raw)?;
    match channel.recv::<Reply>()?.message {
        Reply::Done => {}
        other => return Err(format!("{other:?}").into()),
    }
    channel.send(
        &Request::Status {
            version: PROTOCOL_VERSION,
        },
        &[],
    )?;
    if let Reply::Status(status) = channel.recv::<Reply>()?.message {
        for span in status.timings {
            eprintln!(
                "{:>10} us  {:>8} us  {}",
                span.start_us, span.duration_us, span.step
            );
        }
    }
    channel.send(&Request::Watch, &[])?;
    channel.recv::<Reply>()?;
    loop {
        let event = channel.recv::<Event>()?.message;
        eprintln!("{event:?}");
        if let Event::Exited(_) = event {
            break;
        }
    }
    eprintln!("{}", child.wait()?);
    Ok(())
}
