mod disk;
mod save;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::image::testing::{Mounted, Tar, TestImage, pack, run};

fn open(root: &Path) -> Images {
    Images::open(root, ImageConfig::default()).unwrap()
}

fn image(names: &[&str]) -> TestImage {
    TestImage::new(
        names
            .iter()
            .map(|name| Tar::default().file(name, name.as_bytes()).end())
            .collect(),
    )
}

/// Names of the layers' files, and how many blobs and temporary files there are.
fn files(root: &Path) -> (usize, usize, usize) {
    let count = |directory: &str, suffix: &str| {
        fs::read_dir(root.join("images").join(directory))
            .unwrap()
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_str().unwrap().ends_with(suffix)
            })
            .count()
    };
    let layers = count("layers", ".erofs");
    assert!(
        count("layers", ".recipe") >= layers,
        "a layer lacks its recipe"
    );
    (layers, count("blobs/sha256", ""), count("tmp", ""))
}

async fn load(images: &Images, image: &TestImage, name: &str) -> Image {
    let layout = tempfile::tempdir().unwrap();
    image.layout(layout.path(), "x");
    images
        .load(layout.path(), Some(name), |_| {})
        .await
        .unwrap()
        .remove(0)
}

#[tokio::test]
async fn layout_archive_and_docker_archive_give_the_same_image() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let made = image(&["one", "two"]);
    let layout = root.path().join("layout");
    made.layout(&layout, "example.org/app:v1");
    let archive = root.path().join("oci.tar");
    pack(&layout, &archive);
    let docker = root.path().join("docker.tar");
    fs::write(&docker, made.docker_archive("app:docker")).unwrap();
    run(Command::new("gzip").arg("-k").arg(&docker));
    let packed = docker.with_extension("tar.gz");
    let moved = AtomicU64::new(0);
    for (path, tag) in [
        (&layout, "example.org/app:v1"),
        (&archive, "example.org/app:v1"),
        (&docker, "docker.io/library/app:docker"),
        (&packed, "docker.io/library/app:docker"),
    ] {
        let report = |progress: crate::image::Progress| {
            moved.fetch_add(
                u64::from(progress.status == crate::image::Status::Pulling && progress.done == 0),
                Ordering::Relaxed,
            );
        };
        let loaded = images.load(path, None, report).await.unwrap();
        assert_eq!(loaded.len(), 1);
        assert_eq!(loaded[0].id, made.id());
        assert!(
            loaded[0].repo_tags.contains(&tag.to_owned()),
            "{:?}",
            loaded[0]
        );
    }
    assert_eq!(moved.load(Ordering::Relaxed), 2, "each layer is made once");
    let image = images.get("app:docker").await.unwrap().unwrap();
    assert_eq!(image.config.cmd, ["/hello"]);
    assert_eq!(
        image.layers,
        made.tars
            .iter()
            .map(|tar| Digest::of(tar))
            .collect::<Vec<_>>()
    );
    assert!(image.size > 8192);
    for (path, name) in images.layer_paths(&image).iter().zip(["one", "two"]) {
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444, "pod processes are not root");
        if let Some(mounted) = Mounted::new(path) {
            assert_eq!(fs::read_to_string(mounted.path(name)).unwrap(), name);
        }
    }
    assert_eq!(images.list().await.unwrap().len(), 1);
    assert_eq!(files(root.path()), (2, 2, 0));
    let info = images.fs_info().await.unwrap();
    let du = |option: &[&str]| -> u64 {
        let store = root.path().join("images");
        let text = run(Command::new("du").args(option).arg("-s").arg(store));
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(
        (info.used_bytes, info.inodes),
        (du(&["-B1"]), du(&["--inodes"]))
    );
    assert!(info.used_bytes > image.size);
}

#[tokio::test]
async fn names() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let (one, two) = (image(&["1"]), image(&["2"]));
    load(&images, &one, "app:v1").await;
    let found = load(&images, &two, "app:v2").await;
    let digest = format!("docker.io/library/app@{}", Digest::of(&two.manifest));
    assert_eq!(found.repo_digests.as_slice(), std::slice::from_ref(&digest));
    for name in [
        "app:v2",
        "docker.io/library/app:v2",
        &digest,
        &two.id(),
        &two.id()[7..],
        &two.id()[7..20],
    ] {
        assert_eq!(
            images.get(name).await.unwrap().unwrap().id,
            two.id(),
            "{name}"
        );
    }
    for name in ["app", "other:v2", &format!("app@{}", Digest::of(b""))] {
        assert_eq!(images.get(name).await.unwrap(), None, "{name}");
    }
    assert!(matches!(
        images.get("../x").await,
        Err(ImageError::InvalidReference { .. })
    ));
    assert!(matches!(
        images.get("sha256:12").await,
        Err(ImageError::InvalidReference { .. })
    ));
    // A tag moves to the image that gets it last.
    load(&images, &two, "app:v1").await;
    assert_eq!(images.get("app:v1").await.unwrap().unwrap().id, two.id());
    assert!(
        images
            .get(&one.id())
            .await
            .unwrap()
            .unwrap()
            .repo_tags
            .is_empty()
    );
    assert!(!images.get("app:v2").await.unwrap().unwrap().pinned);
    drop(images);
    let pinned = vec!["app:v1".parse().unwrap()];
    let config = ImageConfig {
        pinned,
        ..ImageConfig::default()
    };
    let again = Images::open(root.path(), config).unwrap();
    assert!(again.get("app:v2").await.unwrap().unwrap().pinned);
    let pruned = again
        .prune(true, HashSet::new(), HashSet::new)
        .await
        .unwrap();
    assert_eq!(pruned.images, [one.id()]);
    load(&again, &one, "app:v0").await;
    assert_eq!(
        again.get("app:v1").await.unwrap().unwrap().repo_tags.len(),
        2
    );
    assert_eq!(again.list().await.unwrap().len(), 2);
}

#[tokio::test]
async fn remove_takes_what_nobody_needs() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let (one, two) = (image(&["shared", "1"]), image(&["shared", "2"]));
    load(&images, &one, "one").await;
    load(&images, &one, "uno").await;
    load(&images, &two, "two").await;
    assert_eq!(files(root.path()), (3, 4, 0));
    let nothing = HashSet::new;
    let removed = images.remove("uno", nothing).await.unwrap();
    assert_eq!((removed.image, removed.names.len()), (None, 1));
    assert_eq!(files(root.path()), (3, 4, 0));
    let removed = images.remove("one", nothing).await.unwrap();
    assert_eq!(removed.image, Some(one.id()));
    assert!(removed.freed >= 4096);
    assert_eq!(files(root.path()), (2, 2, 0));
    // A running container keeps its layers, and they go when it has gone.
    let running = Digest::of(&two.tars[1]);
    let in_use = move || HashSet::from([running]);
    images.remove(&two.id(), in_use).await.unwrap();
    assert_eq!(files(root.path()), (1, 0, 0));
    assert!(images.layer_path(&Digest::of(&two.tars[1])).exists());
    assert!(images.gc(nothing).await.unwrap() > 0);
    assert_eq!(files(root.path()), (0, 0, 0));
    assert!(matches!(
        images.remove("two", nothing).await,
        Err(ImageError::NotFound { .. })
    ));
}

#[tokio::test]
async fn broken_sources_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let good = image(&["one"]);
    let other = gzip_of(b"other");
    let with_layer = |blob: Vec<u8>| {
        let mut bad = good.clone();
        let layout = tempfile::tempdir().unwrap();
        bad.layers = good.layers.clone();
        bad.layout(layout.path(), "x");
        fs::write(
            layout
                .path()
                .join("blobs/sha256")
                .join(Digest::of(&good.layers[0]).hex()),
            blob,
        )
        .unwrap();
        layout
    };
    let cut = good.layers[0][..good.layers[0].len() / 2].to_vec();
    let missing = tempfile::tempdir().unwrap();
    good.layout(missing.path(), "x");
    fs::remove_file(
        missing
            .path()
            .join("blobs/sha256")
            .join(Digest::of(&good.layers[0]).hex()),
    )
    .unwrap();
    let forged = tempfile::tempdir().unwrap();
    good.layout(forged.path(), "x");
    fs::write(
        forged
            .path()
            .join("blobs/sha256")
            .join(Digest::of(&good.config).hex()),
        &good.manifest,
    )
    .unwrap();
    for layout in [
        with_layer(cut),
        with_layer(other),
        with_layer(Vec::new()),
        forged,
        missing,
    ] {
        let error = images
            .load(layout.path(), Some("x"), |_| {})
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Corrupt { .. }
                    | ImageError::NotFound { .. }
                    | ImageError::TooLarge { .. }
            ),
            "{error}"
        );
        assert_eq!(files(root.path()), (0, 0, 0), "{error}");
        assert!(images.list().await.unwrap().is_empty());
    }
    let archive = root.path().join("a.tar");
    let docker = good.docker_archive("x");
    for (bytes, wanted) in [
        (b"not an archive".to_vec(), "corrupt"),
        (Vec::new(), "not supported"),
        (docker[..2000].to_vec(), "corrupt"),
        (Tar::default().file("../x", b"").end(), "corrupt"),
        (
            Tar::default().file("manifest.json", b"[]").end(),
            "no image",
        ),
        (
            Tar::default()
                .file("manifest.json", br#"[{"Config":"../../etc/passwd"}]"#)
                .end(),
            "corrupt",
        ),
        (
            Tar::default().symlink("manifest.json", "/etc/passwd").end(),
            "manifest.json",
        ),
        (
            Tar::default()
                .symlink("manifest.json", "manifest.json")
                .end(),
            "not supported",
        ),
    ] {
        fs::write(&archive, &bytes).unwrap();
        let error = images.load(&archive, None, |_| {}).await.unwrap_err();
        let clear =
            error.to_string().contains(wanted) || matches!(error, ImageError::Unsupported { .. });
        assert!(clear, "{wanted}: {error}");
    }
    run(Command::new("mkfifo").arg(root.path().join("fifo")));
    for path in ["fifo", "nowhere"] {
        assert!(
            images
                .load(&root.path().join(path), None, |_| {})
                .await
                .is_err()
        );
    }
    assert_eq!(files(root.path()), (0, 0, 0));
}

fn gzip_of(bytes: &[u8]) -> Vec<u8> {
    crate::image::testing::gzip(bytes)
}

// must-test: a manifest, an index or a config of absurd size or depth
#[tokio::test]
async fn nested_indexes() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let made = image(&["one"]);
    for (depth, fits) in [(2, true), (3, true), (4, false), (40, false)] {
        let layout = tempfile::tempdir().unwrap();
        made.layout(layout.path(), "x");
        let mut top = made.manifest.clone();
        for _ in 0..depth {
            let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
                "mediaType": "application/vnd.oci.image.index.v1+json", "digest": Digest::of(&top), "size": top.len(),
                "platform": {"os": "linux", "architecture": "amd64"},
            }]});
            top = index.to_string().into_bytes();
            fs::write(
                layout
                    .path()
                    .join("blobs/sha256")
                    .join(Digest::of(&top).hex()),
                &top,
            )
            .unwrap();
        }
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [
            {"mediaType": "x", "digest": Digest::of(&top), "size": top.len()}]});
        fs::write(layout.path().join("index.json"), index.to_string()).unwrap();
        let result = images.load(layout.path(), Some("x"), |_| {}).await;
        assert_eq!(result.is_ok(), fits, "{depth}: {result:?}");
    }
}

#[tokio::test]
async fn one_layer_is_made_once_for_all_who_want_it() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let big: Vec<u8> = (0..4_000_000u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let made = TestImage::new(vec![Tar::default().file("big", &big).end()]);
    let layout = root.path().join("layout");
    made.layout(&layout, "x");
    let (pulled, existed) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = (0..8).map(|at| {
        let (images, layout, name) = (images.clone(), layout.clone(), format!("app:{at}"));
        let (pulled, existed) = (&pulled, &existed);
        async move {
            let report = move |progress: crate::image::Progress| match progress.status {
                crate::image::Status::Exists => {
                    let _ = existed.fetch_add(1, Ordering::Relaxed);
                }
                crate::image::Status::Done if !progress.item.contains('/') => {
                    let _ = pulled.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            };
            images.load(&layout, Some(&name), report).await.unwrap()
        }
    });
    futures::future::join_all(work).await;
    assert_eq!((pulled.into_inner(), existed.into_inner()), (1, 7));
    assert_eq!(
        images.get("app:7").await.unwrap().unwrap().repo_tags.len(),
        8
    );
}

#[tokio::test]
async fn a_dropped_load_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let tars = vec![Tar::default().file("zeros", &vec![0; 16 << 20]).end()];
    let made = TestImage::with(tars.clone(), tars, "application/vnd.oci.image.layer.v1.tar");
    let layout = root.path().join("layout");
    made.layout(&layout, "x");
    let load = images.load(&layout, Some("x"), |_| {});
    let ended = tokio::time::timeout(std::time::Duration::from_millis(20), load).await;
    if ended.is_ok() {
        eprintln!("skipped: the load was over before it could be dropped");
        return;
    }
    for _ in 0..600 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        if files(root.path()) == (0, 0, 0) {
            return;
        }
    }
    panic!("files are left: {:?}", files(root.path()));
}

#[tokio::test]
async fn a_store_after_a_crash() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    load(&images, &image(&["1"]), "one").await;
    let two = load(&images, &image(&["2"]), "two").await;
    let lost = images.layer_paths(&two).remove(0);
    drop(images);
    fs::write(root.path().join("images/tmp/half"), b"x").unwrap();
    fs::write(
        root.path()
            .join("images/layers")
            .join(format!("{}.erofs", Digest::of(b"orphan").hex())),
        b"x",
    )
    .unwrap();
    fs::remove_file(lost).unwrap();
    let images = open(root.path());
    assert_eq!(files(root.path()).2, 0);
    assert!(images.get("one").await.unwrap().is_some());
    assert!(
        images.get("two").await.unwrap().is_none(),
        "an image without its layer is no image"
    );
    images.gc(HashSet::new).await.unwrap();
    assert_eq!(files(root.path()), (1, 2, 0));
    assert!(load(&images, &image(&["2"]), "two").await.repo_tags.len() == 1);
}

#[tokio::test]
async fn what_is_about_to_be_used_stays() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    load(&images, &image(&["1"]), "one").await;
    let found = images.get("one").await.unwrap().unwrap();
    let clone = found.clone();
    images.remove("one", HashSet::new).await.unwrap();
    drop(found);
    images.gc(HashSet::new).await.unwrap();
    assert!(images.layer_paths(&clone)[0].exists());
    drop(clone);
    images.gc(HashSet::new).await.unwrap();
    assert_eq!(files(root.path()), (0, 0, 0));
}

#[tokio::test]
async fn prune_leaves_what_has_a_name_or_a_container() {
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    let (old, new, used) = (image(&["old"]), image(&["new"]), image(&["used"]));
    load(&images, &old, "app").await;
    load(&images, &new, "app").await;
    load(&images, &used, "used").await;
    let container = HashSet::from([used.id()]);
    let pruned = images
        .prune(false, container.clone(), HashSet::new)
        .await
        .unwrap();
    assert_eq!(pruned.images, [old.id()]);
    assert!(pruned.freed > 4096);
    let pruned = images.prune(true, container, HashSet::new).await.unwrap();
    assert_eq!(pruned.images, [new.id()]);
    assert_eq!(files(root.path()), (1, 2, 0));
}

#[test]
fn futures_can_move_between_threads() {
    fn check<T: Send>(_: T) {}
    let root = tempfile::tempdir().unwrap();
    let images = open(root.path());
    check(images.pull("x", None, |_| {}));
    check(images.load(root.path(), None, |_| {}));
    check(images.remove("x", HashSet::new));
}
