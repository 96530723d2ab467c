//! Root file systems, mounts and devices.

use std::fs;

use caisson_agent::engine::{Directory, ImageVolume, Layer, MemoryVolume, RootFs};
use serde_json::json;

use super::Test;
use super::support::*;

pub const TESTS: &[Test] = &[
    (
        "layers_are_shared_and_writes_are_not",
        layers_are_shared_and_writes_are_not,
    ),
    ("a_stack_of_many_layers", a_stack_of_many_layers),
    ("images_as_volumes", images_as_volumes),
    ("image_volumes_that_cannot_be", image_volumes_that_cannot_be),
    ("volumes_in_memory", volumes_in_memory),
    ("read_only_root", read_only_root),
    ("mount_options", mount_options),
    ("propagation", propagation),
    ("masked_and_read_only_paths", masked_and_read_only_paths),
    ("links_of_an_image", links_of_an_image),
    ("default_devices", default_devices),
    ("device_rules", device_rules),
    ("working_directory", working_directory),
];

fn layers_are_shared_and_writes_are_not() {
    let first = start(&spec(
        "echo changed > /etc/replaced; rm /etc/passwd; touch /new; cat /etc/replaced; touch /tmp/ready; exec sleep 1000",
    ));
    first.ready();
    let second = output(&spec(
        "cat /etc/replaced; ls /new 2>&1; head -n 1 /etc/passwd",
    ));
    assert_eq!(
        second,
        "upper\nls: /new: No such file or directory\nroot:x:0:0:root:/root:/bin/sh\n"
    );
    first.container.destroy().unwrap();
    assert_eq!(first.end().1, "changed\n");
}

fn a_stack_of_many_layers() {
    let mut rootfs = layers();
    for number in 0..125 {
        rootfs.layers.push(image(&format!("many-{number}"), |root| {
            fs::write(root.join("last"), number.to_string()).unwrap();
            fs::write(root.join(format!("layer-{number}")), "").unwrap();
        }));
    }
    let name = "x".repeat(60);
    let running = create_with(
        &format!("test-{name}"),
        &spec("cat /last; echo; ls -d /layer-* | grep -c ."),
        rootfs.clone(),
    )
    .unwrap();
    running.container.start().unwrap();
    assert_eq!(running.end().1, "124\n125\n");
    rootfs.layers.push(rootfs.layers[2].clone());
    let error = create_with(&id(), &spec("true"), rootfs).err().unwrap();
    assert!(error.to_string().contains("128 layers"), "{error}");
}

/// A spec whose `/volume` is the container's first image volume.
fn with_volume(id: &str, script: &str) -> serde_json::Value {
    let mut document = spec(script);
    add_mount(
        &mut document,
        json!({
            "destination": "/volume",
            "type": "bind",
            "source": format!("{VOLUMES}/{id}/0"),
            "options": ["rbind", "ro"],
        }),
    );
    document
}

fn images_as_volumes() {
    let both = layers().layers;
    for (layers_of_volume, sub_path, script, expected) in [
        (&both[..], "", "cat /volume/etc/replaced", "upper\n"),
        (&both[..1], "", "cat /volume/etc/replaced", "lower\n"),
        (&both[..], "etc", "cat /volume/replaced", "upper\n"),
        (&both[..], "etc/replaced", "cat /volume", "upper\n"),
        // A link of the image means what it means in there.
        (&both[..], "link-to-etc", "cat /volume/replaced", "upper\n"),
        (&both[..], "link-up/etc", "cat /volume/replaced", "upper\n"),
        (
            &both[..],
            "",
            "/volume/bin/busybox touch /volume/x 2>&1; true",
            "touch: /volume/x: Read-only file system\n",
        ),
    ] {
        let id = id();
        let volume = ImageVolume {
            layers: layers_of_volume.to_vec(),
            sub_path: sub_path.to_owned(),
        };
        let rootfs = RootFs {
            volumes: vec![volume],
            ..layers()
        };
        let running = create_with(&id, &with_volume(&id, script), rootfs).unwrap();
        running.container.start().unwrap();
        assert_eq!(running.end().1, expected, "{sub_path:?}: {script}");
    }
}

fn image_volumes_that_cannot_be() {
    let good = layers().layers;
    for (layers_of_volume, sub_path, part, invalid) in [
        (vec![], "", "0 layers", true),
        (
            vec![Layer::File("/no/such.erofs".into())],
            "",
            "/no/such.erofs",
            false,
        ),
        (good.clone(), "no/such", "no/such", true),
        (good, "etc/passwd/x", "etc/passwd/x", true),
    ] {
        let before = traces();
        let id = id();
        let volume = ImageVolume {
            layers: layers_of_volume,
            sub_path: sub_path.to_owned(),
        };
        let rootfs = RootFs {
            volumes: vec![volume],
            ..layers()
        };
        let error = create_with(&id, &with_volume(&id, "true"), rootfs)
            .err()
            .unwrap();
        assert_eq!(error.is_invalid_argument(), invalid, "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(before, traces(), "after {error}");
        assert!(!std::path::Path::new(VOLUMES).join(&id).exists());
    }
}

fn volumes_in_memory() {
    let volume = |name: &str, sub_path: &str| MemoryVolume {
        name: name.to_owned(),
        size: 1 << 20,
        root: Directory {
            mode: 0o2777,
            uid: 5,
            gid: 2000,
        },
        sub_path: sub_path.to_owned(),
        sub: Directory {
            mode: 0o2750,
            uid: 6,
            gid: 7,
        },
    };
    let run = |volume: MemoryVolume, script: &str| {
        let id = id();
        let mut document = spec(script);
        add_mount(
            &mut document,
            json!({
                "destination": "/volume",
                "type": "bind",
                "source": format!("{VOLUMES}/{id}/m0"),
                "options": ["rbind", "rw"],
            }),
        );
        let rootfs = RootFs {
            memory: vec![volume],
            ..layers()
        };
        let running = create_with(&id, &document, rootfs)?;
        running.container.start()?;
        let output = running.end().1;
        assert!(!std::path::Path::new(VOLUMES).join(&id).exists());
        Ok::<_, caisson_agent::engine::EngineError>(output)
    };
    // The next container has what the last one has left, within the size.
    let look = "stat -c '%a %u %g' /volume; echo kept >/volume/file; ln -s ../../../.. /volume/up";
    assert_eq!(run(volume("one", ""), look).unwrap(), "2777 5 2000\n");
    let fill = "cat /volume/file; dd if=/dev/zero of=/volume/big bs=64k count=64 2>&1 | grep -c 'No space'; \
                stat -c %s /volume/big; rm /volume/big";
    assert_eq!(run(volume("one", ""), fill).unwrap(), "kept\n1\n1044480\n");
    let look = "stat -c '%a %u %g' /volume; echo below >/volume/file";
    assert_eq!(run(volume("one", "a/b"), look).unwrap(), "2750 6 7\n");
    assert_eq!(
        run(volume("one", "a/b"), "cat /volume/file").unwrap(),
        "below\n"
    );
    assert_eq!(run(volume("one", "file"), "cat /volume").unwrap(), "kept\n");
    assert_eq!(run(volume("two", ""), "ls -A /volume").unwrap(), "");
    // No path leads out of it.
    assert_eq!(
        run(volume("one", "up/a"), "cat /volume/b/file").unwrap(),
        "below\n"
    );
    for name in ["", "..", "a/b", ".a"] {
        let error = run(volume(name, ""), "true").err().unwrap();
        assert!(error.is_invalid_argument(), "{error}");
    }
    for name in ["one", "two"] {
        let place = std::path::Path::new(BASE).join("memory").join(name);
        nix::mount::umount(&place).unwrap();
        fs::remove_dir(place).unwrap();
    }
}

fn read_only_root() {
    let mut document = spec("touch /x; echo $?; touch /dev/shm/x; echo $?; touch /tmp/x; echo $?");
    document["root"]["readonly"] = json!(true);
    add_mount(
        &mut document,
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}),
    );
    assert_eq!(output(&document), "1\n0\n0\n");
}

// must-test: a read-only mount written through another path
fn mount_options() {
    let shared = directory("mounts");
    fs::create_dir(shared.join("below")).unwrap();
    fs::write(shared.join("file"), "content\n").unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        &shared.join("below"),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let source = shared.to_str().unwrap();
    let mut document = spec(
        "for d in ro rro rw; do touch /$d/x 2>/dev/null; echo $d $?; touch /$d/below/x 2>/dev/null; echo $d/below $?; done; \
         cat /deep/er/file; echo no > /deep/er/file; echo $?; \
         grep -E ' /(ro|rro|rw|small) ' /proc/self/mountinfo | while read a b c d where rest; do echo $where ${rest%% - *}; done; \
         dd if=/dev/zero of=/small/x bs=1k count=100 2>/dev/null; stat -c %s /small/x; stat -c %a /small; touch /late/x; echo $?",
    );
    for (destination, options) in [
        (
            "/ro",
            json!(["rbind", "ro", "nosuid", "nodev", "noexec", "noatime"]),
        ),
        ("/rro", json!(["rbind", "rro"])),
        ("/rw", json!(["rbind", "rw"])),
    ] {
        add_mount(
            &mut document,
            json!({"destination": destination, "type": "bind", "source": source, "options": options}),
        );
    }
    add_mount(
        &mut document,
        json!({"destination": "/deep/er/file", "type": "bind", "source": format!("{source}/file"), "options": ["bind", "ro"]}),
    );
    add_mount(
        &mut document,
        json!({"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=1700", "nr_inodes=10"]}),
    );
    add_mount(
        &mut document,
        json!({"destination": "/late", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}),
    );
    // A place inside of a read-only tmpfs is still made.
    add_mount(
        &mut document,
        json!({"destination": "/late/bound", "type": "bind", "source": source, "options": ["bind"]}),
    );
    let (code, out, err) = start(&document).end();
    nix::mount::umount(&shared.join("below")).unwrap();
    assert_eq!(code, 0, "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines[..8],
        [
            "ro 1",
            "ro/below 0",
            "rro 1",
            "rro/below 1",
            "rw 0",
            "rw/below 0",
            "content",
            "1"
        ],
        "{out}{err}"
    );
    let find = |place: &str| {
        *lines
            .iter()
            .find(|line| line.starts_with(&format!("{place} ")))
            .unwrap_or(&"")
    };
    let options = |place: &str| {
        let line = find(place).split(' ').nth(1).unwrap_or_default();
        line.split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        options("/ro"),
        ["ro", "nosuid", "nodev", "noexec", "noatime"],
        "{out}"
    );
    assert!(options("/rro").contains(&"ro".to_owned()), "{out}");
    assert!(options("/rw").contains(&"rw".to_owned()), "{out}");
    assert!(out.ends_with("65536\n1700\n1\n"), "{out}");
}

fn propagation() {
    let shared = directory("propagation");
    let none = None::<&str>;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    mount(Some(&shared), &shared, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
    fs::create_dir(shared.join("from-guest")).unwrap();
    fs::create_dir(shared.join("from-container")).unwrap();
    let source = shared.to_str().unwrap();
    let mut document = spec(
        "while ! [ -e /slave/from-guest/new ]; do sleep 0.02; done; ls /private/from-guest | grep -c .; mount -t tmpfs tmpfs /shared/from-container; \
        touch /shared/from-container/new; exec sleep 1000",
    );
    document["linux"]["rootfsPropagation"] = json!("rshared");
    document["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"]});
    for (place, propagation) in [
        ("/slave", "rslave"),
        ("/shared", "rshared"),
        ("/private", "rprivate"),
    ] {
        add_mount(
            &mut document,
            json!({"destination": place, "type": "bind", "source": source, "options": ["rbind", propagation]}),
        );
    }
    let running = start(&document);
    mount(
        Some("tmpfs"),
        &shared.join("from-guest"),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    fs::write(shared.join("from-guest/new"), "").unwrap();
    until(|| shared.join("from-container/new").exists());
    running.container.destroy().unwrap();
    let (_, out, err) = running.end();
    let _ = umount2(&shared.join("from-container"), MntFlags::MNT_DETACH);
    umount2(&shared.join("from-guest"), MntFlags::MNT_DETACH).unwrap();
    umount2(&shared, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(out, "0\n", "a private mount saw the guest's {err}");
}

fn masked_and_read_only_paths() {
    let mut document = spec(
        "head -c 1 /proc/kcore | grep -c .; ls /sys/firmware | grep -c .; cat /hidden | grep -c .; ls /hidden-dir | grep -c .; \
         (echo 1 > /proc/sys/kernel/panic) 2>/dev/null; echo $?; touch /fixed/x 2>/dev/null; echo $?; mkdir /tmp/ok; echo $?",
    );
    document["linux"]["maskedPaths"] = json!([
        "/proc/kcore",
        "/sys/firmware",
        "/hidden",
        "/hidden-dir",
        "/no/such"
    ]);
    document["linux"]["readonlyPaths"] = json!(["/proc/sys", "/fixed", "/no/such/either"]);
    let mut rootfs = layers();
    rootfs.layers.push(image("masked", |root| {
        fs::write(root.join("hidden"), "secret\n").unwrap();
        fs::create_dir(root.join("hidden-dir")).unwrap();
        fs::write(root.join("hidden-dir/secret"), "").unwrap();
        fs::create_dir(root.join("fixed")).unwrap();
    }));
    let running = create_with(&id(), &document, rootfs).unwrap();
    running.container.start().unwrap();
    let (_, out, err) = running.end();
    assert_eq!(out, "0\n0\n0\n0\n1\n1\n0\n", "{err}");
}

// must-test: symbolic links of an image that lead outside
fn links_of_an_image() {
    let shared = directory("links");
    let source = shared.to_str().unwrap();
    let mut document = spec("ls /etc/put; ls -d /var/lib/out; touch /etc/put/x");
    // Each leads to the container's own files, never to the guest's.
    add_mount(
        &mut document,
        json!({"destination": "/link-to-etc/put", "type": "bind", "source": source, "options": ["bind"]}),
    );
    add_mount(
        &mut document,
        json!({"destination": "/link-up/var/lib/out", "type": "tmpfs", "source": "tmpfs"}),
    );
    assert_eq!(output(&document), "/var/lib/out\n");
    assert!(shared.join("x").exists());
    assert!(!std::path::Path::new("/etc/put").exists());
    assert!(!std::path::Path::new("/var/lib/out").exists());
    // An image that sends /proc elsewhere is refused.
    let mut rootfs = layers();
    rootfs.layers.push(image("bad-proc", |root| {
        std::os::unix::fs::symlink("/tmp", root.join("proc")).unwrap();
    }));
    let error = create_with(&id(), &spec("true"), rootfs)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("mount /proc"), "{error}");
    // Devices replace what an image has in their place.
    let mut rootfs = layers();
    rootfs.layers.push(image("bad-dev", |root| {
        fs::create_dir(root.join("dev")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("dev/null")).unwrap();
    }));
    let mut document = spec("echo broken > /dev/null; grep -c root /etc/passwd");
    document["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    let running = create_with(&id(), &document, rootfs).unwrap();
    running.container.start().unwrap();
    assert_eq!(running.end().1, "1\n");
}

fn default_devices() {
    let out = output(&spec(
        "for d in null zero full random urandom tty; do stat -c '%n %F %t:%T %a' /dev/$d; done; \
         for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; head -c 3 /dev/zero | grep -c .; \
         echo through > /dev/stdout; echo x > /dev/full 2>/dev/null || echo full",
    ));
    assert_eq!(
        out,
        "/dev/null character special file 1:3 666\n/dev/zero character special file 1:5 666\n\
         /dev/full character special file 1:7 666\n/dev/random character special file 1:8 666\n\
         /dev/urandom character special file 1:9 666\n/dev/tty character special file 5:0 666\n\
         /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n1\nthrough\nfull\n"
    );
    let mut document = spec("stat -c '%F %t:%T %a %u:%g' /dev/mine /dev/sub/pipe");
    document["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/sub/pipe", "type": "p"}
    ]);
    assert_eq!(
        output(&document),
        "character special file a:e5 640 5:6\nfifo 0:0 666 0:0\n"
    );
}

fn device_rules() {
    // Major 1, minor 11 is the kernel's log: there in every kernel, and not allowed by default.
    let script = "mknod /dev/kmsg c 1 11; echo $?; (: < /dev/kmsg) 2>/dev/null; echo $?; (: > /dev/kmsg) 2>/dev/null; echo $?";
    assert_eq!(output(&spec(script)), "0\n1\n1\n");
    let mut document = spec(script);
    document["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"}]);
    assert_eq!(output(&document), "0\n1\n0\n");
}

fn working_directory() {
    let mut document = spec("pwd; stat -c '%a %u' .");
    document["process"]["cwd"] = json!("/made/for/this");
    document["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_eq!(output(&document), "/made/for/this\n755 0\n");
}
