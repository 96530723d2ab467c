//! Parts for tests: tar streams with whatever in them, images of such layers, mounts of EROFS images.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::digest::Digest;

/// A tar stream, entry by entry, without any check.
#[derive(Default)]
pub(super) struct Tar(pub Vec<u8>);

impl Tar {
    /// A raw header block.
    pub(super) fn header(
        kind: u8,
        path: &[u8],
        link: &[u8],
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &path[..path.len().min(100)]);
        put(100, format!("{mode:07o}\0").as_bytes());
        // Owners in GNU's base 256, as they may have 32 bits.
        put(108, &[0x80, 0, 0, 0]);
        put(112, &owner.0.to_be_bytes());
        put(116, &[0x80, 0, 0, 0]);
        put(120, &owner.1.to_be_bytes());
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"14520000000\0");
        put(156, &[kind]);
        put(157, &link[..link.len().min(100)]);
        put(257, b"ustar\x0000");
        Self::seal(&mut block);
        block
    }

    /// Sets the checksum.
    pub(super) fn seal(block: &mut [u8; 512]) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    pub(super) fn raw(mut self, kind: u8, path: &str, link: &str, data: &[u8], mode: u32) -> Self {
        let header = Self::header(
            kind,
            path.as_bytes(),
            link.as_bytes(),
            data.len() as u64,
            mode,
            (0, 0),
        );
        self.0.extend(header);
        self.data(data)
    }

    pub(super) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, path: &str, data: &[u8]) -> Self {
        self.raw(b'0', path, "", data, 0o644)
    }

    pub(super) fn dir(self, path: &str, mode: u32) -> Self {
        self.raw(b'5', path, "", b"", mode)
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(b'2', path, target, b"", 0o777)
    }

    pub(super) fn hard_link(self, path: &str, target: &str) -> Self {
        self.raw(b'1', path, target, b"", 0o644)
    }

    pub(super) fn device(mut self, kind: u8, path: &str, major: u32, minor: u32) -> Self {
        let mut block = Self::header(kind, path.as_bytes(), b"", 0, 0o600, (0, 0));
        block[329..337].copy_from_slice(format!("{major:07o}\0").as_bytes());
        block[337..345].copy_from_slice(format!("{minor:07o}\0").as_bytes());
        Self::seal(&mut block);
        self.0.extend(block);
        self
    }

    pub(super) fn owned(mut self, path: &str, data: &[u8], mode: u32, owner: (u32, u32)) -> Self {
        self.0.extend(Self::header(
            b'0',
            path.as_bytes(),
            b"",
            data.len() as u64,
            mode,
            owner,
        ));
        self.data(data)
    }

    /// A PAX header for the entry that follows.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let length = (1..)
                .map(|digits| body + digits)
                .find(|n| n.to_string().len() + body == *n)
                .unwrap();
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw(b'x', "pax", "", &data, 0o644)
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image as its blobs.
#[derive(Clone)]
pub(super) struct TestImage {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    /// The blobs of its layers.
    pub layers: Vec<Vec<u8>>,
    /// The tar streams of its layers.
    pub tars: Vec<Vec<u8>>,
}

impl TestImage {
    pub(super) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

    /// An image of gzip layers.
    pub(super) fn new(tars: Vec<Vec<u8>>) -> Self {
        let layers: Vec<Vec<u8>> = tars.iter().map(|tar| gzip(tar)).collect();
        Self::with(tars, layers, Self::GZIP)
    }

    pub(super) fn with(tars: Vec<Vec<u8>>, layers: Vec<Vec<u8>>, media_type: &str) -> Self {
        let ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Cmd": ["/hello"], "Env": ["PATH=/bin"], "Labels": {"n": ids.len().to_string()}},
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let config = config.to_string().into_bytes();
        let described: Vec<_> = layers
            .iter()
            .map(|blob| serde_json::json!({"mediaType": media_type, "digest": Digest::of(blob), "size": blob.len()}))
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": Self::MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config), "size": config.len(),
            },
            "layers": described,
        });
        Self {
            config,
            manifest: manifest.to_string().into_bytes(),
            layers,
            tars,
        }
    }

    pub(super) fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }

    /// All blobs, by digest.
    pub(super) fn blobs(&self) -> BTreeMap<Digest, Vec<u8>> {
        let blobs = self.layers.iter().chain([&self.config, &self.manifest]);
        blobs.map(|blob| (Digest::of(blob), blob.clone())).collect()
    }

    /// Writes it as an OCI layout, under `name`.
    pub(super) fn layout(&self, root: &Path, name: &str) {
        fs::create_dir_all(root.join("blobs/sha256")).unwrap();
        for (digest, blob) in self.blobs() {
            fs::write(root.join("blobs/sha256").join(digest.hex()), blob).unwrap();
        }
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": Self::MANIFEST, "digest": Digest::of(&self.manifest), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        }]});
        fs::write(root.join("index.json"), index.to_string()).unwrap();
    }

    /// As an archive of `docker save`.
    pub(super) fn docker_archive(&self, tag: &str) -> Vec<u8> {
        let mut tar = Tar::default().file("abc.json", &self.config);
        let mut names = Vec::new();
        for (at, layer) in self.tars.iter().enumerate() {
            tar = tar
                .dir(&format!("l{at}/"), 0o755)
                .file(&format!("l{at}/layer.tar"), layer);
            names.push(format!("l{at}/layer.tar"));
        }
        let manifest =
            serde_json::json!([{"Config": "abc.json", "RepoTags": [tag], "Layers": names}]);
        tar.file("manifest.json", manifest.to_string().as_bytes())
            .end()
    }
}

/// Packs a directory as a tar archive with the system's tar.
pub(super) fn pack(directory: &Path, archive: &Path) {
    run(Command::new("tar")
        .arg("-C")
        .arg(directory)
        .arg("-cf")
        .arg(archive)
        .arg("."));
}

pub(super) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An EROFS image that the kernel has mounted; unmounted when dropped.
pub(super) struct Mounted(tempfile::TempDir);

impl Mounted {
    /// Mounts the image. `None`, said aloud, where that is not possible (no root, no loop device).
    pub(super) fn new(image: &Path) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .args([image, directory.path()])
            .output()
            .unwrap();
        if output.status.success() {
            return Some(Self(directory));
        }
        let reason = String::from_utf8_lossy(&output.stderr).into_owned();
        // A kernel that knows EROFS and refuses the image is a failure, not a reason to skip.
        let known = fs::read_to_string("/proc/filesystems")
            .unwrap()
            .contains("erofs");
        let root = fs::metadata("/proc/self")
            .is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
        assert!(
            !(known && root && Path::new("/dev/loop-control").exists()),
            "the kernel refuses the image: {reason}"
        );
        eprintln!("skipped: the kernel's reader, as nothing can be mounted here: {reason}");
        None
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A program that another test starts has copies of our descriptors until its exec, and keeps the mount busy so long.
        let unmounted = (0..100).any(|_| {
            let status = Command::new("umount").arg(self.0.path()).status();
            let done = status.is_ok_and(|status| status.success());
            if !done {
                std::thread::sleep(Duration::from_millis(50));
            }
            done
        });
        assert!(unmounted || std::thread::panicking());
    }
}

/// Lets `fsck.erofs` look at the image.
pub(super) fn fsck(image: &Path) {
    if Command::new("fsck.erofs").arg("-V").output().is_err() {
        eprintln!("skipped: fsck.erofs, which is not installed (package erofs-utils)");
        return;
    }
    run(Command::new("fsck.erofs").arg(image));
}
