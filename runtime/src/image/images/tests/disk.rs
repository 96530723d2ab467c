//! A full disk.

use super::save::save;
use super::*;

/// A disk that fills up in each phase: tried with a little more room each time, until there is enough.
#[tokio::test]
async fn a_full_disk() {
    let root = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
        .arg(root.path())
        .output()
        .unwrap();
    if !mount.status.success() {
        eprintln!(
            "skipped: a full disk, as no tmpfs can be mounted: {}",
            String::from_utf8_lossy(&mount.stderr)
        );
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            run(Command::new("umount").arg("-l").arg(self.0));
        }
    }
    let _unmount = Unmount(root.path());
    let images = open(root.path());
    let kept = image(&["kept"]);
    load(&images, &kept, "kept").await;
    // Data in blocks, in the spool and in the recipe; names; a second layer.
    let big: Vec<u8> = (0..500_000u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut tar = Tar::default().file("big", &big);
    for at in 0..200usize {
        let from = at * 2000;
        tar = tar.file(&format!("small/{at}"), &big[from..from + 2000]);
    }
    let made = TestImage::new(vec![tar.end(), Tar::default().file("big", &big).end()]);
    let layout = tempfile::tempdir().unwrap();
    made.layout(layout.path(), "x");
    let ballast = root.path().join("ballast");
    let (mut failures, mut room) = (0, 0u64);
    loop {
        let free = nix::sys::statvfs::statvfs(root.path()).unwrap();
        let free = free.blocks_free() * free.fragment_size();
        fs::write(
            &ballast,
            vec![0; usize::try_from(free - room.min(free)).unwrap()],
        )
        .unwrap();
        let result = images.load(layout.path(), Some("x"), |_| {}).await;
        fs::remove_file(&ballast).unwrap();
        let Err(error) = result else { break };
        assert!(
            matches!(error, ImageError::DiskFull { .. }),
            "{room}: {error}"
        );
        failures += 1;
        // The threads of other layers end soon after.
        for _ in 0..600 {
            if files(root.path()).2 == 0 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        // With room again, everything is as it was, without a restart.
        let mut names = Vec::new();
        for image in images.list().await.unwrap() {
            names.extend(image.repo_tags);
        }
        assert_eq!(names, ["docker.io/library/kept:latest"], "{room}");
        images.gc(HashSet::new).await.unwrap();
        assert_eq!(files(root.path()), (1, 2, 0), "{room}");
        save(&images, &["kept"]).await.unwrap();
        room += 48 << 10;
        assert!(room < free, "it never fits");
    }
    assert!(failures > 10, "{failures}");
    assert_eq!(images.get("x").await.unwrap().unwrap().id, made.id());
    save(&images, &["x"]).await.unwrap();
    drop(images);
    assert_eq!(open(root.path()).list().await.unwrap().len(), 2);
}
