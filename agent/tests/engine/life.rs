//! From create to destroy.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use caisson_agent::engine::spec::{LinuxResources, Process, Spec};
use caisson_agent::engine::{Container, Stdio};
use serde_json::json;

use super::Test;
use super::support::*;

pub const TESTS: &[Test] = &[
    ("output_and_exit_code", output_and_exit_code),
    ("created_is_not_started", created_is_not_started),
    ("signals", signals),
    ("exec_joins_the_container", exec_joins_the_container),
    ("terminals", terminals),
    ("memory_limit", memory_limit),
    ("update_and_stats", update_and_stats),
    ("destroy_ends_everything", destroy_ends_everything),
    ("hooks", hooks),
    ("many_at_once", many_at_once),
];

fn output_and_exit_code() {
    let script = "echo out; echo err >&2; hostname; echo $$; cat /etc/replaced; echo $HOME; exit 7";
    let (code, out, err) = start(&spec(script)).end();
    assert_eq!(code, 7);
    assert_eq!(out, "out\ninside\n1\nupper\n/root\n");
    assert_eq!(err, "err\n");
}

fn created_is_not_started() {
    let running = create(&spec("echo ran")).unwrap();
    let command = fs::read_to_string(format!("/proc/{}/cmdline", running.container.pid())).unwrap();
    assert!(command.contains("container-init"), "{command:?}");
    running.container.start().unwrap();
    assert!(running.container.start().is_err(), "started twice");
    assert_eq!(running.end().1, "ran\n");
    // One that is never started ends with its removal.
    let running = create(&spec("echo ran")).unwrap();
    running.container.destroy().unwrap();
    assert_eq!(wait(running.container.pid()), 137);
    assert_eq!(running.stdout.join().unwrap(), "");
    assert!(running.container.start().is_err());
}

fn signals() {
    let running = start(&spec(
        "trap 'echo term; exit 3' TERM; touch /tmp/ready; while :; do sleep 0.05; done",
    ));
    running.ready();
    running.container.signal(15).unwrap();
    let (code, out, _) = running.end();
    assert_eq!((code, out.as_str()), (3, "term\n"));
    let running = start(&spec("exec sleep 1000"));
    running.container.signal(9).unwrap();
    let pid = running.container.pid();
    assert_eq!(wait(pid), 137);
    // One that has ended is no error.
    running.container.signal(9).unwrap();
    running.container.signal_all(15).unwrap();
    assert!(running.container.signal(65).is_err());
    running.container.destroy().unwrap();
}

fn exec_joins_the_container() {
    let mut document = spec("echo $$ > /tmp/pid; touch /tmp/ready; exec sleep 1000");
    document["linux"]["resources"]["pids"] = json!({"limit": 20});
    let running = start(&document);
    running.ready();
    let (code, out, err) = running.exec(json!({
        "args": ["sh", "-c", "cat /tmp/pid; hostname; cat /proc/1/cmdline | head -c 5; echo; id -u; id -G; pwd; umask; echo $A; grep CapEff /proc/self/status; cat /proc/self/cgroup; exit 9"],
        "env": ["PATH=/bin", "A=b"], "cwd": "/tmp", "user": {"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 63},
    }));
    assert_eq!(code, 9, "{err}");
    assert_eq!(
        out,
        "1\ninside\nsleep\n1000\n1001 7 8\n/tmp\n0077\nb\nCapEff:\t0000000000000000\n0::/\n"
    );
    assert!(running.container.stats().unwrap().pids >= 1);
    running.container.signal_all(9).unwrap();
    assert_eq!(wait(running.container.pid()), 137);
    let process = Process::parse(br#"{"args":["true"],"cwd":"/"}"#).unwrap();
    assert!(running.container.exec(process, Stdio::default()).is_err());
    running.container.destroy().unwrap();
}

fn terminals() {
    let mut document =
        spec("tty; stty size; read line; echo got $line; ls -l /dev/console; exec sleep 1000");
    document["process"]["terminal"] = json!(true);
    document["process"]["consoleSize"] = json!({"height": 33, "width": 77});
    let parsed = Spec::parse(&serde_json::to_vec(&document).unwrap()).unwrap();
    let (container, terminal) =
        Container::create(&id(), parsed, layers(), Stdio::default()).unwrap();
    let terminal = File::from(terminal.unwrap());
    container.start().unwrap();
    let seen = read_until(&terminal, "33 77");
    assert!(seen.contains("/dev/pts/0"), "{seen}");
    type_in(&terminal, "hello\n");
    read_until(&terminal, "got hello");
    read_until(&terminal, "/dev/console");

    let process = json!({"args": ["sh", "-c", "tty; read x; echo second $x; sleep 1000"], "env": ["PATH=/bin"], "cwd": "/",
        "terminal": true, "user": {"uid": 1000, "gid": 1000}});
    let process = Process::parse(&serde_json::to_vec(&process).unwrap()).unwrap();
    let (pid, second) = container.exec(process, Stdio::default()).unwrap();
    let second = File::from(second.unwrap());
    read_until(&second, "/dev/pts/1");
    type_in(&second, "x\n");
    read_until(&second, "second x");
    // The controlling terminal: its keys are signals.
    type_in(&second, "\x03");
    assert_eq!(wait(pid), 130);
    container.destroy().unwrap();
    assert_eq!(wait(container.pid()), 137);
}

// must-test: a container over its memory limit
fn memory_limit() {
    let mut document = spec(
        "dd if=/dev/zero of=/dev/shm/fill bs=1M count=64; exec dd if=/dev/zero of=/dev/null bs=200M count=1",
    );
    document["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
    let running = start(&document);
    assert_eq!(wait(running.container.pid()), 137);
    assert!(running.container.oom_kills().unwrap() >= 1);
    assert!(running.container.memory_events_path().exists());
    running.container.destroy().unwrap();
}

fn update_and_stats() {
    let mut document = spec(
        "dd if=/dev/zero of=/written bs=1M count=3 2>/dev/null; cat /sys/fs/cgroup/pids.max; touch /tmp/ready; exec sleep 1000",
    );
    document["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 16_777_216},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"},
        "pids": {"limit": 17}, "unified": {"memory.high": "60000000"},
        "devices": [{"allow": false, "access": "rwm"}]
    });
    let running = start(&document);
    running.ready();
    let stats = running.container.stats().unwrap();
    assert_eq!(stats.memory_limit_bytes, 67_108_864);
    assert!(stats.cpu_usage_ns > 0 && stats.memory_usage_bytes > 0 && stats.timestamp_ns > 0);
    assert!(stats.rootfs_used_bytes >= 3 << 20, "{stats:?}");
    assert!(stats.rootfs_used_inodes >= 1);
    let group = running
        .container
        .memory_events_path()
        .parent()
        .unwrap()
        .to_owned();
    let read = |file: &str| {
        fs::read_to_string(group.join(file))
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cpu.weight"), "20");
    assert_eq!(read("cpuset.cpus"), "0");
    assert_eq!(read("memory.low"), "16777216");
    assert_eq!(read("memory.swap.max"), "0");
    assert_eq!(read("memory.oom.group"), "0");
    let update = |json: &str| {
        running
            .container
            .update(&LinuxResources::parse(json.as_bytes()).unwrap())
    };
    update(r#"{"memory":{"limit":134217728,"swap":134217728},"pids":{"limit":-1}}"#).unwrap();
    assert_eq!(read("memory.max"), "134217728");
    assert_eq!(read("pids.max"), "max");
    assert_eq!(read("cpu.max"), "50000 100000", "what is not named stays");
    let error = update(r#"{"cpu":{"cpus":"4096"}}"#)
        .unwrap_err()
        .to_string();
    assert!(error.contains("linux.resources.cpu.cpus"), "{error}");
    let error = update(r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    running.container.destroy().unwrap();
    assert_eq!(running.end().1, "17\n");
}

fn destroy_ends_everything() {
    // Children of children that ignore signals, and groups of the container's own.
    let mut document = spec(
        "mkdir /sys/fs/cgroup/own; for i in $(seq 20); do (trap '' TERM HUP INT; sleep 1000 & wait) & done; touch /tmp/ready; wait",
    );
    document["mounts"][6]["options"] = json!(["nosuid", "noexec", "nodev", "relatime"]);
    let running = start(&document);
    running.ready();
    let begin = Instant::now();
    running.container.destroy().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    running.container.destroy().unwrap();
    assert_eq!(running.end().0, 137);
}

fn hooks() {
    let directory = directory("hooks");
    let log = directory.join("log");
    let hook = |name: &str| {
        json!([{"path": "/bin/sh", "args": ["sh", "-c",
            format!("read -r state; echo {name} \"$state\" | sed 's/ .*\"status\":\"\\([a-z]*\\)\".*/ \\1/' >> {}", log.display())]}])
    };
    let mut document = spec("cat /tmp/hooked");
    document["hooks"] = json!({
        "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "/bin/cat > /tmp/hooked; echo >> /tmp/hooked"]}],
        "poststart": hook("poststart"), "poststop": hook("poststop")
    });
    let (code, out, err) = start(&document).end();
    assert_eq!(code, 0, "{err}");
    assert!(out.contains(r#""status":"#), "{out}");
    assert_eq!(
        fs::read_to_string(&log).unwrap(),
        "createRuntime creating\ncreateContainer creating\npoststart running\npoststop stopped\n"
    );
    document["hooks"] =
        json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 4"]}]});
    let error = create(&document).err().unwrap().to_string();
    assert!(error.contains("hook /bin/sh"), "{error}");
}

// must-test: start latency, containers created at once, none left
fn many_at_once() {
    let threads: Vec<_> = (0..12)
        .map(|number| {
            std::thread::spawn(move || {
                let running = start(&spec(&format!("echo {number}; exit {number}")));
                let pid = running.container.pid();
                (number, wait(pid), running)
            })
        })
        .collect();
    for thread in threads {
        let (number, code, running) = thread.join().unwrap();
        running.container.destroy().unwrap();
        assert_eq!(code, number);
        assert_eq!(running.stdout.join().unwrap(), format!("{number}\n"));
    }
}
