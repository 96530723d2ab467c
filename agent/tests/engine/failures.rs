//! What goes wrong is said in a sentence, and leaves nothing behind.

use serde_json::{Value, json};

use caisson_agent::engine::{DiskRange, Layer, RootFs};

use super::Test;
use super::support::*;

pub const TESTS: &[Test] = &[
    ("refused_at_create", refused_at_create),
    ("refused_at_start", refused_at_start),
    ("bad_layers", bad_layers),
    ("a_name_in_use", a_name_in_use),
    ("killed_while_created", killed_while_created),
    ("exec_failures", exec_failures),
];

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    let mut document = spec("true");
    change(&mut document);
    let before = traces();
    let error = create(&document).err().unwrap().to_string();
    assert_eq!(before, traces(), "after {error}");
    error
}

fn refused_at_create() {
    let contains = |error: String, parts: &[&str]| {
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    };
    contains(
        refusal(|spec| spec["process"]["args"] = json!(["nonesuch"])),
        &["nonesuch", "PATH"],
    );
    contains(
        refusal(|spec| spec["process"]["args"] = json!(["/etc/passwd"])),
        &["/etc/passwd", "denied"],
    );
    contains(
        refusal(|spec| {
            add_mount(
                spec,
                json!({"destination": "/data", "type": "bind", "source": "/no/such", "options": ["bind"]}),
            )
        }),
        &["mount /data", "/no/such", "No such file"],
    );
    contains(
        refusal(|spec| {
            add_mount(
                spec,
                json!({"destination": "/data", "type": "nofs", "source": "x"}),
            )
        }),
        &["mount /data", "nofs"],
    );
    contains(
        refusal(|spec| {
            add_mount(
                spec,
                json!({"destination": "/data", "type": "tmpfs", "source": "x", "options": ["loud=1"]}),
            )
        }),
        &["mount /data", "loud"],
    );
    contains(
        refusal(|spec| spec["linux"]["namespaces"][0]["path"] = json!("/no/such")),
        &["/no/such"],
    );
    contains(
        refusal(|spec| spec["linux"]["namespaces"][0]["path"] = json!("/etc/passwd")),
        &["join", "/etc/passwd"],
    );
    contains(
        refusal(|spec| spec["linux"]["sysctl"] = json!({"net.ipv4.no_such": "1"})),
        &["linux.sysctl.net.ipv4.no_such"],
    );
    contains(
        refusal(|spec| spec["linux"]["resources"]["unified"] = json!({"memory.nonesuch": "1"})),
        &["linux.resources.unified.memory.nonesuch"],
    );
    contains(
        refusal(|spec| spec["process"]["cwd"] = json!("/etc/passwd")),
        &["process.cwd", "/etc/passwd"],
    );
    contains(
        refusal(|spec| {
            spec["process"]["terminal"] = json!(true);
            spec["mounts"]
                .as_array_mut()
                .unwrap()
                .retain(|mount| mount["type"] != "devpts");
        }),
        &["terminal"],
    );
    contains(
        refusal(|spec| spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"})),
        &["linux.seccomp.defaultAction"],
    );
}

fn refused_at_start() {
    let mut document = spec("");
    document["process"]["args"] = json!(["/not-a-program"]);
    let running = create(&document).unwrap();
    let error = running.container.start().unwrap_err().to_string();
    assert!(error.contains("/not-a-program"), "{error}");
    assert_eq!(running.end().0, 1);
}

fn file(path: &str) -> Layer {
    Layer::File(path.into())
}

fn disk(serial: &str, offset: u64, bytes: u64) -> Layer {
    Layer::Disk(DiskRange {
        serial: serial.into(),
        offset,
        bytes,
    })
}

// must-test: a broken image
fn bad_layers() {
    let broken = directory("broken").join("broken.erofs");
    std::fs::write(&broken, vec![0x5a; 1 << 16]).unwrap();
    for (layers, part) in [
        (vec![], "0 layers"),
        (vec![file("/no/such.erofs")], "/no/such.erofs"),
        (vec![broken.into()], "broken.erofs"),
        (vec![file("/dev/null")], "regular file"),
        (vec![file("/etc")], "regular file"),
        (
            vec![disk("nowhere", 0, 4096)],
            "no disk has the serial nowhere",
        ),
        (vec![disk("nowhere", 100, 4096)], "whole sectors"),
        (vec![disk("nowhere", u64::MAX - 511, 512)], "whole sectors"),
    ] {
        let before = traces();
        let error = create_with(
            &id(),
            &spec("true"),
            RootFs {
                layers,
                ..RootFs::default()
            },
        )
        .err()
        .unwrap()
        .to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(before, traces(), "after {error}");
    }
    let error = create_with("../x", &spec("true"), layers()).err().unwrap();
    assert!(error.is_invalid_argument(), "{error}");
}

// must-test: a name in use
fn a_name_in_use() {
    let name = id();
    let first = create_with(&name, &spec("echo first"), layers()).unwrap();
    let error = create_with(&name, &spec("echo second"), layers())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("exists already"), "{error}");
    first.container.start().unwrap();
    assert_eq!(first.end().1, "first\n");
    let again = create_with(&name, &spec("echo again"), layers()).unwrap();
    again.container.start().unwrap();
    assert_eq!(again.end().1, "again\n");
}

fn killed_while_created() {
    let running = create(&spec("echo never")).unwrap();
    running.container.signal(9).unwrap();
    assert_eq!(wait(running.container.pid()), 137);
    let error = running.container.start().unwrap_err().to_string();
    assert!(error.contains("ended before"), "{error}");
    running.container.destroy().unwrap();
    assert_eq!(running.stdout.join().unwrap(), "");
}

fn exec_failures() {
    let running = start(&spec("exec sleep 1000"));
    for (process, part) in [
        (json!({"args": ["nonesuch"], "cwd": "/"}), "nonesuch"),
        (
            json!({"args": ["/not-a-program"], "cwd": "/"}),
            "/not-a-program",
        ),
        (
            json!({"args": ["/bin/true"], "cwd": "/etc/passwd"}),
            "process.cwd",
        ),
    ] {
        let process =
            caisson_agent::engine::spec::Process::parse(&serde_json::to_vec(&process).unwrap())
                .unwrap();
        let error = running
            .container
            .exec(process, Default::default())
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
    let (code, ..) = running.exec(json!({"args": ["/bin/true"], "cwd": "/"}));
    assert_eq!(code, 0);
    running.container.destroy().unwrap();
    wait(running.container.pid());
}
