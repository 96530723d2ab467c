//! Images that tests make for themselves.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::{Node, sha256};

/// An image in the making: an OCI layout whose layers are plain tar archives.
#[derive(Debug)]
pub struct ImageMaker {
    dir: tempfile::TempDir,
    layers: Vec<Value>,
}

impl ImageMaker {
    /// An image whose lowest layer is a static busybox with some of its applets.
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/lib").expect("a directory in /var/lib");
        fs::create_dir_all(dir.path().join("layout/blobs/sha256")).expect("a directory");
        let empty = Self {
            dir,
            layers: vec![],
        };
        empty.layer(|root| {
            for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
                fs::create_dir(root.join(name)).expect("a directory");
            }
            fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
            for applet in [
                "sh",
                "cat",
                "ls",
                "wc",
                "dd",
                "rm",
                "mkdir",
                "sleep",
                "find",
                "sha256sum",
                "grep",
                "df",
                "test",
            ] {
                symlink("busybox", root.join("bin").join(applet)).expect("a link");
            }
        })
    }

    /// Adds a layer that has what `fill` puts into a directory.
    #[must_use]
    pub fn layer(mut self, fill: impl FnOnce(&Path)) -> Self {
        let root = self.dir.path().join("tree");
        fs::create_dir(&root).expect("a directory");
        fill(&root);
        let archive = self.dir.path().join("layer.tar");
        let made = Command::new("tar")
            .args(["--numeric-owner", "--sort=name", "-cf"])
            .arg(&archive)
            .arg("-C")
            .arg(&root)
            .arg(".")
            .status();
        assert!(made.expect("tar runs").success());
        fs::remove_dir_all(&root).expect("the directory goes");
        let bytes = fs::read(&archive).expect("an archive");
        let blob = self.blob(&bytes, "application/vnd.oci.image.layer.v1.tar");
        self.layers.push(blob);
        self
    }

    /// Adds a layer of small files, each with its path and its content, without a process and a tree for it.
    #[must_use]
    pub fn files(mut self, files: &[(&str, &str)]) -> Self {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            let added = archive.append_data(&mut header, path, content.as_bytes());
            added.expect("a path that fits");
        }
        let bytes = archive.into_inner().expect("an archive");
        let blob = self.blob(&bytes, "application/vnd.oci.image.layer.v1.tar");
        self.layers.push(blob);
        self
    }

    fn blob(&self, bytes: &[u8], media_type: &str) -> Value {
        let digest = sha256(bytes);
        fs::write(self.layout().join("blobs/sha256").join(&digest), bytes).expect("a blob");
        json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    /// Loads it into a node by this name.
    pub fn load(self, node: &Node, name: &str) {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        );
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config,
            "layers": self.layers,
        });
        let manifest = self.blob(manifest.to_string().as_bytes(), manifest_type);
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.layout().join("index.json"), index.to_string()).expect("an index");
        let version = json!({"imageLayoutVersion": "1.0.0"});
        fs::write(self.layout().join("oci-layout"), version.to_string()).expect("a layout");
        let layout = self.layout().to_string_lossy().into_owned();
        let loaded = node.caisson(&["load", "--name", name, &layout]);
        assert!(loaded.status.success(), "{loaded:?}");
    }
}

impl Default for ImageMaker {
    fn default() -> Self {
        Self::new()
    }
}
