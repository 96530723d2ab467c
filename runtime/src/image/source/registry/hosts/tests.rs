use super::*;

fn read_hosts(registry: &str, directory: &str, text: &str) -> Result<Vec<Host>, ImageError> {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join(directory);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("hosts.toml"), text).unwrap();
    let mut hosts = hosts(root.path(), registry)?;
    for host in &mut hosts {
        for path in host
            .ca
            .iter_mut()
            .chain(host.client.iter_mut().map(|(path, _)| path))
        {
            *path = path.strip_prefix(root.path()).unwrap_or(path).to_owned();
        }
    }
    Ok(hosts)
}

#[test]
fn without_a_file_the_registry_is_what_its_name_says() {
    let none = Path::new("/nonexistent");
    for (registry, base) in [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("reg.example:5000", "https://reg.example:5000/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1", "http://127.0.0.1/v2"),
        ("[::1]:80", "http://[::1]:80/v2"),
    ] {
        let found = hosts(none, registry).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].base, base);
        assert!(found[0].upstream && found[0].resolve && found[0].pull);
        assert_eq!(found[0].namespace, None, "{registry}");
    }
}

#[test]
fn a_whole_file() {
    let text = r#"
            server = "https://upstream.example"
            ca = "upstream.pem"
            [host."https://z-first.example:8443"]
              capabilities = ["pull"]
              ca = ["a.pem", "/abs/b.pem"]
              client = [["cert.pem", "key.pem"]]
              dial_timeout = "1m30s"
              [host."https://z-first.example:8443".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."http://a-second.example/proxy/v2/project"]
              override_path = true
              skip_verify = true
              client = "both.pem"
            [host."third.example/sub"]
              capabilities = ["resolve", "push"]
        "#;
    let found = read_hosts("reg.example", "reg.example", text).unwrap();
    let bases: Vec<&str> = found.iter().map(|host| host.base.as_str()).collect();
    assert_eq!(
        bases,
        [
            "https://z-first.example:8443/v2",
            "http://a-second.example/proxy/v2/project",
            "https://third.example/sub/v2",
            "https://upstream.example/v2",
        ]
    );
    let flags: Vec<_> = found
        .iter()
        .map(|h| (h.resolve, h.pull, h.upstream))
        .collect();
    assert_eq!(
        flags,
        [
            (false, true, false),
            (true, true, false),
            (true, false, false),
            (true, true, true)
        ]
    );
    assert_eq!(
        found[0].ca,
        [Path::new("reg.example/a.pem"), Path::new("/abs/b.pem")]
    );
    assert!(
        matches!(&found[0].client, Some((_, Some(key))) if key.ends_with("reg.example/key.pem"))
    );
    assert_eq!(found[0].dial_timeout, Some(Duration::from_secs(90)));
    assert_eq!(found[0].headers.get_all("x-two").iter().count(), 2);
    assert_eq!(found[0].namespace.as_deref(), Some("reg.example"));
    assert!(matches!(&found[1].client, Some((_, None))) && found[1].skip_verify);
    assert_eq!(found[3].ca, [Path::new("reg.example/upstream.pem")]);
}

#[test]
fn where_it_is_looked_for() {
    let text = "server = \"http://other.example\"";
    for directory in ["reg.example:5000", "reg.example_5000_", "_default"] {
        let found = read_hosts("reg.example:5000", directory, text).unwrap();
        assert_eq!(found[0].base, "http://other.example/v2", "{directory}");
    }
    let mirror = "[host.\"http://mirror.example\"]";
    let found = read_hosts("docker.io", "_default", mirror).unwrap();
    assert_eq!(found[1].base, "https://registry-1.docker.io/v2");
    assert_eq!(found[0].namespace.as_deref(), Some("docker.io"));
    assert_eq!(found[1].namespace, None);
}

#[test]
fn dockers_own_directory() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("localhost:5000");
    fs::create_dir_all(&directory).unwrap();
    for name in ["ca.crt", "client.cert"] {
        fs::write(directory.join(name), "x").unwrap();
    }
    assert!(matches!(
        hosts(root.path(), "localhost:5000"),
        Err(ImageError::Hosts { .. })
    ));
    fs::write(directory.join("client.key"), "y").unwrap();
    let found = hosts(root.path(), "localhost:5000").unwrap().remove(0);
    assert_eq!(found.base, "https://localhost:5000/v2");
    let (authorities, identity) = found.certificates().unwrap();
    assert_eq!(
        (authorities, identity.unwrap()),
        (vec![b"x".to_vec()], b"x\ny".to_vec())
    );
}

#[test]
fn what_is_not_understood_is_an_error_that_names_the_file() {
    for text in [
        "server = 1",
        "server = \"https://user:secret@m\"",
        "sever = \"x\"",
        "[host.\"https://m\"]\ncapabilities = [\"fly\"]",
        "[host.\"https://m\"]\nskip-verify = true",
        "[host.\"ftp://m\"]",
        "[host.\"https://user:secret@m\"]",
        "[host.\"https://m\"]\nclient = [[\"a\", \"b\", \"c\"]]",
        "[host.\"https://m\"]\nclient = [\"a\", \"b\"]",
        "[host.\"https://m\"]\ndial_timeout = \"soon\"",
        "[host.\"https://m\".header]\n\"bad name\" = \"x\"",
        "host = 3",
        "not toml",
    ] {
        let error = read_hosts("reg.example", "reg.example", text).unwrap_err();
        assert!(
            error.to_string().contains("reg.example/hosts.toml"),
            "{text}: {error}"
        );
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    let host = Host {
        ca: vec!["/nonexistent.pem".into()],
        ..plain("x").unwrap()
    };
    assert!(
        host.certificates()
            .unwrap_err()
            .to_string()
            .contains("/nonexistent.pem")
    );
}
