//! Root file systems: layers of images in a guest, and what a container writes on them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use caisson_tests::{Container, ContainerOptions, ImageMaker, Node, Pod, PodOptions, sha256};

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

/// 127 layers are the most of an image. Three such images are more layers than a disk of the guest has partitions, and
/// sixty containers are more than a pod should have.
#[tokio::test(flavor = "multi_thread")]
async fn three_images_of_127_layers_and_sixty_containers_are_one_pod() {
    let Some(node) = Node::start().await else {
        return;
    };
    let names: Vec<_> = (0..3)
        .map(|image| format!("docker.io/library/many-{image}:test"))
        .collect();
    for (image, name) in names.iter().enumerate() {
        let mut maker = ImageMaker::new();
        for layer in 1..127 {
            maker = maker.layer(|root| {
                fs::create_dir(root.join("layers")).unwrap();
                fs::write(root.join(format!("layers/{layer}")), "").unwrap();
                fs::write(root.join("last"), format!("{image} {layer}")).unwrap();
            });
        }
        maker.load(&node, name);
    }
    let options = PodOptions {
        memory: 512 << 20,
        ..PodOptions::default()
    };
    let pod = node.pod_with("many", options).await.unwrap();
    let mut containers = vec![];
    for number in 0..60 {
        let image = number % 3;
        let name = format!("c{number}");
        let container = run(&node, &pod, &name, &names[image]).await;
        containers.push((container, format!("{image} 126\n126")));
    }
    for (container, expected) in &containers {
        let said = node.says(container, "cat /last; echo; ls /layers | wc -l");
        assert_eq!(&said.await, expected);
    }
    // A daemon that finds the pod again finds the layers where they were.
    let mut node = node;
    node.restart().await;
    let again = run(&node, &pod, "again", &names[1]).await;
    assert_eq!(node.says(&again, "cat /last").await, "1 126");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pods_of_an_image_have_its_content_and_their_own_changes() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    // Not a whole number of blocks, and more than one request.
    let big = noise((48 << 20) + 1234);
    let expected = sha256(&big);
    ImageMaker::new()
        .layer(|root| fs::write(root.join("big"), &big).unwrap())
        .layer(|root| {
            for directory in 0..20 {
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
        for _ in 0..2 {
            let said = node.says(&container, "sha256sum /big").await;
            assert_eq!(said.split(' ').next(), Some(expected.as_str()), "{number}");
        }
        // 20 directories and the one above, with 2,000 files.
        assert_eq!(node.says(&container, "find /files | wc -l").await, "2021");
        assert_eq!(
            node.says(&container, "cat /files/*/* | wc -c").await,
            (20 * 60 * (99 * 100 / 2)).to_string()
        );
        // What one writes no other sees.
        let script = format!(
            "test ! -e /own && echo {number} >/own; echo changed >>/big; rm -r /files/0; find /files | wc -l"
        );
        assert_eq!(node.says(&container, &script).await, "1920");
    }
    for (path, before) in &layers {
        assert_eq!(&sha256(&fs::read(path).unwrap()), before, "{path:?}");
    }
    for pod in &pods {
        node.remove(pod).await;
    }
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn upper_layers_take_away_what_lower_ones_have() {
    let Some(node) = Node::start().await else {
        return;
    };
    let write = |root: &Path, name: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    };
    ImageMaker::new()
        .layer(|root| {
            for name in ["a/gone", "a/kept", "b/below/1", "c/old", "d/file", "e"] {
                write(root, name);
            }
        })
        .layer(|root| {
            // A file, a directory, all that a directory had, and a directory that becomes a file and the other way round.
            for name in ["a/.wh.gone", ".wh.b", "c/.wh..wh..opq", "c/new", "e/inside"] {
                write(root, name);
            }
            fs::write(root.join("d"), "file").unwrap();
        })
        .layer(|root| write(root, "b/again"))
        .load(&node, NAME);
    let pod = node.pod("whiteouts").await;
    let container = run(&node, &pod, "c", NAME).await;
    let said = node.says(&container, "find /a /b /c /d /e -type f").await;
    let mut found: Vec<_> = said.lines().collect();
    found.sort_unstable();
    assert_eq!(found, ["/a/kept", "/b/again", "/c/new", "/d", "/e/inside"]);
    // What was taken away can be made anew.
    let script = "echo x >/a/gone; mkdir /b/below; ls /b/below | wc -l; cat /a/gone";
    assert_eq!(node.says(&container, script).await, "0\nx");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
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
    let other = node.pod("other").await;
    let bystander = node.run(&other, "c", SLEEP).await;
    for kind in ["disk", "memory"] {
        let options = annotated(&[("scratch", kind), ("ephemeral-storage", "32Mi")]);
        let pod = node.pod_with(kind, options).await.unwrap();
        let neighbour = node.run(&pod, "neighbour", SLEEP).await;
        let fill = "dd if=/dev/zero of=/fill bs=64k; echo $?; ls -l /fill >&2; exit 3";
        let (status, lines) = node.output(&pod, "fill", fill).await;
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
                &neighbour,
                "echo y >/own && dd if=/dev/zero of=/own bs=64k count=64",
                60,
            )
            .await
            .unwrap();
        assert_ne!(code, 0, "{kind}");
        assert!(error.contains("No space left"), "{kind}: {error}");
        assert_eq!(
            node.says(&neighbour, "rm -f /own; echo alive").await,
            "alive"
        );
        let far = node.says(&bystander, "echo x >/own; cat /own").await;
        assert_eq!(far, "x", "{kind}");

        // With the container its files go, and there is room again.
        node.remove_container(&status.id).await;
        let script =
            "dd if=/dev/zero of=/own bs=64k count=128 2>/dev/null; ls -l /own | grep -c 8388608";
        assert_eq!(node.says(&neighbour, script).await, "1", "{kind}");
        node.remove(&pod).await;
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
    node.remove(&other).await;
    node.assert_nothing_left().await;
}
