//! Whole machines on a real KVM: how they start, go on and end.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use caisson_vmm_protocol::{
    Channel, DiskConfig, Event, ExitReason, JailConfig, PROTOCOL_VERSION, Reply, Request, VmState,
    VsockConfig,
};
use support::{Spec, kernel, spawn};

/// A test of machines with this kernel; skipped, and said so, where KVM does not work.
macro_rules! with_kernel {
    ($name:literal) => {
        match kernel($name) {
            Some(kernel) => kernel,
            None => return,
        }
    };
}

#[test]
fn an_elf_kernel_boots_and_powers_off() {
    let kernel = with_kernel!("vmlinux");
    let mut vm = Spec::new(&kernel, "echo hello from $(uname -s); poweroff -f")
        .boot()
        .unwrap();
    assert_eq!(vm.reason(), ExitReason::PoweredOff);
    assert_eq!(vm.wait().code(), Some(0));
    assert_eq!(vm.exit_file(), ExitReason::PoweredOff);
    assert!(
        vm.console().contains("hello from Linux"),
        "{}",
        vm.console()
    );
}

#[test]
fn a_bzimage_with_four_vcpus_boots_and_resets() {
    let kernel = with_kernel!("bzImage");
    let mut spec = Spec::new(
        &kernel,
        "echo cpus $(grep -c ^processor /proc/cpuinfo)
         echo siblings $(cat /sys/devices/system/cpu/cpu3/topology/core_siblings_list)
         echo clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
         reboot -f",
    );
    spec.config.vcpus = 4;
    spec.config.memory_mib = 512;
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(10));
    assert_eq!(vm.exit_file(), ExitReason::Reset);
    let console = vm.console();
    for line in ["cpus 4", "siblings 0-3", "clock kvm-clock"] {
        assert!(console.contains(line), "no {line:?} in:\n{console}");
    }
}

#[test]
fn memory_above_4_gib_and_32_vcpus_are_usable() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(
        &kernel,
        "echo cpus $(grep -c ^processor /proc/cpuinfo) $(grep MemTotal /proc/meminfo); poweroff -f",
    );
    spec.config.vcpus = 32;
    spec.config.memory_mib = 5120;
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.console());
    let console = vm.console();
    let words: Vec<_> = console.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "cpus").unwrap();
    assert_eq!(words[at + 1], "32");
    assert!(
        words[at + 3].parse::<u64>().unwrap() > 4_900 << 10,
        "{console}"
    );
}

#[test]
fn a_kernel_panic_is_told_as_such() {
    let kernel = with_kernel!("vmlinux");
    let mut vm = Spec::new(&kernel, "exit 7").boot().unwrap();
    assert_eq!(vm.wait().code(), Some(11));
    assert_eq!(vm.exit_file(), ExitReason::Panicked);
    assert!(
        vm.console().contains("Attempted to kill init"),
        "{}",
        vm.console()
    );
}

#[test]
fn a_paused_machine_does_nothing_and_goes_on() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(&kernel, "while :; do echo tick; usleep 10000; done");
    spec.config.vcpus = 2;
    let mut vm = spec.boot().unwrap();
    vm.wait_for("tick\ntick\n");
    for _ in 0..3 {
        assert!(matches!(vm.ask(&Request::Pause), Reply::Done));
        assert_eq!(vm.status().state, VmState::Paused);
        std::thread::sleep(Duration::from_millis(100));
        let before = vm.console().len();
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(vm.console().len(), before);
        assert!(matches!(vm.ask(&Request::Resume), Reply::Done));
        assert_eq!(vm.status().state, VmState::Running);
        let ticks = vm.console().matches("tick").count();
        vm.wait_for(&"tick\n".repeat(ticks + 3));
    }
    // A paused machine can be ended, too.
    assert!(matches!(vm.ask(&Request::Pause), Reply::Done));
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
}

#[test]
fn a_busy_guest_is_killed_at_once_and_by_a_signal_too() {
    let kernel = with_kernel!("vmlinux");
    for by_signal in [false, true] {
        let mut spec = Spec::new(&kernel, "echo busy; while :; do :; done");
        spec.config.vcpus = 2;
        let mut vm = spec.boot().unwrap();
        vm.wait_for("busy");
        if by_signal {
            // SAFETY: signals our own child, which has not been waited for.
            unsafe { libc::kill(vm.child.id() as i32, libc::SIGTERM) };
        } else {
            assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
        }
        assert_eq!(vm.wait().code(), Some(12));
        assert_eq!(vm.exit_file(), ExitReason::Killed);
    }
}

#[test]
fn a_damaged_kernel_is_refused_with_a_sentence() {
    let kernel = with_kernel!("vmlinux");
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("kernel");
    let good = fs::read(&kernel).unwrap();
    let noise = vec![0x5a; 1 << 20];
    for (bytes, sentence) in [
        (&good[..1 << 20], "kernel cannot be loaded"),
        (&noise, "kernel cannot be loaded"),
        (&good[..2], "damaged"),
    ] {
        fs::write(&damaged, bytes).unwrap();
        let error = Spec::new(&damaged, "").boot().err().unwrap();
        assert!(error.contains(sentence), "{error}");
    }
    let mut spec = Spec::new(&kernel, "");
    spec.config.memory_mib = 63;
    let error = spec.boot().err().unwrap();
    assert!(
        error.contains("memory_mib is 63, which is not 64 to 1048576"),
        "{error}"
    );
    // Not a KVM device at all.
    let mut spec = Spec::new(&kernel, "");
    spec.config.kvm = spec.lend(File::open("/dev/null").unwrap());
    let error = spec.boot().err().unwrap();
    assert!(error.contains("/dev/kvm"), "{error}");
}

#[test]
fn clients_that_misbehave_hurt_nobody() {
    let kernel = with_kernel!("vmlinux");
    let mut vm = Spec::new(&kernel, "echo up; sleep 1000").boot().unwrap();
    vm.wait_for("up");
    // Garbage gets an error, then the end of the connection.
    let mut garbage = vm.connect();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // What was sent and never read makes it a reset, which comes behind the answer.
    let _ = garbage.read_to_end(&mut answer);
    assert!(
        String::from_utf8_lossy(&answer).contains("error"),
        "{answer:?}"
    );
    // Others hang: some say nothing, some stop in the middle of a frame.
    let mut hanging = Vec::new();
    for n in 0..62 {
        let mut stream = vm.connect();
        stream.write_all(&[9, 0][..n % 3]).unwrap();
        hanging.push(stream);
    }
    assert_eq!(vm.status().state, VmState::Running);
    // There is an end to what is accepted; what comes after it is told so.
    for _ in 0..4 {
        hanging.push(vm.connect());
    }
    let mut over = Channel::new(vm.connect());
    let reply = over.recv::<Reply>().unwrap().message;
    assert!(
        matches!(&reply, Reply::Error { message } if message.contains("too many")),
        "{reply:?}"
    );
    drop(hanging);
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
}

#[test]
fn the_machine_survives_its_daemon() {
    let kernel = with_kernel!("vmlinux");
    let mut vm = Spec::new(&kernel, "echo up; sleep 1000").boot().unwrap();
    vm.wait_for("up");
    // The daemon dies: its end of the first connection closes.
    let (other, _) = std::os::unix::net::UnixStream::pair().unwrap();
    vm.channel = Channel::new(other);
    std::thread::sleep(Duration::from_millis(200));
    // A new one finds the machine by its listener.
    vm.channel = Channel::new(vm.connect());
    let status = vm.status();
    assert_eq!(
        (status.version, status.state),
        (PROTOCOL_VERSION, VmState::Running)
    );
    assert!(status.timings.iter().any(|span| span.step == "load kernel"));
    let wrong = vm.ask(&Request::Status { version: 99 });
    assert!(matches!(wrong, Reply::Error { message } if message.contains("99")));
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
    assert_eq!(vm.exit_file(), ExitReason::Killed);
}

#[test]
fn a_machine_that_nobody_boots_ends() {
    let (mut child, channel) = spawn();
    drop(channel);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let (mut child, channel) = spawn();
    channel
        .stream()
        .write_all(b"\xff\xff\xff\xffnonsense")
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn the_console_log_is_bounded() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(&kernel, "seq 1 10000; poweroff -f");
    spec.config.console_limit = 3000;
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(0));
    let console = fs::metadata(vm.dir.path().join("console")).unwrap();
    assert_eq!(console.len(), 3000);
}

#[test]
fn disks_are_what_they_were_said_to_be() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(
        &kernel,
        "cat /sys/block/vda/size /sys/block/vdb/ro /sys/block/vda/serial
         dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 6; echo
         echo written | dd of=/dev/vda bs=512 seek=100 conv=fsync 2>/dev/null && echo wrote
         echo no | dd of=/dev/vdb conv=fsync 2>/dev/null || echo refused
         poweroff -f",
    );
    let path = spec.dir.path().join("disk");
    let disk = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    disk.set_len(1 << 20).unwrap();
    disk.write_all_at(b"magic!", 0).unwrap();
    let read_only = disk.try_clone().unwrap();
    for (serial, file, read_only) in [("scratch", disk, false), ("layer", read_only, true)] {
        let file = spec.lend(file);
        spec.config.disks.push(DiskConfig {
            serial: serial.into(),
            file,
            read_only,
        });
    }
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.console());
    let console = vm.console();
    assert!(console.contains("2048\n1\nscratch"), "{console}");
    for line in ["magic!", "wrote", "refused"] {
        assert!(console.contains(line), "no {line:?} in:\n{console}");
    }
    let mut written = [0; 7];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut written, 51_200)
        .unwrap();
    assert_eq!(&written, b"written");
}

#[test]
fn disks_beyond_the_interrupt_lines_share_them() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(
        &kernel,
        "for disk in /sys/block/vd*; do
           dd if=/dev/${disk##*/} bs=64k count=16 2>/dev/null | md5sum | cut -c1-32 &
         done
         wait; echo read; poweroff -f",
    );
    let path = spec.dir.path().join("disk");
    let disk = File::create_new(&path).unwrap();
    let pattern: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    disk.write_all_at(&pattern, 0).unwrap();
    for n in 0..40 {
        let file = spec.lend(File::open(&path).unwrap());
        spec.config.disks.push(DiskConfig {
            serial: format!("layer{n}"),
            file,
            read_only: true,
        });
    }
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.console());
    let console = vm.console();
    let sums: Vec<_> = console.lines().filter(|line| line.len() == 32).collect();
    assert_eq!(sums.len(), 40, "{console}");
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{console}");
}

#[test]
fn the_agent_says_that_it_is_ready_and_powers_off_when_asked() {
    let kernel = with_kernel!("vmlinux");
    let initramfs = kernel.with_file_name("initramfs.cpio");
    let mut spec = Spec::new(&kernel, "");
    spec.config.initramfs = Some(spec.lend(File::open(initramfs).unwrap()));
    spec.config.vsock = Some(VsockConfig {
        cid: 3,
        listener: None,
    });
    spec.config.jail = Some(JailConfig {
        uid: 70_001,
        gid: 70_002,
    });
    let mut vm = spec.boot().unwrap();
    let mut watcher = Channel::new(vm.connect());
    watcher.send(&Request::Watch, &[]).unwrap();
    watcher.recv::<Reply>().unwrap();
    assert_eq!(watcher.recv::<Event>().unwrap().message, Event::AgentReady);
    assert!(vm.status().agent_ready);
    assert!(matches!(vm.ask(&Request::Shutdown), Reply::Done));
    let end = watcher.recv::<Event>().unwrap().message;
    assert_eq!(
        end,
        Event::Exited(ExitReason::PoweredOff),
        "{}",
        vm.console()
    );
    assert_eq!(vm.wait().code(), Some(0));
}

#[test]
fn a_jailed_machine_has_nothing_of_the_host() {
    let kernel = with_kernel!("vmlinux");
    let mut spec = Spec::new(&kernel, "echo up; sleep 1000");
    spec.config.jail = Some(JailConfig {
        uid: 70_001,
        gid: 70_002,
    });
    let mut vm = spec.boot().unwrap();
    vm.wait_for("up");
    let proc = format!("/proc/{}", vm.child.id());
    let status = fs::read_to_string(format!("{proc}/status")).unwrap();
    for line in [
        "Uid:\t70001\t70001\t70001\t70001",
        "Gid:\t70002\t70002\t70002\t70002",
        "Groups:\t \n",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "no {line:?} in:\n{status}");
    }
    let root: Vec<_> = fs::read_dir(format!("{proc}/root")).unwrap().collect();
    assert!(root.is_empty(), "{root:?}");
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for namespace in ["user", "mnt", "ipc", "uts"] {
        let of = |who: &str| fs::read_link(format!("{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&proc), of("/proc/self"), "{namespace}");
    }
    let mode = fs::metadata(format!("{proc}/fd")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&mode), 0, "dumpable");
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
}
