//! What a process may do: users, rights, filters, namespaces.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use caisson_agent::engine::make_pod_namespaces;
use caisson_agent::engine::spec::IdMapping;
use serde_json::json;

use super::Test;
use super::support::*;

pub const TESTS: &[Test] = &[
    ("users_and_rights", users_and_rights),
    ("streams_belong_to_the_user", streams_belong_to_the_user),
    ("system_call_filter", system_call_filter),
    (
        "filter_without_no_new_privileges",
        filter_without_no_new_privileges,
    ),
    ("nothing_of_the_guest_is_seen", nothing_of_the_guest_is_seen),
    (
        "namespaces_are_shared_by_path",
        namespaces_are_shared_by_path,
    ),
    ("no_pid_namespace", no_pid_namespace),
    ("user_namespace", user_namespace),
    ("pod_namespaces", pod_namespaces),
    ("time_namespace", time_namespace),
    ("kernel_parameters", kernel_parameters),
    ("personality", personality),
    ("one_process_is_enough", one_process_is_enough),
];

fn users_and_rights() {
    let mut document = spec(
        "id -u; id -g; id -G; umask; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; \
         ulimit -n; ulimit -Hn; echo $HOME; ls -l /proc/self/fd | grep -c -- '->'",
    );
    document["process"]["user"] =
        json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 7});
    document["process"]["capabilities"] = json!({
        "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL"], "permitted": ["CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_NET_BIND_SERVICE"], "inheritable": ["CAP_NET_BIND_SERVICE"], "ambient": ["CAP_NET_BIND_SERVICE"]
    });
    document["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    document["process"]["oomScoreAdj"] = json!(-300);
    let out = output(&document);
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "1000",
            "1001",
            "1001 7 8",
            "0007",
            "CapInh:\t0000000000000400",
            "CapPrm:\t0000000000000400",
            "CapEff:\t0000000000000400",
            "CapBnd:\t0000000000000420",
            "CapAmb:\t0000000000000400",
            "NoNewPrivs:\t1",
            "Seccomp:\t0",
            "-300",
            "100",
            "200",
            "/home/web",
            // The standard streams: nothing of the agent's.
            "3"
        ]
    );
    let mut document = spec("grep -E '^(Cap|NoNewPrivs)' /proc/self/status");
    document["process"]
        .as_object_mut()
        .unwrap()
        .remove("capabilities");
    document["process"]["noNewPrivileges"] = json!(false);
    let out = output(&document);
    assert_eq!(out.matches("0000000000000000").count(), 5, "{out}");
    assert!(out.contains("NoNewPrivs:\t0"), "{out}");
}

fn streams_belong_to_the_user() {
    let mut document = spec("echo anew > /dev/stdout; echo err > /dev/stderr");
    document["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    document["process"]["capabilities"] = json!({});
    let (code, out, err) = start(&document).end();
    assert_eq!((code, out.as_str(), err.as_str()), (0, "anew\n", "err\n"));
}

fn profile() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["no_such_call"], "action": "SCMP_ACT_KILL"}
        ]
    })
}

fn system_call_filter() {
    let mut document = spec("mkdir /x; grep Seccomp: /proc/self/status; hostname new; echo $?");
    document["linux"]["seccomp"] = profile();
    let (code, out, err) = start(&document).end();
    assert_eq!(code, 0, "{out}{err}");
    assert!(err.contains("quota"), "{err}");
    // 128 and SIGSYS.
    assert_eq!(out, "Seccomp:\t2\n159\n");
}

fn filter_without_no_new_privileges() {
    let mut document = spec(
        "mkdir /x; grep -E 'Seccomp:|CapEff' /proc/self/status; touch /tmp/ready; exec sleep 1000",
    );
    document["linux"]["seccomp"] = profile();
    document["process"]["noNewPrivileges"] = json!(false);
    document["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let running = start(&document);
    running.ready();
    // More processes are under the same filter.
    let (_, out, err) = running.exec(json!({"args": ["/bin/mkdir", "/tmp/y"], "cwd": "/"}));
    assert!(err.contains("quota"), "{out}{err}");
    running.container.destroy().unwrap();
    let (_, out, err) = running.end();
    assert!(err.contains("quota"), "{err}");
    assert_eq!(out, "CapEff:\t0000000000000000\nSeccomp:\t2\n");
}

fn nothing_of_the_guest_is_seen() {
    let out = output(&spec(
        "ls /; set -- /proc/[0-9]*; echo $#; cat /proc/self/cgroup; ls /sys/class/net; cat /proc/self/mountinfo | grep -c caisson-engine-test.d; true",
    ));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "bin",
            "dev",
            "etc",
            "link-to-etc",
            "link-up",
            "not-a-program",
            "proc",
            "run",
            "sys",
            "tmp",
            // The shell alone.
            "1",
            "0::/",
            "lo",
            "0"
        ],
        "{out}"
    );
}

fn namespaces_are_shared_by_path() {
    let first = start(&spec("exec sleep 1000"));
    let namespace = |kind: &str| format!("/proc/{}/ns/{kind}", first.container.pid());
    let mut document = spec(
        "for n in ipc uts net pid mnt cgroup; do readlink /proc/self/ns/$n; done; hostname; ls -d /proc/[0-9]* | head -n 1; cat /proc/1/cmdline | head -c 5",
    );
    for (kind, file) in [
        ("ipc", "ipc"),
        ("uts", "uts"),
        ("network", "net"),
        ("pid", "pid"),
    ] {
        add_namespace(&mut document, kind, &namespace(file));
    }
    document["hostname"] = json!("");
    let out = output(&document);
    for file in ["ipc", "uts", "net", "pid"] {
        let link = fs::read_link(namespace(file)).unwrap();
        assert!(out.contains(link.to_str().unwrap()), "{file}: {out}");
    }
    for file in ["mnt", "cgroup"] {
        let link = fs::read_link(namespace(file)).unwrap();
        assert!(!out.contains(link.to_str().unwrap()), "{file}: {out}");
    }
    assert!(out.ends_with("inside\n/proc/1\nsleep"), "{out}");
    first.container.destroy().unwrap();
    wait(first.container.pid());
}

fn no_pid_namespace() {
    let mut document = spec(
        "readlink /proc/self/ns/pid; sleep 1000 & sleep 1000 & touch /tmp/ready; exec sleep 1000",
    );
    let list = document["linux"]["namespaces"].as_array_mut().unwrap();
    list.retain(|one| one["type"] != "pid");
    let running = start(&document);
    running.ready();
    until(|| running.container.stats().unwrap().pids == 3);
    running.container.signal_all(15).unwrap();
    assert_eq!(wait(running.container.pid()), 143);
    running.container.destroy().unwrap();
    let own = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(running.stdout.join().unwrap().trim(), own.to_str().unwrap());
}

fn user_namespace() {
    let shared = directory("userns");
    let mut document = spec(
        "id -u; cat /proc/self/uid_map | while read a b c; do echo $a $b $c; done; stat -c '%u:%g' /etc/passwd /; \
         echo x > /etc/made; stat -c %u /etc/made; chown 5 /etc/made; echo $?; echo changed > /etc/replaced; cat /etc/replaced; \
         grep CapEff /proc/self/status; hostname again; echo $?; echo x > /dev/null; echo $?; touch /shared/x 2>/dev/null; echo $?; touch /tmp/ready; exec sleep 1000",
    );
    add_namespace(&mut document, "user", "");
    document["linux"]["uidMappings"] =
        json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    document["linux"]["gidMappings"] =
        json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
    let caps = json!([
        "CAP_CHOWN",
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER"
    ]);
    document["process"]["capabilities"] =
        json!({"bounding": caps, "permitted": caps, "effective": caps});
    add_mount(
        &mut document,
        json!({"destination": "/shared", "type": "bind", "source": shared, "options": ["bind"]}),
    );
    let running = start(&document);
    running.ready();
    let status = fs::read_to_string(format!("/proc/{}/status", running.container.pid())).unwrap();
    assert!(status.contains("Uid:\t100000\t100000"), "{status}");
    assert!(status.contains("Gid:\t200000\t200000"), "{status}");
    let (code, out, err) = running.exec(json!({"args": ["sh", "-c", "id -u; stat -c %u /etc/passwd"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 33, "gid": 33}}));
    assert_eq!((code, out.as_str()), (0, "33\n0\n"), "{err}");
    running.container.destroy().unwrap();
    let (_, out, err) = running.end();
    assert_eq!(
        out, "0\n0 100000 65536\n0:0\n0:0\n0\n0\nchanged\nCapEff:\t000000000020000b\n0\n0\n1\n",
        "{err}"
    );
    assert!(!shared.join("x").exists());
}

fn pod_namespaces() {
    let (namespaces, mapped, plain) = (
        directory("namespaces"),
        directory("mapped"),
        directory("plain"),
    );
    for volume in [&mapped, &plain] {
        fs::set_permissions(volume, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let ids = |first| IdMapping {
        container_id: 0,
        host_id: first,
        size: 65_536,
    };
    make_pod_namespaces(ids(100_000), ids(200_000), &namespaces).unwrap();
    let mut document = spec(
        "readlink /proc/self/ns/user; stat -c '%u:%g' /mapped /plain; echo x > /mapped/x; echo x > /plain/x; chown 5:6 /plain/x; \
         echo one > /dev/other; echo $?; chown 70000 /plain/x 2>/dev/null; echo $?; echo again > /dev/stdout; touch /tmp/ready; exec sleep 1000",
    );
    for (kind, name) in [
        ("user", "user"),
        ("network", "net"),
        ("ipc", "ipc"),
        ("uts", "uts"),
    ] {
        add_namespace(&mut document, kind, namespaces.join(name).to_str().unwrap());
    }
    let (uids, gids) = (json!([ids(100_000)]), json!([ids(200_000)]));
    document["linux"]["uidMappings"] = uids.clone();
    document["linux"]["gidMappings"] = gids.clone();
    document["linux"]["devices"] =
        json!([{"path": "/dev/other", "type": "c", "major": 1, "minor": 3}]);
    document["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}]);
    add_mount(
        &mut document,
        json!({"destination": "/mapped", "type": "bind", "source": mapped, "options": ["bind"], "uidMappings": uids, "gidMappings": gids}),
    );
    add_mount(
        &mut document,
        json!({"destination": "/plain", "type": "bind", "source": plain, "options": ["bind"]}),
    );
    let running = start(&document);
    running.ready();
    assert_eq!(running.container.identity().unwrap().0, 0);
    let shell = json!({"args": ["sh", "-c", "id -u; readlink /proc/self/ns/user; echo more > /dev/stderr"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let (code, out, err) = running.exec(shell);
    assert_eq!((code, err.as_str()), (0, "more\n"));
    let namespace = out.lines().nth(1).unwrap().to_owned();
    running.container.destroy().unwrap();
    let (_, out, err) = running.end();
    assert_eq!(
        out,
        format!("{namespace}\n0:0\n65534:65534\n0\n1\nagain\n"),
        "{err}"
    );
    let owner = |path: PathBuf| {
        let status = fs::metadata(path).unwrap();
        (status.uid(), status.gid())
    };
    assert_eq!(owner(mapped.join("x")), (0, 0));
    assert_eq!(owner(plain.join("x")), (100_005, 200_006));
    // Another container of the pod is in the same.
    let mut other = spec("readlink /proc/self/ns/user");
    for field in ["namespaces", "uidMappings", "gidMappings"] {
        other["linux"][field] = document["linux"][field].clone();
    }
    assert_eq!(output(&other).trim(), namespace);
    for name in ["user", "net", "ipc", "uts"] {
        nix::mount::umount(&namespaces.join(name)).unwrap();
    }
}

fn time_namespace() {
    let mut document = spec("cat /proc/uptime; cat /proc/self/timens_offsets");
    add_namespace(&mut document, "time", "");
    document["linux"]["timeOffsets"] =
        json!({"monotonic": {"secs": 1000}, "boottime": {"secs": 1_000_000, "nanosecs": 5}});
    let out = output(&document);
    let uptime: f64 = out.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{out}");
}

fn kernel_parameters() {
    let mut document = spec(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni /proc/sys/fs/mqueue/msg_max",
    );
    document["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shmmni": "99", "fs.mqueue.msg_max": "33"});
    assert_eq!(output(&document), "80\n99\n33\n");
    assert_ne!(
        fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(),
        "99\n"
    );
}

fn personality() {
    let mut document = spec("cat /proc/self/personality");
    document["linux"]["personality"] = json!({"domain": "LINUX32"});
    assert_eq!(output(&document), "00000008\n");
}

fn one_process_is_enough() {
    let mut document = spec("");
    document["process"]["args"] = json!(["echo", "one"]);
    document["linux"]["resources"]["pids"] = json!({"limit": 1});
    assert_eq!(output(&document), "one\n");
}
