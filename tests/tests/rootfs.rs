//! Root file systems: layers of images in a guest, and what a container writes on them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use caisson_tests::{
    Container, ContainerOptions, Disk, ImageMaker, Node, NodeOptions, Pod, PodOptions, sha256,
};

const SLEEP: &str = "exec sleep 100000";
const NAME: &str = "docker.io/library/layers:test";

fn of_image(name: &str) -> ContainerOptions {
    ContainerOptions {
        image: Some(name.to_owned()),
        ..ContainerOptions::default()
    }
}

async fn run(node: &Node, pod: &Pod, name: &str, image: &str) -> Container {
    node.run_with(pod, name, SLEEP, of_image(image)).await
}

/// Bytes that do not repeat.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        bytes.extend(word());
    }
    bytes.truncate(count);
    bytes
}

fn layer_files(node: &Node) -> Vec<PathBuf> {
    let entries = fs::read_dir(node.root().join("images/layers")).expect("the store has layers");
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// 127 layers are the most of an image. Two such images and a third one are more layers than a disk of the guest has partitions.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_127_layers_and_more_than_a_disk_has_partitions_are_one_pod() {
    let Some(node) = Node::start().await else {
        return;
    };
    // With the lowest layer, which they share, 263 layers: a disk has 255 partitions at most.
    let images = [("zero", 127), ("one", 127), ("two", 11)].map(|(name, count)| {
        let mut maker = ImageMaker::new();
        for layer in 1..count {
            let last = format!("{name} {layer}");
            maker = maker.files(&[(&format!("layers/{layer}"), ""), ("last", &last)]);
        }
        let full = format!("docker.io/library/{name}:test");
        maker.load(&node, &full);
        let top = count - 1;
        (full, format!("{name} {top}\n{top}"))
    });
    let options = PodOptions {
        memory: 256 << 20,
        ..PodOptions::default()
    };
    let pod = node.pod_with("many", options).await.unwrap();
    let script = "cat /last; echo; ls /layers | wc -l";
    // Each image twice: the second container finds the layers mounted.
    for round in ["first", "second"] {
        for (number, (image, expected)) in images.iter().enumerate() {
            let container = run(&node, &pod, &format!("{round}-{number}"), image).await;
            assert_eq!(&node.says(&container, script).await, expected, "{round}");
        }
    }
    // A daemon that finds the pod again finds the layers where they were.
    let mut node = node;
    node.restart().await;
    let (image, expected) = &images[1];
    let again = run(&node, &pod, "again", image).await;
    assert_eq!(&node.says(&again, script).await, expected);
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_an_image_have_its_content_and_their_own_changes() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    // Not a whole number of blocks, and more than one request.
    let big = noise((5 << 20) + 1234);
    let expected = sha256(&big);
    ImageMaker::new()
        .layer(|root| fs::write(root.join("big"), &big).unwrap())
        .layer(|root| {
            for directory in 0..10 {
                let directory = root.join(format!("files/{directory}"));
                fs::create_dir_all(&directory).unwrap();
                for file in 0..100 {
                    // Some with their inode, some in blocks of their own.
                    let content = vec![b'x'; file * 60];
                    fs::write(directory.join(file.to_string()), content).unwrap();
                }
            }
        })
        .load(&node, NAME);
    let layers: HashMap<PathBuf, String> = layer_files(&node)
        .into_iter()
        .map(|path| (path.clone(), sha256(&fs::read(path).unwrap())))
        .collect();

    let on_host = PodOptions {
        handler: "host".into(),
        ..PodOptions::default()
    };
    let pods = [
        node.pod("one").await,
        node.pod("two").await,
        node.pod_with("host", on_host).await.unwrap(),
    ];
    for (number, pod) in pods.iter().enumerate() {
        let container = run(&node, pod, "c", NAME).await;
        let script =
            "sha256sum </big; sha256sum </big; find /files | wc -l; cat /files/*/* | wc -c";
        let said = node.says(&container, script).await;
        let words: Vec<_> = said.split_whitespace().collect();
        // 10 directories and the one above, with 1,000 files; of the file a digest for each time it was read.
        let bytes = (10 * 60 * (99 * 100 / 2)).to_string();
        let all = [&expected, "-", &expected, "-", "1011", &bytes];
        assert_eq!(words, all, "{number}");
        // What one writes no other sees.
        let script = format!(
            "test ! -e /own && echo {number} >/own; echo changed >>/big; rm -r /files/0; find /files | wc -l"
        );
        assert_eq!(node.says(&container, &script).await, "910");
    }
    for (path, before) in &layers {
        assert_eq!(&sha256(&fs::read(path).unwrap()), before, "{path:?}");
    }
    whiteouts(&node, &pods[0]).await;
    for pod in &pods {
        node.remove(pod).await;
    }
    node.assert_nothing_left().await;
}

/// Upper layers take away what lower ones have.
async fn whiteouts(node: &Node, pod: &Pod) {
    let name = "docker.io/library/whiteouts:test";
    let files =
        |names: &[&'static str]| names.iter().map(|name| (*name, *name)).collect::<Vec<_>>();
    // A file, a directory, all that a directory had, and a directory that becomes a file and the other way round.
    let mut changes = files(&["a/.wh.gone", ".wh.b", "c/.wh..wh..opq", "c/new", "e/inside"]);
    changes.push(("d", "file"));
    ImageMaker::new()
        .files(&files(&[
            "a/gone",
            "a/kept",
            "b/below/1",
            "c/old",
            "d/file",
            "e",
        ]))
        .files(&changes)
        .files(&files(&["b/again"]))
        .load(node, name);
    let container = run(node, pod, "whiteouts", name).await;
    let said = node.says(&container, "find /a /b /c /d /e -type f").await;
    let mut found: Vec<_> = said.lines().collect();
    found.sort_unstable();
    assert_eq!(found, ["/a/kept", "/b/again", "/c/new", "/d", "/e/inside"]);
    // What was taken away can be made anew.
    let script = "echo x >/a/gone; mkdir /b/below; ls /b/below | wc -l; cat /a/gone";
    assert_eq!(node.says(&container, script).await, "0\nx");
}

fn annotated(annotations: &[(&str, &str)]) -> PodOptions {
    PodOptions {
        annotations: annotations
            .iter()
            .map(|(name, value)| (format!("caisson.dev/{name}"), (*value).to_owned()))
            .collect(),
        ..PodOptions::default()
    }
}

/// A container that fills its pod's scratch space gets an error, and nobody else does.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_scratch_space_is_an_error_of_the_container() {
    let Some(node) = Node::start().await else {
        return;
    };
    let mut pods = vec![];
    for kind in ["disk", "memory"] {
        let options = annotated(&[("scratch", kind), ("ephemeral-storage", "32Mi")]);
        let pod = node.pod_with(kind, options).await.unwrap();
        let neighbour = node.run(&pod, "neighbour", SLEEP).await;
        pods.push((kind, pod, neighbour));
    }
    let bystanders = pods.iter().rev().map(|(.., neighbour)| neighbour);
    for ((kind, pod, neighbour), bystander) in pods.iter().zip(bystanders) {
        let fill = "dd if=/dev/zero of=/fill bs=64k; echo $?; ls -l /fill >&2; exit 3";
        let (status, lines) = node.output(pod, "fill", fill).await;
        let said: Vec<_> = lines
            .iter()
            .map(|line| String::from_utf8_lossy(&line.content).into_owned())
            .collect();
        assert!(
            said.join("\n").contains("No space left"),
            "{kind}: {said:?}"
        );
        assert_eq!(status.exit_code, 3, "{kind}: {said:?}");

        // It is the pod's, so the neighbour has none left, and its processes and files are as before.
        let (code, _, error) = node
            .exec(
                neighbour,
                "echo y >/own && dd if=/dev/zero of=/own bs=64k count=64",
                60,
            )
            .await
            .unwrap();
        assert_ne!(code, 0, "{kind}");
        assert!(error.contains("No space left"), "{kind}: {error}");
        let alive = node.says(neighbour, "rm -f /own; echo alive").await;
        assert_eq!(alive, "alive");
        let far = node.says(bystander, "echo x >/own; cat /own; rm /own");
        assert_eq!(far.await, "x", "{kind}");

        // With the container its files go, and there is room again.
        node.remove_container(&status.id).await;
        let script =
            "dd if=/dev/zero of=/own bs=64k count=128 2>/dev/null; ls -l /own | grep -c 8388608";
        assert_eq!(node.says(neighbour, script).await, "1", "{kind}");
    }
    for annotations in [
        [("scratch", "tape"), ("ephemeral-storage", "32Mi")],
        [("scratch", "disk"), ("ephemeral-storage", "3Gi")],
        [("scratch", "disk"), ("ephemeral-storage", "a lot")],
    ] {
        let refused = node.pod_with("refused", annotated(&annotations)).await;
        let status = refused.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }
    for (_, pod, _) in &pods {
        node.remove(pod).await;
    }
    node.assert_nothing_left().await;
}

/// How many reads the guest's disks were asked for (Linux, Documentation/admin-guide/iostats.rst).
async fn disk_reads(node: &Node, container: &Container) -> u64 {
    let stats = node.says(container, "cat /proc/diskstats").await;
    let disks = stats.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let disk = fields[2].len() == 3 && fields[2].starts_with("vd");
        disk.then(|| fields[3].parse::<u64>().unwrap())
    });
    disks.sum()
}

/// All names and inodes of a layer are read ahead, not a part of them: each would be a request to the host.
#[tokio::test(flavor = "multi_thread")]
async fn who_walks_through_a_layers_names_waits_for_no_disk() {
    const NAMES: usize = 17_000;
    let Some(node) = Node::start().await else {
        return;
    };
    let names: Vec<_> = (0..NAMES)
        .map(|number| format!("names/{}/file-{number}", number / 100))
        .collect();
    let files: Vec<_> = names.iter().map(|name| (&**name, "")).collect();
    ImageMaker::new().files(&files).load(&node, NAME);
    let pod = node.pod("names").await;
    let container = run(&node, &pod, "c", NAME).await;
    let mut before = disk_reads(&node, &container).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "it is read and read");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = disk_reads(&node, &container).await;
        if now == before {
            break;
        }
        before = now;
    }
    let found = node.says(&container, "find /names -type f | wc -l").await;
    assert_eq!(found, NAMES.to_string());
    let asked = disk_reads(&node, &container).await - before;
    // Inodes of 64 bytes: a MiB, of which half was read ahead once.
    assert!(asked < 40, "{asked} reads");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

/// Where a block of a disk begins with these bytes.
fn find_block(disk: &fs::File, bytes: &[u8]) -> u64 {
    let length = disk.metadata().unwrap().len();
    let mut chunk = vec![0; 1 << 20];
    for start in (0..length).step_by(chunk.len()) {
        let count = disk.read_at(&mut chunk, start).unwrap();
        let blocks = chunk[..count].chunks(4096);
        if let Some(block) = blocks
            .enumerate()
            .find(|(_, block)| block.starts_with(bytes))
        {
            return start + 4096 * block.0 as u64;
        }
    }
    panic!("the disk does not have it");
}

/// With fs-verity, bits of a layer that change on the host's disk are an error when they are read, and a file in a layer's
/// place is refused when it is used.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_changes_on_the_disk_is_noticed() {
    // Blocks as large as pages, which older kernels ask for.
    let disk = Disk::new(300, &["-O", "verity", "-b", "4096"]);
    let options = NodeOptions {
        root: Some(disk.path().join("root")),
        verity: true,
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    let content = noise(64 << 10);
    let load = |node: &Node| {
        ImageMaker::new()
            .layer(|root| fs::write(root.join("content"), &content).unwrap())
            .load(node, NAME);
    };
    load(&node);
    let before: Vec<_> = layer_files(&node);
    let pod = node.pod("verity").await;
    // The second block, so that the first one's is read as it was.
    let raw = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(disk.file())
        .unwrap();
    let place = find_block(&raw, &content[4096..4160]);
    raw.write_all_at(&[!content[4096]], place).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    let container = run(&node, &pod, "c", NAME).await;
    let first = node
        .says(
            &container,
            "dd if=/content bs=4096 count=1 2>/dev/null | sha256sum",
        )
        .await;
    assert_eq!(first.split(' ').next(), Some(&*sha256(&content[..4096])));
    let (code, out, error) = node
        .exec(&container, "sha256sum /content", 60)
        .await
        .unwrap();
    assert_ne!(code, 0, "{out}");
    assert!(error.contains("Input/output error"), "{error}");
    raw.write_all_at(&[content[4096]], place).unwrap();

    // The same bytes, but not the file that was stored.
    for path in &before {
        if path
            .extension()
            .is_some_and(|extension| extension == "erofs")
        {
            fs::copy(path, path.with_extension("new")).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }
    }
    let refused = node.create(&pod, "refused", SLEEP, of_image(NAME)).await;
    let status = refused.map(drop).unwrap_err();
    assert_eq!(status.code(), tonic::Code::DataLoss, "{status}");
    assert!(status.message().contains("was replaced"), "{status}");
    // What is brought in again is stored again.
    load(&node);
    run(&node, &pod, "again", NAME).await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}
