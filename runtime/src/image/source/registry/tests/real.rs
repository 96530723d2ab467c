//! Against a real registry.

use super::*;

/// Debian's docker-registry, on a port of its own.
struct Registry {
    child: Child,
    address: String,
    _data: tempfile::TempDir,
}

impl Registry {
    fn start() -> Option<Self> {
        let data = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let config = data.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            data.path().join("data").display()
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                eprintln!("skipped: a real registry, as docker-registry does not start: {error}");
                return None;
            }
        };
        let begin = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "the registry does not answer"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(Self {
            child,
            address,
            _data: data,
        })
    }

    async fn push(&self, image: &TestImage, tag: &str) {
        let client = Client::builder().no_proxy().build().unwrap();
        let base = format!("http://{}/v2/org/app", self.address);
        for blob in image.layers.iter().chain([&image.config]) {
            let begun = client
                .post(format!("{base}/blobs/uploads/"))
                .send()
                .await
                .unwrap();
            let mut url =
                reqwest::Url::parse(begun.headers()["location"].to_str().unwrap()).unwrap();
            url.query_pairs_mut()
                .append_pair("digest", &Digest::of(blob).to_string());
            let put = client
                .put(url)
                .header("content-type", "application/octet-stream")
                .body(blob.clone())
                .send()
                .await
                .unwrap();
            assert_eq!(put.status().as_u16(), 201);
        }
        let put = client
            .put(format!("{base}/manifests/{tag}"))
            .header("content-type", TestImage::MANIFEST)
            .body(image.manifest.clone());
        assert_eq!(put.send().await.unwrap().status().as_u16(), 201);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_real_registry() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Some(registry) = Registry::start() else {
        return;
    };
    let made = image();
    registry.push(&made, "v1").await;
    let mut tars = made.tars.clone();
    tars.push(Tar::default().file("third", b"3").end());
    let zstd: Vec<Vec<u8>> = tars
        .iter()
        .map(|tar| zstd::encode_all(&tar[..], 3).unwrap())
        .collect();
    let second = TestImage::with(tars, zstd, "application/vnd.oci.image.layer.v1.tar+zstd");
    registry.push(&second, "v2").await;
    let node = node(ImageConfig::default());
    let name = format!("{}/org/app", registry.address);
    let pulled = node
        .images
        .pull(&format!("{name}:v1"), None, |_| {})
        .await
        .unwrap();
    assert_eq!(pulled.id, made.id());
    assert_eq!(
        pulled.repo_digests,
        [format!("{name}@{}", Digest::of(&made.manifest))]
    );
    let states = Mutex::new(Vec::new());
    let report = |progress: Progress| states.lock().unwrap().push(progress.status);
    let pulled = node
        .images
        .pull(&format!("{name}:v2"), None, report)
        .await
        .unwrap();
    assert_eq!(pulled.id, second.id());
    let states = states.into_inner().unwrap();
    assert_eq!(
        states
            .iter()
            .filter(|status| **status == Status::Exists)
            .count(),
        2,
        "shared layers do not move"
    );
    let by_digest = node
        .images
        .pull(&pulled.repo_digests[0], None, |_| {})
        .await
        .unwrap();
    assert_eq!(by_digest.repo_tags, [format!("{name}:v2")]);
    let error = node
        .images
        .pull(&format!("{name}:v3"), None, |_| {})
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
}
