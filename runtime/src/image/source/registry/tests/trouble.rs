//! Overload, tokens that expire, layers that are elsewhere.

use super::*;

#[tokio::test]
async fn a_token_that_expires_is_renewed() {
    let made = image();
    let copy = made.clone();
    // Each token is good for two requests.
    let (issued, left) = (Mutex::new(0), Mutex::new(0));
    let server = Server::start(move |path, request, stream| {
        let (mut issued, mut left) = (issued.lock().unwrap(), left.lock().unwrap());
        if path.starts_with("/token") {
            (*issued, *left) = (*issued + 1, 2);
            let token = format!("{{\"token\":\"t{issued}\"}}");
            return answer(stream, "200 OK", "", token.as_bytes());
        }
        if request.contains(&format!("Bearer t{issued}\r\n")) && *left > 0 {
            *left -= 1;
            drop((issued, left));
            return serve(&copy, path, stream);
        }
        let host = request
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .unwrap();
        let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n");
        answer(stream, "401 Unauthorized", &challenge, b"")
    });
    let node = node(ImageConfig {
        parallel_layers: 1,
        ..quick()
    });
    assert_eq!(node.pull(&server).await.unwrap().id, made.id());
    assert!(server.seen("/token") >= 2, "{}", server.seen("/token"));
}

#[tokio::test]
async fn overload_is_waited_for_and_refusals_are_not() {
    let made = image();
    for (status, headers, expected) in [
        ("429 Too Many Requests", "Retry-After: 1\r\n", None),
        ("503 Busy", "", None),
        ("502 Bad Gateway", "Retry-After: soon\r\n", None),
        ("408 Request Timeout", "", None),
        (
            "429 Too Many Requests",
            "Retry-After: 100000\r\n",
            Some("100000 s"),
        ),
        ("400 Bad Request", "", Some("400")),
        ("403 Forbidden", "Retry-After: 1\r\n", Some("403")),
        ("451 Unavailable For Legal Reasons", "", Some("451")),
    ] {
        let copy = made.clone();
        let asked = Mutex::new(0);
        let server = Server::start(move |path, _, stream| {
            let first = {
                let mut asked = asked.lock().unwrap();
                *asked += 1;
                *asked <= 2
            };
            match first {
                true => answer(stream, status, headers, b""),
                false => serve(&copy, path, stream),
            }
        });
        let node = node(quick());
        let result = node.pull(&server).await;
        match expected {
            None => assert_eq!(result.unwrap().id, made.id(), "{status}"),
            Some(part) => {
                let error = result.unwrap_err();
                assert!(error.to_string().contains(part), "{status}: {error}");
                assert_eq!(server.seen(""), 1, "{status}");
            }
        }
    }
}

// must-test: a registry that never ends its answer
#[tokio::test]
async fn an_answer_that_stalls_is_taken_up_again() {
    let made = image();
    let copy = made.clone();
    let stalls = Mutex::new(1);
    let server = Server::start(move |path, request, stream| {
        let Some(body) = content(&copy, path).filter(|body| *body == copy.layers[0]) else {
            return serve(&copy, path, stream);
        };
        let half = body.len() / 2;
        if std::mem::take(&mut *stalls.lock().unwrap()) > 0 {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )?;
            stream.write_all(&body[..half])?;
            std::thread::sleep(Duration::from_secs(20));
            return Ok(());
        }
        let range = request
            .lines()
            .find_map(|line| line.strip_prefix("range: bytes="));
        let from: usize = range.unwrap().trim_end_matches('-').parse().unwrap();
        assert_eq!(from, half);
        let (last, all) = (body.len() - 1, body.len());
        let headers = format!("Content-Range: bytes {from}-{last}/{all}\r\n");
        answer(stream, "206 Partial Content", &headers, &body[from..])
    });
    let node = node(ImageConfig {
        stall_timeout_seconds: 1,
        progress_timeout_seconds: 30,
        ..ImageConfig::default()
    });
    assert_eq!(node.pull(&server).await.unwrap().id, made.id());
}

#[tokio::test]
async fn a_mirror_that_breaks_off_is_left_for_the_next() {
    let made = image();
    let copy = made.clone();
    let mirror = Server::start(move |path, _, stream| match content(&copy, path) {
        Some(body) if body == copy.layers[0] => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )?;
            stream.write_all(&body[..100])
        }
        Some(body) if body == copy.config => answer(stream, "200 OK", "", b"a lie"),
        _ => serve(&copy, path, stream),
    });
    let copy = made.clone();
    let upstream = Server::start(move |path, _, stream| serve(&copy, path, stream));
    let certs = tempfile::tempdir().unwrap();
    std::fs::create_dir(certs.path().join("_default")).unwrap();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    std::fs::write(certs.path().join("_default/hosts.toml"), text).unwrap();
    let node = node(ImageConfig {
        certs_dir: certs.path().to_owned(),
        ..quick()
    });
    assert_eq!(node.pull(&upstream).await.unwrap().id, made.id());
    assert_eq!(upstream.seen("manifests"), 0);
    assert_eq!(
        upstream.seen("blobs"),
        2,
        "the configuration and what is left of the layer"
    );
}

#[tokio::test]
async fn foreign_layers_only_where_that_is_allowed() {
    let mut made = image();
    let layer = made.layers[0].clone();
    let elsewhere = {
        let layer = layer.clone();
        Server::start(move |_, request, stream| {
            assert!(
                !request.to_lowercase().contains("authorization"),
                "{request}"
            );
            answer(stream, "200 OK", "", &layer)
        })
    };
    let mut manifest: serde_json::Value = serde_json::from_slice(&made.manifest).unwrap();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    manifest["layers"][0]["mediaType"] = foreign.into();
    let url = format!("http://{}/layer", elsewhere.address);
    let urls = serde_json::json!(["http://198.51.100.1/not-https", "file:///etc/passwd", url]);
    manifest["layers"][0]["urls"] = urls;
    made.manifest = manifest.to_string().into_bytes();
    let copy = made.clone();
    let server = Server::start(move |path, _, stream| match content(&copy, path) {
        Some(body) if body == copy.layers[0] => answer(stream, "404 Not Found", "", b""),
        _ => serve(&copy, path, stream),
    });
    let forbidden = node(quick());
    let error = forbidden.pull(&server).await.unwrap_err();
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("images.foreign_layers"),
        "{error}"
    );
    assert_eq!(elsewhere.seen(""), 0);
    let allowed = node(ImageConfig {
        foreign_layers: true,
        ..quick()
    });
    assert_eq!(allowed.pull(&server).await.unwrap().id, made.id());
    assert_eq!(elsewhere.seen("/layer"), 1);
}

#[tokio::test]
async fn schema_1_is_refused_by_name() {
    let server = Server::start(|_, _, stream| {
        let body =
            br#"{"schemaVersion":1,"name":"org/app","tag":"latest","fsLayers":[],"signatures":[]}"#;
        answer(stream, "200 OK", "", body)
    });
    let error = node(quick()).pull(&server).await.unwrap_err();
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("schema 1"), "{error}");
}
