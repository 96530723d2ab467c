//! Volumes with mounts of their own, and volumes that are images.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{
    Container, ContainerOptions, IMAGE, Node, PodOptions, Traces, of_host, sha256,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;

/// An image of two layers, which have only data.
const DATA: &str = "docker.io/library/data:test";
const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// A mount on the host, of a tmpfs that is shared with whoever copies it if nothing else is said; unmounted when it is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn on(path: PathBuf) -> Self {
        Self::of("tmpfs", path, None)
    }

    fn of(kind: &str, path: PathBuf, options: Option<&str>) -> Self {
        fs::create_dir_all(&path).unwrap();
        let none = None::<&str>;
        mount(none, &path, Some(kind), MsFlags::empty(), options).unwrap();
        mount(none, &path, none, MsFlags::MS_SHARED, none).unwrap();
        Self(path)
    }

    /// A directory of the host at another place.
    fn bind(from: &Path, path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let none = None::<&str>;
        mount(Some(from), &path, none, MsFlags::MS_BIND, none).unwrap();
        Self(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

async fn refused(node: &Node, container: &Container, script: &str) {
    let (code, _, error) = node.exec(container, script, 30).await.unwrap();
    assert_ne!(code, 0, "{script}");
    assert!(error.contains("Read-only file system"), "{script}: {error}");
}

// must-test: a read-only mount written through another path
#[tokio::test(flavor = "multi_thread")]
async fn mounts_below_volumes_keep_their_access_and_stay_free() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let volume = Tmpfs::on(node.dir().join("volume"));
    let below = Tmpfs::on(volume.0.join("below"));
    let pod = node.pod("below").await;
    let read_only = cri::Mount {
        readonly: true,
        ..of_host(&volume.0, "/plain")
    };
    let recursive = cri::Mount {
        recursive_read_only: true,
        container_path: "/all".into(),
        ..read_only.clone()
    };
    let following = cri::Mount {
        propagation: cri::MountPropagation::PropagationHostToContainer.into(),
        ..of_host(&volume.0, "/following")
    };
    let options = ContainerOptions {
        mounts: vec![read_only, recursive, following],
        ..ContainerOptions::default()
    };
    let first = node.run_with(&pod, "first", SLEEP, options.clone()).await;
    node.says(&first, "echo written > /plain/below/file").await;
    assert_eq!(node.says(&first, "cat /all/below/file").await, "written");
    refused(&node, &first, "echo x > /plain/file").await;
    refused(&node, &first, "echo x > /all/file").await;
    refused(&node, &first, "echo x > /all/below/file").await;

    // A mount of the host appears where it was asked for, and goes.
    let late = Tmpfs::on(volume.0.join("late"));
    fs::write(late.0.join("file"), "late").unwrap();
    assert_eq!(node.says(&first, "cat /following/late/file").await, "late");
    assert_eq!(node.says(&first, "ls -A /all/late").await, "");
    drop(late);
    // Until the guest looks for the name again it has the one that went, of which nothing more can be opened.
    let begun = Instant::now();
    let list = "ls -A /following/late";
    while node.exec(&first, list, 60).await.unwrap() != (0, String::new(), String::new()) {
        assert!(begun.elapsed() < Duration::from_secs(30), "it stays");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    fs::remove_dir(volume.0.join("late")).unwrap();

    // A daemon that comes later takes up the pod with its mounts.
    node.restart().await;
    assert_eq!(node.says(&first, "cat /plain/below/file").await, "written");
    let second = node.run_with(&pod, "second", SLEEP, options).await;
    assert_eq!(node.says(&second, "cat /all/below/file").await, "written");
    let of_pods = Traces::now().mounts_below(&node.state().join("pods"));
    assert_eq!(of_pods.len(), 1, "the host has mounts of pods: {of_pods:?}");

    // What the pod has is not busy for the host.
    let path = below.0.clone();
    drop(below);
    fs::remove_dir(&path).unwrap();
    let path = volume.0.clone();
    drop(volume);
    fs::remove_dir(&path).unwrap();
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

fn with(mounts: Vec<cri::Mount>) -> ContainerOptions {
    ContainerOptions {
        mounts,
        ..ContainerOptions::default()
    }
}

fn read_only(mount: cri::Mount) -> cri::Mount {
    cri::Mount {
        readonly: true,
        ..mount
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelets_empty_dirs_are_in_the_guests_memory_and_on_the_hosts_disk() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    // As the kubelet makes them: a tmpfs of the size asked for, the group of fsGroup, a directory and a mount for a subPath.
    let of_pod = node.dir().join("kubelet/pods/uid");
    let volumes = of_pod.join("volumes/kubernetes.io~empty-dir");
    let cache = Tmpfs::of("tmpfs", volumes.join("cache"), Some("size=8m"));
    chown(&cache.0, None, Some(2000)).unwrap();
    fs::set_permissions(&cache.0, fs::Permissions::from_mode(0o2777)).unwrap();
    fs::create_dir(cache.0.join("sub")).unwrap();
    fs::set_permissions(cache.0.join("sub"), fs::Permissions::from_mode(0o2750)).unwrap();
    let sub = of_pod.join("volume-subpaths/cache/c/0");
    let sub = Tmpfs::bind(&cache.0.join("sub"), sub);
    let disk = volumes.join("disk");
    fs::create_dir(&disk).unwrap();

    let pod = node.pod("empty").await;
    let volumes = vec![of_host(&cache.0, "/cache"), of_host(&disk, "/disk")];
    let a = node.run_with(&pod, "a", SLEEP, with(volumes.clone())).await;
    let volume = of_host(&cache.0, "/cache");
    let b = node
        .run_with(&pod, "b", SLEEP, with(vec![read_only(volume)]))
        .await;
    let c = node
        .run_with(&pod, "c", SLEEP, with(vec![of_host(&sub.0, "/part")]))
        .await;

    // Memory of the guest, as large as the kubelet made it, for all containers of the pod and for nobody on the host.
    let mounted = node.says(&a, "grep ' /cache ' /proc/mounts").await;
    assert!(
        mounted.contains(" tmpfs ") && mounted.contains("size=8192k"),
        "{mounted}"
    );
    assert_eq!(node.says(&a, "stat -c '%a %g' /cache").await, "2777 2000");
    assert_eq!(node.says(&c, "stat -c '%a %g' /part").await, "2750 2000");
    node.says(&a, "echo of-a >/cache/file").await;
    assert_eq!(node.says(&b, "cat /cache/file").await, "of-a");
    refused(&node, &b, "echo x >/cache/file").await;
    node.says(&c, "echo of-c >/part/file").await;
    assert_eq!(node.says(&b, "cat /cache/sub/file").await, "of-c");
    let on_host: Vec<_> = fs::read_dir(&cache.0)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(on_host, ["sub"]);
    // It counts as memory of who writes, and its size is a limit.
    let shared = "grep '^shmem ' /sys/fs/cgroup/memory.stat | cut -d' ' -f2";
    let before: u64 = node.says(&a, shared).await.parse().unwrap();
    let full =
        "dd if=/dev/zero of=/cache/big bs=64k count=256 2>&1 | grep -o 'No space left on device'";
    assert_eq!(node.says(&a, full).await, "No space left on device");
    let after: u64 = node.says(&a, shared).await.parse().unwrap();
    assert!(after > before + (7 << 20), "{before} became {after}");
    node.says(&a, "rm /cache/big").await;

    // On disk it is the host's directory, where the kubelet measures it against its limit.
    node.says(
        &a,
        "dd if=/dev/zero of=/disk/file bs=1M count=3 2>/dev/null",
    )
    .await;
    assert_eq!(fs::metadata(disk.join("file")).unwrap().len(), 3 << 20);

    // The pod keeps it, whatever becomes of its containers and of the daemon.
    let request = cri::RemoveContainerRequest {
        container_id: a.id.clone(),
    };
    node.runtime
        .clone()
        .remove_container(request)
        .await
        .unwrap();
    node.restart().await;
    let d = node.run_with(&pod, "d", SLEEP, with(volumes)).await;
    assert_eq!(
        node.says(&d, "cat /cache/file /cache/sub/file").await,
        "of-a\nof-c"
    );
    node.remove(&pod).await;

    // In a pod with IDs of its own it belongs to whom the pod sees as its owner.
    let map = |host_id| {
        vec![cri::IdMapping {
            container_id: 0,
            host_id,
            length: 65_536,
        }]
    };
    let namespaces = Some(cri::NamespaceOption {
        userns_options: Some(cri::UserNamespace {
            mode: cri::NamespaceMode::Pod.into(),
            uids: map(65_536),
            gids: map(131_072),
        }),
        ..cri::NamespaceOption::default()
    });
    let options = PodOptions {
        namespaces: namespaces.clone(),
        ..PodOptions::default()
    };
    let pod = node.pod_with("empty-ids", options).await.unwrap();
    let mapped = cri::Mount {
        uid_mappings: map(65_536),
        gid_mappings: map(131_072),
        ..of_host(&cache.0, "/cache")
    };
    let options = ContainerOptions {
        namespaces,
        ..with(vec![mapped])
    };
    let container = node.run_with(&pod, "c", SLEEP, options).await;
    let owners = "echo x >/cache/file; stat -c '%a %u %g' /cache; stat -c '%u %g' /cache/file";
    assert_eq!(node.says(&container, owners).await, "2777 0 2000\n0 2000");
    node.remove(&pod).await;

    // A pod on the host has the host's.
    let options = PodOptions {
        handler: "host".to_owned(),
        ..PodOptions::default()
    };
    let pod = node.pod_with("empty-host", options).await.unwrap();
    let volume = of_host(&cache.0, "/cache");
    let container = node.run_with(&pod, "c", SLEEP, with(vec![volume])).await;
    node.says(&container, "echo here >/cache/file").await;
    assert_eq!(fs::read_to_string(cache.0.join("file")).unwrap(), "here\n");
    node.remove(&pod).await;
    drop((sub, cache));
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_directories_are_shared_and_the_rest_is_refused() {
    let Some(node) = Node::start().await else {
        return;
    };
    let dir = node.dir().join("things");
    fs::create_dir_all(dir.join("deep/er")).unwrap();
    let path = |name: &str| dir.join(name);
    fs::write(path("file"), "one\n").unwrap();
    fs::write(path("deep/er/file"), "two\n").unwrap();
    std::os::unix::fs::symlink("deep/er", path("link")).unwrap();
    let pod = node.pod("things").await;
    let mounts = vec![
        of_host(&path("file"), "/file"),
        read_only(of_host(&path("deep/er/file"), "/etc/config")),
        of_host(&path("link"), "/linked"),
        of_host(&path("deep"), "/deep"),
    ];
    let container = node.run_with(&pod, "c", SLEEP, with(mounts)).await;
    node.says(
        &container,
        "cat /file; echo three >/file; echo four >>/file",
    )
    .await;
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "three\nfour\n");
    fs::write(path("file"), "five\n").unwrap();
    assert_eq!(
        node.says(&container, "cat /file /etc/config").await,
        "five\ntwo"
    );
    refused(&node, &container, "echo x >/etc/config").await;
    node.says(&container, "echo six >/linked/new; echo x >/deep/new")
        .await;
    assert_eq!(fs::read_to_string(path("deep/er/new")).unwrap(), "six\n");
    assert!(path("deep/new").exists());

    let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let mode = Mode::from_bits_truncate(0o600);
    for (name, kind) in [
        ("pipe", SFlag::S_IFIFO),
        ("char", SFlag::S_IFCHR),
        ("block", SFlag::S_IFBLK),
    ] {
        mknod(&path(name), kind, mode, makedev(7, 0)).unwrap();
    }
    let huge = path("volumes/kubernetes.io~empty-dir/huge");
    let huge = Tmpfs::of("hugetlbfs", huge, None);
    let refuses = async |options, parts: &[&str]| {
        let error = node
            .create(&pod, "refused", SLEEP, options)
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented, "{error}");
        for part in parts {
            assert!(error.message().contains(part), "{error}");
        }
    };
    let host = "handler of kind `host`";
    for name in ["socket", "pipe", "char", "block"] {
        let place = path(name);
        let parts = [place.to_str().unwrap(), "/x", host];
        refuses(with(vec![of_host(&place, "/x")]), &parts).await;
    }
    refuses(
        with(vec![of_host(&huge.0, "/x")]),
        &["huge pages", "/x", host],
    )
    .await;
    // A volume in block mode.
    let device = cri::Device {
        container_path: "/dev/xvda".into(),
        host_path: path("block").display().to_string(),
        permissions: "rw".into(),
    };
    let options = ContainerOptions {
        devices: vec![device],
        ..ContainerOptions::default()
    };
    refuses(options, &[path("block").to_str().unwrap(), host]).await;
    let missing = with(vec![of_host(&path("missing"), "/x")]);
    let error = node
        .create(&pod, "refused", SLEEP, missing)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("missing"), "{error}");
    drop(huge);
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

/// Makes an archive of [`DATA`].
fn data_archive(node: &Node) -> PathBuf {
    let dir = node.dir().join("image");
    fs::create_dir_all(dir.join("archive")).unwrap();
    let write = |path: &str, text: &str| {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("1/data/kept", "kept");
    write("1/data/replaced", "lower");
    std::os::unix::fs::symlink("/data/sub", dir.join("1/link")).unwrap();
    std::os::unix::fs::symlink("../../../etc", dir.join("1/out")).unwrap();
    write("2/data/replaced", "upper");
    write("2/data/sub/file", "deep");
    let tar = |archive: &str, from: &str| {
        let status = Command::new("tar")
            .args(["-C", from, "-cf", archive, "."])
            .current_dir(&dir)
            .status();
        assert!(status.unwrap().success(), "tar {archive}");
    };
    let ids = ["1", "2"].map(|layer| {
        tar(&format!("archive/{layer}.tar"), layer);
        let bytes = fs::read(dir.join(format!("archive/{layer}.tar"))).unwrap();
        format!("sha256:{}", sha256(&bytes))
    });
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": ids },
    });
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": [DATA], "Layers": ["1.tar", "2.tar"],
    }]);
    write("archive/config.json", &config.to_string());
    write("archive/manifest.json", &manifest.to_string());
    tar("../image.tar", "archive");
    node.dir().join("image.tar")
}

fn of_image(image: &str, sub_path: &str, container: &str) -> cri::Mount {
    cri::Mount {
        container_path: container.to_owned(),
        readonly: true,
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            ..cri::ImageSpec::default()
        }),
        image_sub_path: sub_path.to_owned(),
        ..cri::Mount::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_volumes() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let archive = data_archive(&node);
    for handler in ["microvm", "host"] {
        let loaded = node.caisson(&["load", "--name", DATA, &archive.to_string_lossy()]);
        assert!(loaded.status.success(), "{loaded:?}");
        have_images_as_volumes(&node, handler).await;
    }
    node.assert_nothing_left().await;
}

async fn have_images_as_volumes(node: &Node, handler: &str) {
    let options = PodOptions {
        handler: handler.to_owned(),
        ..PodOptions::default()
    };
    let pod = node.pod_with(handler, options).await.unwrap();
    let container = node
        .run_with(
            &pod,
            "c",
            SLEEP,
            with(vec![
                of_image(DATA, "", "/whole"),
                of_image(DATA, "data/sub", "/sub"),
                of_image(DATA, "data/sub/file", "/file"),
                of_image(DATA, "link", "/linked"),
                of_image(IMAGE, "", "/box"),
            ]),
        )
        .await;
    assert_eq!(
        node.says(&container, "cd /whole/data; cat kept replaced sub/file")
            .await,
        "keptupperdeep"
    );
    for path in ["/sub/file", "/file", "/linked/file"] {
        assert_eq!(node.says(&container, &format!("cat {path}")).await, "deep");
    }
    // A program of an image volume runs.
    assert_eq!(
        node.says(&container, "/box/bin/busybox echo it runs").await,
        "it runs"
    );
    for script in [
        "echo x > /whole/new",
        "rm /sub/file",
        "echo x > /file",
        "rm /box/bin/sh",
    ] {
        refused(node, &container, script).await;
    }
    let status = node.status(&container).await;
    for mount in &status.mounts {
        let image = mount.image.as_ref().unwrap();
        assert!(image.image_ref.starts_with("sha256:"), "{image:?}");
    }

    // An image that is removed while it is in use keeps its layers.
    let remove = cri::RemoveImageRequest {
        image: status.mounts[0].image.clone(),
    };
    node.images.clone().remove_image(remove).await.unwrap();
    let layers = || {
        let files = fs::read_dir(node.root().join("images/layers")).unwrap();
        files
            .filter(|file| {
                let name = file.as_ref().unwrap().file_name();
                name.as_encoded_bytes().ends_with(b".erofs")
            })
            .count()
    };
    assert_eq!(layers(), 3);
    assert_eq!(node.says(&container, "cat /whole/data/kept").await, "kept");

    let writable = cri::Mount {
        readonly: false,
        ..of_image(IMAGE, "", "/x")
    };
    for (mount, code, part) in [
        (of_image(DATA, "", "/x"), Code::NotFound, DATA),
        (writable, Code::InvalidArgument, "readonly"),
        (
            of_image(IMAGE, "no/such", "/x"),
            Code::InvalidArgument,
            "no/such",
        ),
        (
            of_image(IMAGE, "../etc", "/x"),
            Code::InvalidArgument,
            "image_sub_path",
        ),
    ] {
        let error = node
            .create(&pod, "r", SLEEP, with(vec![mount]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(part), "{error}");
    }
    node.remove(&pod).await;
}
