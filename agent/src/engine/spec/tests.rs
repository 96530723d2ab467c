use super::*;

const MINIMAL: &str = r#"{"ociVersion":"1.2.0","process":{"args":["/bin/sh"],"cwd":"/","user":{"uid":0,"gid":0}},
    "root":{"path":"rootfs"},"linux":{"namespaces":[{"type":"mount"}]}}"#;

/// The minimal spec with one value put in at a path.
fn with(path: &str, value: &str) -> Result<Spec, SpecError> {
    let mut document: serde_json::Value = serde_json::from_str(MINIMAL).unwrap();
    let mut place = &mut document;
    for part in path.split('.') {
        if place.is_null() {
            *place = serde_json::json!({});
        }
        place = &mut place[part];
    }
    *place = serde_json::from_str(value).unwrap();
    Spec::parse(&serde_json::to_vec(&document).unwrap())
}

#[test]
fn the_minimal_spec_is_taken_and_survives_the_way_to_the_process() {
    let spec = Spec::parse(MINIMAL.as_bytes()).unwrap();
    let again = serde_json::to_vec(&spec).unwrap();
    let spec = Spec::parse(&again).unwrap();
    assert_eq!(spec.process.unwrap().args, ["/bin/sh"]);
}

// must-test: a spec with unknown fields
#[test]
fn an_unknown_field_is_named() {
    for (path, name) in [
        ("surprise", "surprise"),
        ("process.surprise", "surprise"),
        ("linux.surprise", "surprise"),
        ("linux.resources.memory.surprise", "surprise"),
        ("linux.seccomp.surprise", "surprise"),
        ("hooks.surprise", "surprise"),
    ] {
        let error = with(path, "1").unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}`")), "{path}: {error}");
    }
}

#[test]
fn an_unsupported_field_is_named_by_its_path() {
    for (path, value) in [
        ("windows", r#"{"layerFolders":["x"]}"#),
        ("vm", r#"{"kernel":{"path":"/x"}}"#),
        ("solaris", r#"{"milestone":"x"}"#),
        ("linux.intelRdt", r#"{"closID":"x"}"#),
        ("linux.mountLabel", r#""x""#),
        ("linux.seccomp.listenerPath", r#""/x""#),
        ("linux.resources.network", r#"{"classID":1}"#),
        ("linux.resources.memory.kernel", "1"),
        ("linux.resources.memory.disableOOMKiller", "true"),
        ("linux.resources.memory.swappiness", "60"),
        ("linux.resources.cpu.realtimeRuntime", "1"),
        ("linux.resources.blockIO.leafWeight", "10"),
        ("process.selinuxLabel", r#""x""#),
        ("process.scheduler", r#"{"policy":"SCHED_FIFO"}"#),
        ("process.ioPriority", r#"{"class":"IOPRIO_CLASS_BE"}"#),
    ] {
        let error = with(path, value).unwrap_err().to_string();
        assert!(error.contains(path), "{path}: {error}");
        assert!(error.contains("not supported"), "{path}: {error}");
    }
}

#[test]
fn the_empty_value_of_an_unsupported_field_is_taken() {
    for (path, value) in [
        ("process.apparmorProfile", r#""""#),
        ("process.selinuxLabel", r#""""#),
        ("linux.mountLabel", r#""""#),
        ("linux.intelRdt", "null"),
        ("linux.resources.memory.disableOOMKiller", "false"),
        ("linux.resources.memory.kernel", "0"),
        ("linux.resources.network", "{}"),
        ("linux.resources.rdma", "{}"),
    ] {
        with(path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

#[test]
fn a_value_that_cannot_be_is_named() {
    for (path, value) in [
        ("ociVersion", r#""2.0.0""#),
        ("root.path", r#""/""#),
        ("process.args", "[]"),
        ("process.cwd", r#""relative""#),
        ("process.apparmorProfile", r#""a\nb""#),
        ("process.env", r#"["novalue"]"#),
        ("process.oomScoreAdj", "1001"),
        (
            "process.rlimits",
            r#"[{"type":"RLIMIT_X","hard":1,"soft":1}]"#,
        ),
        (
            "process.rlimits",
            r#"[{"type":"RLIMIT_CPU","hard":1,"soft":2}]"#,
        ),
        ("process.capabilities", r#"{"bounding":["CAP_X"]}"#),
        ("mounts", r#"[{"destination":"relative"}]"#),
        (
            "mounts",
            r#"[{"destination":"/x","options":["tmpcopyup"]}]"#,
        ),
        ("linux.cgroupsPath", r#""../x""#),
        ("linux.sysctl", r#"{"kernel.panic":"1"}"#),
        ("linux.rootfsPropagation", r#""loud""#),
        ("linux.maskedPaths", r#"["relative"]"#),
        ("linux.devices", r#"[{"path":"/dev/x","type":"x"}]"#),
        ("linux.devices", r#"[{"path":"/dev/x","type":"c"}]"#),
        ("linux.namespaces", r#"[{"type":"pid"}]"#),
        ("linux.namespaces", r#"[{"type":"mount"},{"type":"mount"}]"#),
        (
            "linux.namespaces",
            r#"[{"type":"mount","path":"/proc/1/ns/mnt"}]"#,
        ),
        (
            "linux.uidMappings",
            r#"[{"containerID":0,"hostID":1,"size":1}]"#,
        ),
        (
            "mounts",
            r#"[{"destination":"/x","source":"/y","options":["bind"],"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}]"#,
        ),
        ("linux.timeOffsets", r#"{"monotonic":{"secs":1}}"#),
        ("linux.seccomp", r#"{"defaultAction":"SCMP_ACT_X"}"#),
        ("linux.personality", r#"{"domain":"VAX"}"#),
        ("hostname", r#""x""#),
    ] {
        let error = with(path, value).unwrap_err().to_string();
        assert!(error.contains(path), "{path} = {value}: {error}");
    }
}

#[test]
fn documents_have_a_size_and_a_depth() {
    let big = vec![b' '; MAX_JSON + 1];
    assert!(matches!(Spec::parse(&big), Err(SpecError::TooLarge { .. })));
    let deep = format!("{{\"windows\":{}", "[".repeat(100_000));
    assert!(matches!(
        Spec::parse(deep.as_bytes()),
        Err(SpecError::Json { .. })
    ));
}

#[test]
fn a_process_and_resources_stand_alone() {
    let process = Process::parse(br#"{"args":["x"],"cwd":"/","terminal":true}"#).unwrap();
    assert!(process.terminal);
    assert!(Process::parse(br#"{"args":["x"],"cwd":"/","wrong":1}"#).is_err());
    LinuxResources::parse(br#"{"memory":{"limit":1048576}}"#).unwrap();
    assert!(LinuxResources::parse(br#"{"memory":{"limit":-5}}"#).is_err());
}
