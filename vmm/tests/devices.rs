//! What a guest's own drivers make of the devices, in a jailed machine on a real KVM.

mod support;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use caisson_vmm_protocol::{JailConfig, NetConfig, Reply, Request, ShareConfig};
use support::host::{Shared, run, tap, vhost_net};
use support::{Spec, Vm, kernel};

/// A test of machines with this kernel; skipped, and said so, where KVM does not work.
macro_rules! with_kernel {
    ($name:literal) => {
        match kernel($name) {
            Some(kernel) => kernel,
            None => return,
        }
    };
}

const JAIL: JailConfig = JailConfig {
    uid: 70_001,
    gid: 70_002,
};

fn share(spec: &mut Spec, shared: &Shared) {
    let root = spec.lend(File::open(shared.0.path()).unwrap());
    spec.config.share = Some(ShareConfig {
        tag: "share".into(),
        root,
    });
    spec.config.jail = Some(JAIL);
}

/// A read-only bind mount, read-only from the first moment: a mount's flags reach the copies that propagation
/// makes of it, and later changes of them do not.
fn bind_read_only(from: &Path, to: &Path) {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    let c = |path: &Path| std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let (from, to) = (c(from), c(to));
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let checked = |result: libc::c_long| {
        assert!(result >= 0, "{}", std::io::Error::last_os_error());
        result as i32
    };
    // SAFETY: the strings and the structure are valid for the calls, and the descriptor is ours alone.
    unsafe {
        let tree = checked(libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            from.as_ptr(),
            OPEN_TREE_CLONE,
        ));
        let tree = OwnedFd::from_raw_fd(tree);
        checked(libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        ));
        checked(libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        ));
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn wait_for_file(vm: &Vm, path: &Path, content: &str) {
    let begun = std::time::Instant::now();
    while text(path) != content {
        assert!(
            begun.elapsed() < support::LIMIT,
            "{path:?} is {:?}, not {content:?}; the console:\n{}",
            text(path),
            vm.console()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn files_go_both_ways_and_belong_to_the_guests_users() {
    let kernel = with_kernel!("vmlinux");
    let shared = Shared::new();
    fs::write(shared.path("from-host"), "hello guest").unwrap();
    fs::set_permissions(shared.path("from-host"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut spec = Spec::new(
        &kernel,
        "mount -t virtiofs share /mnt || echo cannot mount
         cd /mnt; cat from-host; echo
         mkdir -m 770 d; chown 1000:2000 d
         mkdir /etc; printf 'root:x:0:0:root:/:/bin/sh\nu:x:1000:2000:u:/:/bin/sh\n' > /etc/passwd
         su u -c 'echo mine > d/mine; cat from-host || echo private'
         echo root > d/root; ln -s ../../../../etc/hostname link; mkfifo fifo; ln d/mine hard
         cat /bin/busybox /bin/busybox > big; sha256sum big | cut -c1-64 > sum
         mv d/root moved; rm from-host; sync
         cat link || echo nowhere
         umount -l /mnt; mount -t virtiofs share /mnt && cat /mnt/moved
         echo end; poweroff -f",
    );
    share(&mut spec, &shared);
    let mut vm = spec.boot().unwrap();
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.console());
    let console = vm.console();
    for line in ["hello guest", "private", "nowhere", "root\nend"] {
        assert!(console.contains(line), "no {line:?} in:\n{console}");
    }
    let owner = |name: &str| {
        let stat = fs::symlink_metadata(shared.path(name)).unwrap();
        (stat.uid(), stat.gid())
    };
    assert_eq!(owner("d"), (1000, 2000));
    assert_eq!(owner("d/mine"), (1000, 2000));
    assert_eq!(owner("moved"), (0, 0));
    assert_eq!(fs::metadata(shared.path("hard")).unwrap().nlink(), 2);
    assert!(!shared.path("from-host").exists());
    let sum = Command::new("sha256sum")
        .arg(shared.path("big"))
        .output()
        .unwrap();
    assert_eq!(
        sum.stdout[..64],
        *text(&shared.path("sum")).trim().as_bytes()
    );
}

#[test]
fn mounts_made_later_appear_and_updates_show_within_two_seconds() {
    let kernel = with_kernel!("vmlinux");
    let shared = Shared::new();
    let source = Shared::new();
    for version in ["v1", "v2"] {
        fs::create_dir(source.path(version)).unwrap();
        fs::write(source.path(version).join("key"), version).unwrap();
    }
    symlink("v1", source.path("..data")).unwrap();
    symlink("..data/key", source.path("key")).unwrap();
    fs::create_dir(shared.path("volume")).unwrap();
    fs::create_dir(shared.path("out")).unwrap();
    let mut spec = Spec::new(
        &kernel,
        "mount -t virtiofs share /mnt; cd /mnt; ls volume; echo up
         while :; do
             v=$(cat volume/key 2>/dev/null)
             [ \"$v\" = \"$old\" ] || { printf %s \"$v\" > out/seen; old=$v; }
             if [ \"$v\" = v2 ] && [ -z \"$tried\" ]; then
                 tried=1; printf '%s %s' \"$(echo x > volume/new || echo refused)\" \
                     \"$(echo x > volume/v2/key || echo refused)\" > out/written
             fi
             usleep 20000
         done",
    );
    share(&mut spec, &shared);
    let mut vm = spec.boot().unwrap();
    vm.wait_for("up");
    bind_read_only(source.0.path(), &shared.path("volume"));
    wait_for_file(&vm, &shared.path("out/seen"), "v1");
    let begun = std::time::Instant::now();
    symlink("v2", source.path("..tmp")).unwrap();
    fs::rename(source.path("..tmp"), source.path("..data")).unwrap();
    wait_for_file(&vm, &shared.path("out/seen"), "v2");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    // must-test: FUSE: a read-only mount written through another path
    wait_for_file(&vm, &shared.path("out/written"), "refused refused");
    assert_eq!(text(&source.path("v2/key")), "v2");
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
}

// must-test: FUSE: the file server run without its sandbox (Kata CVE-2026-47243)
#[test]
fn the_file_server_sees_the_share_alone_and_never_runs_without_a_jail() {
    let kernel = with_kernel!("vmlinux");
    let shared = Shared::new();
    fs::write(shared.path("only"), "").unwrap();
    let mut spec = Spec::new(&kernel, "");
    share(&mut spec, &shared);
    spec.config.jail = None;
    let error = spec.boot().err().unwrap();
    assert!(error.contains("a share needs a jail"), "{error}");

    let mut spec = Spec::new(
        &kernel,
        "mount -t virtiofs share /mnt; cat /mnt/only; echo up; sleep 1000",
    );
    share(&mut spec, &shared);
    let mut vm = spec.boot().unwrap();
    vm.wait_for("up");
    let proc = format!("/proc/{}", vm.child.id());
    let names = |path: String| -> Vec<_> {
        let entries = fs::read_dir(path).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(names(format!("{proc}/root")), ["only"]);
    // No descriptor of a directory, by which a process could leave its root, is of anything else.
    let root = fs::metadata(format!("{proc}/root")).unwrap();
    for name in names(format!("{proc}/fd")) {
        let Ok(stat) = fs::metadata(format!("{proc}/fd/{}", name.display())) else {
            continue;
        };
        if stat.is_dir() && (stat.dev(), stat.ino()) != (root.dev(), root.ino()) {
            let above = format!("{proc}/fd/{}/..", name.display());
            let above = fs::metadata(above).unwrap();
            assert_eq!((above.dev(), above.ino()), (stat.dev(), stat.ino()));
        }
    }
    // Not one thread is more than the jail lets it be.
    for task in names(format!("{proc}/task")) {
        let status = text(Path::new(&format!("{proc}/task/{}/status", task.display())));
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert!(status.contains("Uid:\t70001\t70001\t70001\t"), "{status}");
    }
    assert!(matches!(vm.ask(&Request::Kill), Reply::Done));
    assert_eq!(vm.wait().code(), Some(12));
}

#[test]
fn a_guest_talks_over_its_tap() {
    talk(&with_kernel!("vmlinux"), "caisson-e2e", None);
}

#[test]
fn the_kernel_carries_a_guests_frames_through_pauses_and_resets() {
    let kernel = with_kernel!("vmlinux");
    if let Some(device) = vhost_net() {
        talk(&kernel, "caisson-vhost", Some(device));
    }
}

/// A guest sends and receives, and its driver begins anew in between.
fn talk(kernel: &Path, name: &str, vhost: Option<OwnedFd>) {
    let mut spec = Spec::new(
        kernel,
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
         device=$(basename $(readlink /sys/class/net/eth0/device))
         ip link set eth0 up
         for turn in 1 2 3 4 5; do
             for step in unbind bind; do echo $device > /sys/bus/virtio/drivers/virtio_net/$step; done
             ip link set eth0 up
         done
         ip addr add 10.99.7.2/24 dev eth0
         ping -c 3 -i 0.2 -W 5 -s 1300 10.99.7.1 | grep received
         nc -l -p 7777 > /received & sleep 0.2; echo listening
         nc 10.99.7.1 7778 < /bin/busybox; echo sent
         wait; sha256sum /received | cut -c1-64
         echo received; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done
         echo unplugged; poweroff -f",
    );
    let fd = tap(name);
    run("ip", &["addr", "add", "10.99.7.1/24", "dev", name]);
    run("ip", &["link", "set", name, "up", "mtu", "1400"]);
    let server = std::net::TcpListener::bind("10.99.7.1:7778").unwrap();
    let tap = spec.lend(fd);
    let vhost = vhost.map(|device| spec.lend(device));
    spec.config.nets.push(NetConfig {
        tap,
        vhost,
        mac: "02:00:00:00:00:07".into(),
        mtu: 1400,
    });
    spec.config.jail = Some(JAIL);
    let mut vm = spec.boot().unwrap();
    vm.wait_for("listening");
    // 16 MiB to the guest, and a file of its to us, byte for byte.
    let payload: Vec<u8> = (0..16u32 << 20)
        .map(|i| (i ^ i >> 8 ^ i >> 16) as u8)
        .collect();
    let sent = payload.clone();
    let sender = std::thread::spawn(move || {
        let mut stream = std::net::TcpStream::connect("10.99.7.2:7777").unwrap();
        std::io::Write::write_all(&mut stream, &sent).unwrap();
    });
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(50));
        for request in [Request::Pause, Request::Resume] {
            assert!(matches!(vm.ask(&request), Reply::Done));
        }
    }
    let (mut stream, _) = server.accept().unwrap();
    let mut got = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut got).unwrap();
    drop(stream);
    assert!(got == fs::read("/bin/busybox").unwrap());
    sender.join().unwrap();
    vm.wait_for("received\n");
    run("ip", &["link", "delete", name]);
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.console());
    let console = vm.console();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &payload).unwrap();
    let sum = Command::new("sha256sum").arg(file.path()).output().unwrap();
    let sum = String::from_utf8_lossy(&sum.stdout[..64]).into_owned();
    for line in [
        "02:00:00:00:00:07\n1400",
        "3 packets received",
        "sent",
        &sum,
        "unplugged",
    ] {
        assert!(console.contains(line), "no {line:?} in:\n{console}");
    }
}
