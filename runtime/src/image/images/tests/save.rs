//! Archives that are written.

use super::*;

/// Where an archive goes in a test.
#[derive(Clone, Default)]
struct Collected(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(super) async fn save(images: &Images, names: &[&str]) -> Result<Vec<u8>, ImageError> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let archive = Collected::default();
    images.save(&names, archive.clone()).await?;
    Ok(std::mem::take(&mut *archive.0.lock().unwrap()))
}

#[tokio::test]
async fn what_is_saved_is_the_same_image_elsewhere() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let images = open(here.path());
    let source = here.path().join("source");
    fs::create_dir_all(source.join("d")).unwrap();
    fs::write(source.join("d/file"), vec![b'x'; 70_001]).unwrap();
    let sparse = fs::File::create(source.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[1; 5000], 900_000).unwrap();
    sparse.set_len(3_000_000).unwrap();
    // What tar itself writes, with trailing blocks; and things that EROFS does not keep.
    let archive = here.path().join("layer.tar");
    run(Command::new("tar")
        .args(["--sparse", "-C"])
        .arg(&source)
        .arg("-cf")
        .arg(&archive)
        .arg("."));
    let odd = Tar::default()
        .pax(&[("comment", b"kept"), ("path", b"./renamed")])
        .file("x", &[b'o'; 9000])
        .file("twice", &[1; 5000])
        .file("twice", &[2; 5000])
        .file(".wh..wh.plnk/1.2", &[3; 5000])
        .file(".wh.gone", b"")
        .end();
    let made = TestImage::new(vec![fs::read(&archive).unwrap(), odd.clone()]);
    let other = TestImage::new(vec![odd, Tar::default().file("o", b"").end()]);
    load(&images, &made, "app:v1").await;
    load(&images, &made, "app:v2").await;
    load(&images, &other, "other").await;
    let bytes = save(&images, &["app:v1", &other.id()]).await.unwrap();
    let archive = there.path().join("saved.tar");
    fs::write(&archive, &bytes).unwrap();
    let listed = run(Command::new("tar").arg("-tf").arg(&archive));
    assert_eq!(
        listed.matches("blobs/sha256/").count(),
        3 + 2 + 2,
        "{listed}"
    );
    let elsewhere = open(there.path());
    let loaded = elsewhere.load(&archive, None, |_| {}).await.unwrap();
    let ids: Vec<_> = loaded.iter().map(|image| image.id.clone()).collect();
    assert_eq!(ids, [made.id(), other.id()]);
    assert_eq!(loaded[0].repo_tags, ["docker.io/library/app:v1"]);
    assert_eq!(loaded[1].repo_tags, ["docker.io/library/other:latest"]);
    for layer in &loaded[0].layers {
        let (one, two) = (images.layer_path(layer), elsewhere.layer_path(layer));
        assert!(fs::read(one).unwrap() == fs::read(two).unwrap());
    }
    // As `docker load` of old reads it: without the layout's files.
    let docker = there.path().join("docker");
    fs::create_dir(&docker).unwrap();
    run(Command::new("tar")
        .arg("-C")
        .arg(&docker)
        .arg("-xf")
        .arg(&archive));
    fs::remove_file(docker.join("oci-layout")).unwrap();
    pack(&docker, &archive);
    let loaded = elsewhere.load(&archive, None, |_| {}).await.unwrap();
    assert_eq!(loaded[0].id, made.id());
    assert!(matches!(
        save(&images, &["none"]).await,
        Err(ImageError::NotFound { .. })
    ));
    // A layer that the disk has changed is noticed.
    let path = images.layer_path(&loaded[0].layers[0]);
    let mut damaged = fs::read(&path).unwrap();
    let data = damaged
        .windows(8)
        .position(|part| part == b"xxxxxxxx")
        .unwrap();
    damaged[data] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, damaged).unwrap();
    let error = save(&images, &["app:v1"]).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    fs::write(&path, b"").unwrap();
    let error = save(&images, &["app:v1"]).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
}
