mod policy;
mod real;
mod trouble;

use std::collections::{BTreeMap, HashSet};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::endpoint::MAX_REDIRECTS;
use super::*;
use crate::image::testing::{Tar, TestImage};
use crate::image::{Images, Progress, Status};

/// A small HTTP server: what it answers, the test says.
struct Server {
    address: String,
    log: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
}

type Handler = dyn Fn(&str, &str, &mut TcpStream) -> std::io::Result<()> + Send + Sync;

impl Server {
    /// The handler gets the path, the whole request, and the connection, which is closed after it.
    fn start(
        handler: impl Fn(&str, &str, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (log, stop) = (
            Arc::new(Mutex::new(Vec::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let server = Self {
            address,
            log: log.clone(),
            stop: stop.clone(),
        };
        let handler: Arc<Handler> = Arc::new(handler);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (mut stream, handler, log) = (stream.unwrap(), handler.clone(), log.clone());
                std::thread::spawn(move || {
                    let mut request = Vec::new();
                    let mut byte = [0];
                    while !request.ends_with(b"\r\n\r\n") {
                        match stream.read(&mut byte) {
                            Ok(1) => request.push(byte[0]),
                            _ => return,
                        }
                    }
                    let request = String::from_utf8(request).unwrap();
                    let path = request.split(' ').nth(1).unwrap().to_owned();
                    log.lock().unwrap().push(path.clone());
                    // The client may have gone away, as it should in some tests.
                    let _ = handler(&path, &request, &mut stream);
                });
            }
        });
        server
    }

    fn seen(&self, part: &str) -> usize {
        self.log
            .lock()
            .unwrap()
            .iter()
            .filter(|path| path.contains(part))
            .count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
    }
}

fn answer(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    )?;
    stream.write_all(body)
}

/// What an image's registry has under a path.
fn content(image: &TestImage, path: &str) -> Option<Vec<u8>> {
    let path = path.split('?').next()?;
    if path.ends_with("/manifests/latest") {
        return Some(image.manifest.clone());
    }
    let blobs: BTreeMap<String, Vec<u8>> = image
        .blobs()
        .into_iter()
        .map(|(digest, blob)| (digest.to_string(), blob))
        .collect();
    blobs.get(path.rsplit('/').next()?).cloned()
}

fn serve(image: &TestImage, path: &str, stream: &mut TcpStream) -> std::io::Result<()> {
    match content(image, path) {
        Some(body) => answer(stream, "200 OK", "", &body),
        None => answer(stream, "404 Not Found", "", b""),
    }
}

fn image() -> TestImage {
    let big: Vec<u8> = (0..600_000u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    TestImage::new(vec![
        Tar::default().file("big", &big).end(),
        Tar::default().file("small", b"s").end(),
    ])
}

struct Node {
    root: tempfile::TempDir,
    images: Images,
}

fn node(config: ImageConfig) -> Node {
    let root = tempfile::tempdir().unwrap();
    let images = Images::open(root.path(), config).unwrap();
    Node { root, images }
}

impl Node {
    async fn pull(&self, server: &Server) -> Result<crate::image::Image, ImageError> {
        self.images
            .pull(&format!("{}/org/app", server.address), None, |_| {})
            .await
    }

    /// Nothing is left of a pull that failed.
    async fn is_empty(&self) -> bool {
        // The thread that converts ends soon after the pull.
        let begin = Instant::now();
        loop {
            let files = ["layers", "blobs/sha256", "tmp"].map(|directory| {
                std::fs::read_dir(self.root.path().join("images").join(directory))
                    .unwrap()
                    .count()
            });
            // A complete layer of an image whose other layer failed stays for the next try, or for the collector.
            if files[2] == 0 {
                self.images.gc(HashSet::new).await.unwrap();
                return files[1] == 0 && self.images.list().await.unwrap().is_empty();
            }
            if begin.elapsed() > Duration::from_secs(20) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn quick() -> ImageConfig {
    ImageConfig {
        stall_timeout_seconds: 2,
        progress_timeout_seconds: 60,
        ..ImageConfig::default()
    }
}

#[tokio::test]
async fn tokens_and_credentials() {
    let made = image();
    let copy = made.clone();
    let server = Server::start(move |path, request, stream| {
        let header = |name: &str| {
            request.lines().find_map(|line| {
                line.to_lowercase()
                    .starts_with(name)
                    .then(|| line.to_owned())
            })
        };
        let authorization = header("authorization:").unwrap_or_default();
        if path.starts_with("/token") {
            // "user:secret" in base64.
            let user = authorization.contains("Basic dXNlcjpzZWNyZXQ=");
            let ok = user && path.contains("service=reg") && path.contains("scope=repository");
            return match ok {
                true => answer(stream, "200 OK", "", br#"{"token":"t0k"}"#),
                false => answer(stream, "401 Unauthorized", "", b""),
            };
        }
        if authorization.contains("Bearer t0k") {
            return serve(&copy, path, stream);
        }
        let host = header("host:").unwrap()["host:".len()..].trim().to_owned();
        let challenge = format!(
            "WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:org/app:pull\"\r\n"
        );
        answer(stream, "401 Unauthorized", &challenge, b"")
    });
    let node = node(quick());
    let name = format!("{}/org/app", server.address);
    let error = node.images.pull(&name, None, |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    let auth = Auth::Basic {
        username: "user".into(),
        password: "wrong".into(),
    };
    assert!(node.images.pull(&name, Some(auth), |_| {}).await.is_err());
    let auth = Auth::Basic {
        username: "user".into(),
        password: "secret".into(),
    };
    let pulled = node.images.pull(&name, Some(auth), |_| {}).await.unwrap();
    assert_eq!(pulled.id, made.id());
    assert_eq!(server.seen("/token"), 3, "one token serves a whole pull");
}

#[tokio::test]
async fn basic_credentials() {
    let made = image();
    let copy = made.clone();
    let server = Server::start(move |path, request, stream| {
        match request.contains("Basic dXNlcjpzZWNyZXQ=") {
            true => serve(&copy, path, stream),
            false => answer(
                stream,
                "401 Unauthorized",
                "WWW-Authenticate: Basic realm=\"r\"\r\n",
                b"",
            ),
        }
    });
    let node = node(quick());
    assert!(matches!(
        node.pull(&server).await,
        Err(ImageError::Unauthorized { .. })
    ));
    let auth = Auth::Basic {
        username: "user".into(),
        password: "secret".into(),
    };
    let name = format!("{}/org/app", server.address);
    assert_eq!(
        node.images
            .pull(&name, Some(auth), |_| {})
            .await
            .unwrap()
            .id,
        made.id()
    );
}

// must-test: a registry that never ends its answer
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_and_stalled_answers() {
    type Misbehave = fn(&mut TcpStream, &[u8]) -> std::io::Result<()>;
    fn endless(stream: &mut TcpStream, _: &[u8]) -> std::io::Result<()> {
        write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        loop {
            stream.write_all(&[b' '; 1 << 16])?;
        }
    }
    fn silent(_: &mut TcpStream, _: &[u8]) -> std::io::Result<()> {
        std::thread::sleep(Duration::from_secs(20));
        Ok(())
    }
    fn stalls(stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        stream.write_all(&body[..body.len() / 2])?;
        std::thread::sleep(Duration::from_secs(20));
        Ok(())
    }
    fn trickles(stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        for byte in body {
            stream.write_all(&[*byte])?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
    let made = image();
    let targets = [
        made.manifest.clone(),
        made.config.clone(),
        made.layers[0].clone(),
    ];
    let cases: [(&str, Misbehave); 4] = [
        ("endless", endless),
        ("silent", silent),
        ("stalls", stalls),
        ("trickles", trickles),
    ];
    let work = cases.iter().flat_map(|(name, misbehave)| {
        let made = &made;
        targets
            .iter()
            .enumerate()
            .map(move |(at, target)| async move {
                let (copy, target, misbehave) = (made.clone(), target.clone(), *misbehave);
                let server = Server::start(move |path, _, stream| match content(&copy, path) {
                    Some(body) if body == target => misbehave(stream, &body),
                    _ => serve(&copy, path, stream),
                });
                let node = node(ImageConfig {
                    progress_timeout_seconds: 4,
                    ..quick()
                });
                let begin = Instant::now();
                let result =
                    tokio::time::timeout(Duration::from_secs(60), node.pull(&server)).await;
                let error = result
                    .unwrap_or_else(|_| panic!("{name} {at}: the pull does not end"))
                    .unwrap_err();
                let expected = match *name {
                    "endless" => matches!(
                        error,
                        ImageError::TooLarge { .. } | ImageError::Corrupt { .. }
                    ),
                    _ => matches!(error, ImageError::Stalled { .. }),
                };
                assert!(expected, "{name} {at} after {:?}: {error}", begin.elapsed());
                assert!(node.is_empty().await, "{name} {at}");
            })
    });
    futures::future::join_all(work).await;
}

#[tokio::test]
async fn wrong_content() {
    let made = image();
    let lie = |target: Vec<u8>, lie: Vec<u8>| {
        let copy = made.clone();
        Server::start(move |path, _, stream| match content(&copy, path) {
            Some(body) if body == target => answer(stream, "200 OK", "", &lie),
            _ => serve(&copy, path, stream),
        })
    };
    let layer = &made.layers[0];
    let mut flipped = layer.clone();
    flipped[1000] ^= 1;
    let longer = [&layer[..], b"x"].concat();
    for server in [
        lie(layer.clone(), flipped),
        lie(layer.clone(), longer),
        lie(layer.clone(), layer[..layer.len() - 1].to_vec()),
        lie(made.config.clone(), made.manifest.clone()),
        lie(made.manifest.clone(), b"<html>".to_vec()),
    ] {
        let node = node(quick());
        let error = node.pull(&server).await.unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Corrupt { .. } | ImageError::TooLarge { .. }
            ),
            "{error}"
        );
        assert!(node.is_empty().await);
    }
    // A digest that was asked for is what must come.
    let server = lie(Vec::new(), Vec::new());
    let copy = made.clone();
    let liar = Server::start(move |_, _, stream| answer(stream, "200 OK", "", &copy.manifest));
    let node = node(quick());
    for (server, digest, fits) in [
        (&server, Digest::of(&made.manifest), true),
        (&liar, Digest::of(b"other"), false),
    ] {
        let result = node
            .images
            .pull(
                &format!("{}/org/app@{digest}", server.address),
                None,
                |_| {},
            )
            .await;
        assert_eq!(result.is_ok(), fits, "{result:?}");
    }
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_again() {
    let made = image();
    for ranges in [true, false] {
        let copy = made.clone();
        let breaks = Arc::new(Mutex::new(0));
        let count = breaks.clone();
        let server = Server::start(move |path, request, stream| {
            let Some(body) = content(&copy, path).filter(|body| *body == copy.layers[0]) else {
                return serve(&copy, path, stream);
            };
            let range = request.lines().find_map(|line| {
                line.to_lowercase()
                    .strip_prefix("range: bytes=")
                    .map(str::to_owned)
            });
            let from: usize = range
                .filter(|_| ranges)
                .map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
            let broken = {
                let mut count = count.lock().unwrap();
                *count += 1;
                *count <= 3
            };
            let status = if from > 0 {
                format!(
                    "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}",
                    body.len() - 1,
                    body.len()
                )
            } else {
                "200 OK".into()
            };
            write!(
                stream,
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                body.len() - from
            )?;
            let end = if broken {
                (from + 150_000).min(body.len() - 1)
            } else {
                body.len()
            };
            stream.write_all(&body[from..end])
        });
        let node = node(quick());
        assert_eq!(node.pull(&server).await.unwrap().id, made.id());
        assert!(*breaks.lock().unwrap() >= 3);
    }
}

#[tokio::test]
async fn redirects_end() {
    let server = Server::start(|path, _, stream| {
        answer(
            stream,
            "307 Temporary Redirect",
            &format!("Location: {path}x\r\n"),
            b"",
        )
    });
    let node = node(quick());
    let error = node.pull(&server).await.unwrap_err();
    assert!(error.to_string().contains("redirect"), "{error}");
    assert!(server.seen("") <= MAX_REDIRECTS + 2);
}

#[tokio::test]
async fn overload_missing_and_dead_registries() {
    let made = image();
    let copy = made.clone();
    let failures = Mutex::new(0);
    let server = Server::start(move |path, _, stream| {
        let mut failures = failures.lock().unwrap();
        *failures += 1;
        if *failures <= 2 {
            answer(stream, "503 Busy", "", b"")
        } else {
            serve(&copy, path, stream)
        }
    });
    let node = node(quick());
    assert_eq!(node.pull(&server).await.unwrap().id, made.id());
    let error = node
        .images
        .pull(&format!("{}/no/such:tag", server.address), None, |_| {})
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = node
        .images
        .pull(&format!("{free}/app"), None, |_| {})
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
}

#[tokio::test]
async fn mirrors_come_first_and_get_no_credentials() {
    let made = image();
    let copy = made.clone();
    let leaked = Arc::new(AtomicBool::new(false));
    let seen = leaked.clone();
    let mirror = Server::start(move |path, request, stream| {
        seen.fetch_or(
            request.to_lowercase().contains("authorization"),
            Ordering::Relaxed,
        );
        serve(&copy, path, stream)
    });
    let dead = Server::start(|_, request, stream| {
        assert!(request.contains("x-key: k"), "{request}");
        answer(stream, "404 Not Found", "", b"")
    });
    let certs = tempfile::tempdir().unwrap();
    let registry = certs.path().join("registry.invalid");
    std::fs::create_dir(&registry).unwrap();
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://{}\".header]\nx-key = \"k\"\n[host.\"http://{}/\"]\n",
        dead.address, dead.address, mirror.address
    );
    std::fs::write(registry.join("hosts.toml"), text).unwrap();
    let certs_dir = certs.path().to_owned();
    let node = node(ImageConfig {
        certs_dir,
        ..quick()
    });
    let auth = Auth::Basic {
        username: "user".into(),
        password: "secret".into(),
    };
    let pulled = node
        .images
        .pull("registry.invalid/org/app", Some(auth), |_| {})
        .await
        .unwrap();
    assert_eq!(pulled.repo_tags, ["registry.invalid/org/app:latest"]);
    assert!(!leaked.load(Ordering::Relaxed));
    assert_eq!((dead.seen("manifests"), mirror.seen("blobs")), (1, 3));
    assert_eq!(dead.seen("manifests/latest?ns=registry.invalid"), 1);
}
