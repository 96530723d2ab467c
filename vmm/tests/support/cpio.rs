//! An initramfs in the "newc" format: busybox and a script.

use std::path::Path;

const BUSYBOX: &str = "/bin/busybox";
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive whose `/init` runs this script with all of busybox's applets at hand, and with these
/// programs of the host: where they are to be, and where they are.
pub fn busybox(script: &str, programs: &[(&str, &Path)]) -> Vec<u8> {
    let busybox = std::fs::read(BUSYBOX).expect("busybox-static is installed by scripts/setup");
    let init = format!(
        "#!/bin/sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n{script}\n"
    );
    let mut archive = Vec::new();
    for name in ["bin", "dev", "proc", "sys", "mnt"] {
        entry(&mut archive, name, DIRECTORY, &[]);
    }
    entry(&mut archive, "bin/busybox", PROGRAM, &busybox);
    entry(&mut archive, "bin/sh", LINK, b"busybox");
    entry(&mut archive, "init", PROGRAM, init.as_bytes());
    for directory in ["lib", "lib64", "lib/x86_64-linux-gnu"] {
        entry(&mut archive, directory, DIRECTORY, &[]);
    }
    for (name, path) in programs {
        let program = std::fs::read(path).expect("the program is readable");
        entry(
            &mut archive,
            name.trim_start_matches('/'),
            PROGRAM,
            &program,
        );
    }
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let ino = archive.len();
    let (size, name_size) = (content.len(), name.len() + 1);
    // ino, mode, uid, gid, nlink, mtime, size, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    archive.extend(format!("070701{ino:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{size:08X}{:08X}{:08X}{:08X}{:08X}{name_size:08X}{:08X}", 0, 0, 1, 0, 0, 0, 0, 0, 0).bytes());
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
