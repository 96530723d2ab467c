use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn cni(dir: &Path) -> Cni {
    for d in ["conf", "bin", "cache"] {
        fs::create_dir_all(dir.join(d)).unwrap();
    }
    Cni::new(CniConfig {
        conf_dir: dir.join("conf"),
        bin_dirs: vec![dir.join("bin")],
        cache_dir: dir.join("cache"),
        timeout: Duration::from_secs(2),
    })
}

fn plugin(dir: &Path, name: &str, script: &str) {
    let path = dir.join("bin").join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn pod() -> PodIdentity {
    PodIdentity {
        id: "p1".into(),
        port_mappings: vec![PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol: "tcp".into(),
            host_ip: String::new(),
        }],
        ..PodIdentity::default()
    }
}

const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[
    {"type":"one"},{"type":"two","capabilities":{"portMappings":true}}]}"#;

#[tokio::test]
async fn results_go_from_plugin_to_plugin_and_back_at_del() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    fs::write(dir.join("conf/10-a.conflist"), LIST).unwrap();
    let log = dir.join("log");
    let script = |answer: &str| {
        format!(
            "echo $CNI_COMMAND $CNI_IFNAME $(cat) >> {}; echo '{answer}'",
            log.display()
        )
    };
    plugin(dir, "one", &script(r#"{"from":"one"}"#));
    plugin(dir, "two", &script(r#"{"from":"two"}"#));
    cni.add(&pod(), Path::new("/ns")).await.unwrap();
    fs::remove_file(dir.join("conf/10-a.conflist")).unwrap();
    cni.del(&pod(), Path::new("/ns")).await.unwrap();
    cni.del(&pod(), Path::new("/ns")).await.unwrap();
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 4, "{log}");
    assert!(lines[0].starts_with("ADD eth0") && !lines[0].contains("prevResult"));
    assert!(lines[1].contains(r#""prevResult":{"from":"one"}"#));
    assert!(lines[1].contains(r#""hostPort":8080"#) && !lines[0].contains("hostPort"));
    assert!(lines[2].starts_with("DEL") && lines[2].contains(r#""type":"two""#));
    assert!(lines[3].contains(r#""prevResult":{"from":"two"}"#));
}

#[tokio::test]
async fn a_failing_and_a_hanging_plugin_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    fs::write(dir.join("conf/10-a.conflist"), LIST).unwrap();
    plugin(
        dir,
        "one",
        r#"echo '{"code":11,"msg":"no address left"}'; exit 1"#,
    );
    plugin(dir, "two", "exec sleep 60");
    let error = cni.add(&pod(), Path::new("/ns")).await.unwrap_err();
    assert!(error.to_string().contains("plugin one failed on ADD"));
    assert!(error.to_string().contains("no address left"), "{error}");
    plugin(dir, "one", "echo '{}'");
    let error = cni.add(&pod(), Path::new("/ns")).await.unwrap_err();
    assert!(error.to_string().contains("plugin two failed on ADD"));
    assert!(
        error.to_string().contains("did not end within 2 s"),
        "{error}"
    );
}

#[test]
fn a_list_that_was_read_is_known_until_it_changes() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    plugin(dir, "one", "");
    let list = r#"{"name":"n","type":"one"}"#;
    fs::write(dir.join("conf/20-b.conf"), list).unwrap();
    let (_, seen) = cni.load_seen().unwrap();
    assert!(seen.still());
    // In its place, before it, and not any more.
    fs::write(dir.join("conf/20-b.conf"), format!("{list} ")).unwrap();
    assert!(!seen.still());
    let (_, seen) = cni.load_seen().unwrap();
    fs::write(dir.join("conf/10-a.conf"), list).unwrap();
    assert!(!seen.still());
    let (_, seen) = cni.load_seen().unwrap();
    fs::remove_file(dir.join("conf/10-a.conf")).unwrap();
    assert!(!seen.still());
}

#[test]
fn what_is_missing_is_said() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    let say = |cni: &Cni| cni.load().unwrap_err().to_string();
    assert!(say(&cni).contains("has no .conflist"));
    fs::write(dir.join("conf/20-b.conf"), r#"{"name":"n","type":"one"}"#).unwrap();
    assert!(say(&cni).contains("plugin one is not in"));
    plugin(dir, "one", "");
    assert!(cni.load().is_ok());
    fs::write(dir.join("conf/10-a.conflist"), "{").unwrap();
    assert!(say(&cni).contains("not JSON"));
    let old = LIST.replace("1.0.0", "9.0.0");
    fs::write(dir.join("conf/10-a.conflist"), old).unwrap();
    assert!(say(&cni).contains("cniVersion 9.0.0"));
}

const LATEST: &str = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"one","more":1}]}"#;

/// A plugin that writes down how it is called.
fn recorder(dir: &Path, name: &str, more: &str) {
    let log = dir.join("log");
    let script = format!(
        "echo $CNI_COMMAND:$CNI_CONTAINERID:$CNI_NETNS:$CNI_IFNAME:$(cat) >> {}; {more}",
        log.display()
    );
    plugin(dir, name, &script);
}

fn called(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let _ = fs::remove_file(dir.join("log"));
    text.lines().map(str::to_owned).collect()
}

fn names(ids: &[&str]) -> HashSet<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

#[tokio::test]
async fn check_gc_and_status_have_what_the_specification_names() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    fs::write(dir.join("conf/10-a.conflist"), LATEST).unwrap();
    recorder(
        dir,
        "one",
        r#"test $CNI_COMMAND != ADD || echo '{"ips":[]}'"#,
    );
    cni.status(&cni.load().unwrap()).await.unwrap();
    cni.add(&pod(), Path::new("/ns")).await.unwrap();
    cni.check(&pod(), Path::new("/ns")).await.unwrap();
    cni.gc(&names(&["p1", "p0"])).await.unwrap();
    let calls = called(dir);
    assert_eq!(calls.len(), 4, "{calls:?}");
    assert!(
        calls[0].starts_with("STATUS::::") && calls[0].contains(r#""more":1"#),
        "{}",
        calls[0]
    );
    assert!(calls[1].starts_with("ADD:p1:/ns:eth0:"));
    assert!(calls[2].starts_with("CHECK:p1:/ns:eth0:"));
    assert!(
        calls[2].contains(r#""prevResult":{"ips":[]}"#),
        "{}",
        calls[2]
    );
    let valid = r#""cni.dev/valid-attachments":[{"containerID":"p0","ifname":"eth0"},{"containerID":"p1","ifname":"eth0"}]"#;
    assert!(
        calls[3].starts_with("GC:::") && calls[3].contains(valid),
        "{}",
        calls[3]
    );

    // Whom the cache knows and nobody else, and who is of another network.
    assert_eq!(cni.stale(&names(&["p1"])).len(), 0);
    assert_eq!(cni.stale(&names(&[]))[0].port_mappings, pod().port_mappings);
    let renamed = LATEST.replace(r#""n""#, r#""m""#);
    fs::write(dir.join("conf/10-a.conflist"), renamed).unwrap();
    cni.gc(&names(&["p1"])).await.unwrap();
    assert!(called(dir)[0].contains(r#""cni.dev/valid-attachments":[]"#));

    // What a configuration does without, and what its version has not.
    let without = LATEST.replace(
        "1.1.0\",",
        "1.1.0\",\"disableGC\":true,\"disableCheck\":true,",
    );
    fs::write(dir.join("conf/10-a.conflist"), without).unwrap();
    cni.gc(&names(&[])).await.unwrap();
    cni.check(&pod(), Path::new("/ns")).await.unwrap();
    fs::write(
        dir.join("conf/10-a.conflist"),
        LATEST.replace("1.1.0", "1.0.0"),
    )
    .unwrap();
    cni.gc(&names(&[])).await.unwrap();
    cni.status(&cni.load().unwrap()).await.unwrap();
    assert_eq!(called(dir), [""; 0]);
}

#[tokio::test]
async fn what_plugins_say_of_the_network_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    fs::write(dir.join("conf/10-a.conflist"), LATEST).unwrap();
    plugin(
        dir,
        "one",
        r#"echo '{"code":50,"msg":"no addresses"}'; exit 1"#,
    );
    let error = cni.status(&cni.load().unwrap()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "CNI plugin one failed on STATUS: no addresses"
    );
    let error = cni.gc(&names(&[])).await.unwrap_err();
    assert!(error.to_string().contains("failed on GC"), "{error}");
}

#[tokio::test]
async fn a_plugin_is_killed_with_what_it_has_started() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let cni = cni(dir);
    fs::write(dir.join("conf/10-a.conflist"), LATEST).unwrap();
    let file = dir.join("child");
    plugin(
        dir,
        "one",
        &format!("sleep 600 & echo $! >{}; wait", file.display()),
    );
    cni.status(&cni.load().unwrap()).await.unwrap_err();
    let child: i32 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
    let gone = || {
        // Who was killed may not have been waited for yet.
        fs::read_to_string(format!("/proc/{child}/stat")).map_or(true, |stat| stat.contains(") Z "))
    };
    for _ in 0..100 {
        if gone() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the plugin's child {child} runs on");
}

#[tokio::test]
async fn what_a_daemon_that_died_was_writing_goes_with_the_pod() {
    let dir = tempfile::tempdir().unwrap();
    let cni = cni(dir.path());
    let unfinished = dir.path().join(format!("cache/{}.new", pod().id));
    fs::write(&unfinished, "{").unwrap();
    assert!(!cni.has(&pod().id));
    cni.del(&pod(), Path::new("/nowhere")).await.unwrap();
    assert!(!unfinished.exists());
}
