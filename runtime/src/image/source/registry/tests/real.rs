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
        Self::start_with("")
    }

    /// With more below `http`.
    fn start_with(http: &str) -> Option<Self> {
        let data = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let config = data.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"{http}}}\n",
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
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        self.push_by(client, "http", image, tag).await;
    }

    async fn push_by(&self, client: reqwest::Client, scheme: &str, image: &TestImage, tag: &str) {
        let base = format!("{scheme}://{}/v2/org/app", self.address);
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

/// A certificate authority, with certificates of a server on this machine and of a client.
fn certificates(directory: &std::path::Path) {
    let openssl = |arguments: &str| {
        crate::image::testing::run(
            Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(directory)
                .stderr(Stdio::null()),
        );
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(&format!(
        "req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca"
    ));
    for (name, usage) in [("server", "serverAuth"), ("client", "clientAuth")] {
        let extensions = format!("subjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\n");
        std::fs::write(directory.join("extensions"), extensions).unwrap();
        openssl(&format!(
            "req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.pem"
        ));
    }
}

#[tokio::test]
async fn certificates_of_both_sides() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certs = tempfile::tempdir().unwrap();
    let path = |name: &str| certs.path().join(name);
    certificates(certs.path());
    let tls = format!(
        ", tls: {{certificate: {}, key: {}, clientcas: [{}]}}",
        path("server.pem").display(),
        path("server.key").display(),
        path("ca.pem").display()
    );
    let Some(registry) = Registry::start_with(&tls) else {
        return;
    };
    let read = |name: &str| std::fs::read(path(name)).unwrap();
    let both = [read("client.pem"), read("client.key")].concat();
    std::fs::write(path("both.pem"), &both).unwrap();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_merge(reqwest::Certificate::from_pem_bundle(&read("ca.pem")).unwrap())
        .identity(reqwest::Identity::from_pem(&both).unwrap())
        .build()
        .unwrap();
    let made = image();
    registry.push_by(client, "https", &made, "v1").await;
    let name = format!("{}/org/app:v1", registry.address);
    let server = format!("server = \"https://{}\"\n", registry.address);
    let directory = path(&registry.address);
    std::fs::create_dir(&directory).unwrap();
    for (text, fits) in [
        ("", false),
        ("ca = \"../ca.pem\"", false),
        ("client = [[\"../client.pem\", \"../client.key\"]]", false),
        ("ca = \"../client.key\"\nclient = \"../both.pem\"", false),
        (
            "ca = \"../ca.pem\"\nclient = [[\"../client.pem\", \"../client.key\"]]",
            true,
        ),
        ("ca = [\"../ca.pem\"]\nclient = \"../both.pem\"", true),
        ("skip_verify = true\nclient = \"../both.pem\"", true),
    ] {
        std::fs::write(directory.join("hosts.toml"), format!("{server}{text}")).unwrap();
        let node = node(ImageConfig {
            certs_dir: certs.path().to_owned(),
            ..quick()
        });
        let result = node.images.pull(&name, None, |_| {}).await;
        assert_eq!(result.is_ok(), fits, "{text}: {result:?}");
        if let Err(error) = result {
            let clear = matches!(
                error,
                ImageError::Registry { .. } | ImageError::Hosts { .. }
            );
            assert!(clear, "{text}: {error}");
        }
    }
}
