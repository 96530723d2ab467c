//! The agent as the daemon sees it: over its gRPC service and its stream port, with real containers.
//!
//! The agent runs in namespaces of its own instead of a VM, and listens on unix sockets instead of vsock; nothing
//! else differs. Needs root and a complete cgroup v2.

mod harness;

use std::time::Duration;

use caisson_proto::agent::container_state::State;
use caisson_proto::agent::*;
use harness::{Agent, missing, process, sandbox, spec};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

/// Ends the test, and says so, where it cannot run.
macro_rules! require_containers {
    () => {
        if let Some(reason) = missing() {
            eprintln!("skipped: {reason}");
            return;
        }
    };
}

#[tokio::test]
async fn output_and_exit_codes_arrive() {
    require_containers!();
    let mut agent = Agent::ready().await;
    agent
        .run("a", &spec(&["sh", "-c", "echo out; echo err >&2; exit 42"]))
        .await;
    let status = agent.wait("a", "").await;
    assert_eq!((status.code, status.oom_killed), (42, false));
    assert!(status.exited_at_ns > 1_600_000_000_000_000_000);
    // must-test: exec and logs that lose the tail of the output when the process ends quickly
    assert_eq!(agent.read("a", "-", "stdout").await, "out\n");
    assert_eq!(agent.read("a", "-", "stderr").await, "err\n");
    let error = agent.try_stream("a", "-", "stdin").await.unwrap_err();
    assert!(error.starts_with("ERR stdin was not asked for"), "{error}");
    assert_eq!(agent.wait("a", "").await.code, 42);
    agent.remove("a").await;
    agent.remove("a").await;
    let request = WaitRequest {
        container_id: "a".into(),
        exec_id: String::new(),
    };
    assert_eq!(
        agent.client.wait(request).await.unwrap_err().code(),
        Code::NotFound
    );

    for code in [0, 1, 127, 255] {
        agent
            .run("codes", &spec(&["sh", "-c", &format!("exit {code}")]))
            .await;
        assert_eq!(agent.wait("codes", "").await.code, code);
        agent.remove("codes").await;
    }
    // Real-time signals too.
    for number in [9, 15, 40] {
        let ready = format!("trap - {number}; echo ready; while :; do sleep 1; done");
        let mut in_pod_namespace = spec(&["sh", "-c", &ready]);
        // PID 1 of a namespace is not killed by signals it does not handle.
        in_pod_namespace["linux"]["namespaces"][0]["path"] = "/run/caisson/ns/pid".into();
        agent.run("signals", &in_pod_namespace).await;
        let mut output = agent.stream("signals", "-", "stdout").await;
        output.read_exact(&mut [0; 6]).await.unwrap();
        let request = SignalRequest {
            container_id: "signals".into(),
            signal: number,
            ..Default::default()
        };
        agent.client.signal(request.clone()).await.unwrap();
        assert_eq!(agent.wait("signals", "").await.code, 128 + number);
        agent.client.signal(request).await.unwrap();
        agent.remove("signals").await;
    }
}

#[tokio::test]
async fn a_hundred_megabytes_pass_byte_for_byte() {
    require_containers!();
    // must-test: kubectl cp and exec with standard input hang: half-close, large streams both ways, a slow reader
    const SIZE: usize = 100 << 20;
    let mut agent = Agent::ready().await;
    agent
        .run(
            "big",
            &spec(&[
                "sh",
                "-c",
                &format!("yes 0123456789abcdef | head -c {SIZE}; exit 3"),
            ]),
        )
        .await;
    let mut stream = agent.stream("big", "-", "stdout").await;
    let pattern = b"0123456789abcdef\n";
    let mut seen = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        if seen == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        for (index, &byte) in buffer[..count].iter().enumerate() {
            assert_eq!(
                byte,
                pattern[(seen + index) % pattern.len()],
                "at {}",
                seen + index
            );
        }
        seen += count;
    }
    assert_eq!(seen, SIZE);
    assert_eq!(agent.wait("big", "").await.code, 3);
}

#[tokio::test]
async fn exec_with_standard_input_and_half_close() {
    require_containers!();
    let mut agent = Agent::ready().await;
    agent.run("x", &spec(&["sleep", "1000"])).await;
    agent
        .exec(
            "x",
            "copy",
            process(&["sh", "-c", "cat; echo done >&2; exit 7"]),
        )
        .await;
    let mut stdin = agent.stream("x", "copy", "stdin").await;
    let mut stdout = agent.stream("x", "copy", "stdout").await;
    let data: Vec<u8> = (0..16u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let sent = data.clone();
    let sender = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
        // The agent ends its side when everything is with the process.
        assert_eq!(stdin.read(&mut [0; 1]).await.unwrap(), 0);
    });
    let mut got = Vec::new();
    stdout.read_to_end(&mut got).await.unwrap();
    sender.await.unwrap();
    assert!(got == data);
    assert_eq!(agent.wait("x", "copy").await.code, 7);
    assert_eq!(agent.read("x", "copy", "stderr").await, "done\n");

    let again = ExecRequest {
        container_id: "x".into(),
        exec_id: "copy".into(),
        process_json: process(&["true"]).to_string().into_bytes(),
        ..Default::default()
    };
    assert_eq!(
        agent.client.exec(again.clone()).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let missing = ExecRequest {
        exec_id: "missing".into(),
        process_json: process(&["no-such-program"]).to_string().into_bytes(),
        ..again
    };
    let error = agent.client.exec(missing).await.unwrap_err();
    assert!(error.message().contains("no-such-program"), "{error}");
    agent.remove("x").await;
}

#[tokio::test]
async fn terminals_work_and_can_be_resized() {
    require_containers!();
    let mut agent = Agent::ready().await;
    agent.run("t", &spec(&["sleep", "1000"])).await;
    let mut shell = process(&[
        "sh",
        "-c",
        "tty; read line; stty size; echo got $line; exit 5",
    ]);
    shell["terminal"] = json!(true);
    agent.exec("t", "tty", shell).await;
    let resize = ResizeTtyRequest {
        container_id: "t".into(),
        exec_id: "tty".into(),
        columns: 132,
        rows: 50,
    };
    agent.client.resize_tty(resize.clone()).await.unwrap();
    let mut terminal = agent.stream("t", "tty", "tty").await;
    terminal.write_all(b"hello\n").await.unwrap();
    let mut output = String::new();
    terminal.read_to_string(&mut output).await.unwrap();
    assert!(output.contains("/dev/pts/"), "{output:?}");
    assert!(output.contains("50 132\r\n"), "{output:?}");
    assert!(output.contains("got hello\r\n"), "{output:?}");
    assert_eq!(agent.wait("t", "tty").await.code, 5);
    let wrong = ResizeTtyRequest {
        rows: 0,
        ..resize.clone()
    };
    assert_eq!(
        agent.client.resize_tty(wrong).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let no_terminal = ResizeTtyRequest {
        exec_id: String::new(),
        ..resize
    };
    assert_eq!(
        agent
            .client
            .resize_tty(no_terminal)
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn an_oom_kill_is_told_and_the_pod_lives_on() {
    require_containers!();
    let mut agent = Agent::ready().await;
    let mut events = agent
        .client
        .events(EventsRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut greedy = spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"]);
    greedy["linux"]["resources"] = json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } });
    agent.run("greedy", &greedy).await;
    let status = agent.wait("greedy", "").await;
    assert_eq!((status.code, status.oom_killed), (137, true));
    let first = events.message().await.unwrap().unwrap();
    assert!(matches!(first.kind, Some(event::Kind::Oom(_))), "{first:?}");
    let second = events.message().await.unwrap().unwrap();
    assert_eq!(second.container_id, "greedy");
    assert!(
        matches!(second.kind, Some(event::Kind::Exited(status)) if status.code == 137),
        "{second:?}"
    );
    agent.run("modest", &spec(&["echo", "still here"])).await;
    assert_eq!(agent.read("modest", "-", "stdout").await, "still here\n");
}

#[tokio::test]
async fn statistics_states_and_limits() {
    require_containers!();
    let mut agent = Agent::ready().await;
    agent.run("s", &spec(&["sleep", "1000"])).await;
    let created = agent.request("created", &spec(&["true"]));
    agent.client.create_container(created).await.unwrap();
    let update = UpdateContainerRequest {
        container_id: "s".into(),
        resources_json: json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 20 } })
            .to_string()
            .into_bytes(),
    };
    agent.client.update_container(update).await.unwrap();
    let stats = agent
        .client
        .stats(StatsRequest {
            detail: true,
            ..StatsRequest::default()
        })
        .await
        .unwrap()
        .into_inner();
    let of_s = stats
        .containers
        .iter()
        .find(|stats| stats.container_id == "s")
        .unwrap();
    assert_eq!(of_s.memory_limit_bytes, 64 << 20);
    assert_eq!(of_s.pids, 1);
    assert!(of_s.memory_usage_bytes > 0 && of_s.cpu_usage_ns > 0);
    assert!(of_s.memory_pressure.is_some());
    let detail = of_s.detail.as_ref().unwrap();
    assert_eq!((detail.processes, detail.threads), (1, 1));
    assert_eq!(detail.threads_max, 20);
    assert!(detail.file_descriptors >= 3 && detail.fs_total_inodes > detail.fs_free_inodes);
    assert!(detail.memory_peak_bytes >= of_s.memory_rss_bytes);
    let of_sandbox = stats.sandbox.unwrap();
    assert!(of_sandbox.memory_total_bytes > of_sandbox.memory_available_bytes);
    assert!(of_sandbox.processes >= 3);
    let unknown = StatsRequest {
        container_ids: vec!["nobody".into()],
        detail: false,
    };
    assert_eq!(
        agent.client.stats(unknown).await.unwrap_err().code(),
        Code::NotFound
    );

    let kill = SignalRequest {
        container_id: "s".into(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    agent.client.signal(kill).await.unwrap();
    agent.wait("s", "").await;
    let list = agent
        .client
        .list_containers(ListContainersRequest {})
        .await
        .unwrap()
        .into_inner();
    let states: Vec<_> = list
        .containers
        .iter()
        .map(|c| (c.container_id.as_str(), c.state()))
        .collect();
    assert_eq!(states, [("created", State::Created), ("s", State::Exited)]);
    assert_eq!(list.containers[1].exit.unwrap().code, 137);
    let late = ExecRequest {
        container_id: "s".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    assert_eq!(
        agent.client.exec(late).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn a_reading_that_hangs_holds_up_nothing_else() {
    require_containers!();
    // must-test: one slow stats read holds a global lock and stalls the agent
    let mut agent = Agent::ready().await;
    agent.run("slow", &spec(&["sleep", "1000"])).await;
    agent.run("quick", &spec(&["sleep", "1000"])).await;
    // A FIFO over a file of the cgroup: whoever reads it waits until somebody opens it for writing.
    let fifo = agent.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let file = "/sys/fs/cgroup/caisson/slow/memory.stat";
    agent.in_mounts(&["mount", "--bind", fifo.to_str().unwrap(), file]);

    let mut client = agent.client.clone();
    let all = tokio::spawn(async move { client.stats(StatsRequest::default()).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let quick = StatsRequest {
        container_ids: vec!["quick".into()],
        detail: false,
    };
    let mut client = agent.client.clone();
    let answer = tokio::time::timeout(Duration::from_secs(2), client.stats(quick)).await;
    let quick = answer.expect("it is not held up").unwrap().into_inner();
    assert_eq!(quick.containers.len(), 1);
    // The hanging container itself can be worked with as well.
    agent.exec("slow", "e", process(&["echo", "works"])).await;
    assert_eq!(agent.read("slow", "e", "stdout").await, "works\n");
    let all = all.await.unwrap().unwrap().into_inner();
    let ids: Vec<_> = all
        .containers
        .iter()
        .map(|stats| stats.container_id.as_str())
        .collect();
    assert_eq!(ids, ["quick"]);

    // The reading goes on; the removal of the cgroup takes the mount along.
    drop(std::fs::File::options().write(true).open(&fifo).unwrap());
    agent.remove("slow").await;
    assert!(!std::path::Path::new("/sys/fs/cgroup/caisson/slow").exists());
}

#[tokio::test]
async fn interfaces_get_their_names_addresses_and_routes() {
    require_containers!();
    let mut agent = Agent::start().await;
    // The names are the wrong way round: they have to be swapped.
    for (name, mac) in [("eth0", "02:00:00:00:00:02"), ("eth1", "02:00:00:00:00:01")] {
        agent.in_network(&["ip", "link", "add", name, "address", mac, "type", "dummy"]);
    }
    let route = |destination: &str, gateway: &str, priority| Route {
        destination: destination.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        priority,
        mtu: 0,
    };
    let request = SetupSandboxRequest {
        interfaces: vec![
            Interface {
                mac: "02:00:00:00:00:01".into(),
                name: "eth0".into(),
                mtu: 1400,
                addresses: vec!["10.9.0.2/24".into(), "fd09::2/64".into()],
                current_mac: String::new(),
            },
            Interface {
                mac: "02:00:00:00:00:02".into(),
                name: "eth1".into(),
                ..Default::default()
            },
        ],
        routes: vec![
            route("10.10.0.0/16", "", 0),
            route("0.0.0.0/0", "10.9.0.1", 50),
            route("::/0", "fd09::1", 0),
        ],
        ..sandbox()
    };
    let mut missing = request.clone();
    missing.interfaces[1].mac = "02:00:00:00:00:03".into();
    agent.client.setup_sandbox(request).await.unwrap();
    let link = agent.in_network(&["ip", "-o", "link", "show", "eth0"]);
    assert!(
        link.contains("mtu 1400") && link.contains("02:00:00:00:00:01"),
        "{link}"
    );
    assert!(link.contains("UP"), "{link}");
    let addresses = agent.in_network(&["ip", "-o", "address", "show", "eth0"]);
    assert!(
        addresses.contains("inet 10.9.0.2/24 brd 10.9.0.255"),
        "{addresses}"
    );
    assert!(addresses.contains("inet6 fd09::2/64"), "{addresses}");
    assert!(!addresses.contains("tentative"), "{addresses}");
    let routes = agent.in_network(&["ip", "route"]);
    assert!(
        routes.contains("default via 10.9.0.1 dev eth0 metric 50"),
        "{routes}"
    );
    assert!(
        routes.contains("10.10.0.0/16 dev eth0 scope link"),
        "{routes}"
    );
    let routes = agent.in_network(&["ip", "-6", "route"]);
    assert!(routes.contains("default via fd09::1 dev eth0"), "{routes}");
    let interfaces = agent
        .client
        .stats(StatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let names: Vec<_> = interfaces
        .sandbox
        .unwrap()
        .interfaces
        .into_iter()
        .map(|i| i.name)
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");

    let mut other = Agent::start().await;
    let error = other.client.setup_sandbox(missing).await.unwrap_err();
    assert!(
        error.message().contains("find the device of eth0"),
        "{error}"
    );
}

#[tokio::test]
async fn bad_input_is_refused_with_the_reason() {
    require_containers!();
    let mut agent = Agent::start().await;
    let request = agent.request("b", &spec(&["true"]));
    let error = agent.client.create_container(request).await.unwrap_err();
    assert_eq!(
        error.code(),
        Code::FailedPrecondition,
        "before the sandbox: {error}"
    );
    let wrong = SetupSandboxRequest {
        hostname: "no good".into(),
        ..sandbox()
    };
    assert_eq!(
        agent.client.setup_sandbox(wrong).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    agent.client.setup_sandbox(sandbox()).await.unwrap();
    assert_eq!(
        agent
            .client
            .setup_sandbox(sandbox())
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );

    let mut unknown = spec(&["true"]);
    unknown["linux"]["warpDrive"] = json!(1);
    let error = agent
        .client
        .create_container(agent.request("b", &unknown))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("warpDrive"), "{error}");
    let error = agent
        .client
        .create_container(agent.request("../b", &spec(&["true"])))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let mut no_layer = agent.request("b", &spec(&["true"]));
    no_layer.rootfs = None;
    assert_eq!(
        agent
            .client
            .create_container(no_layer)
            .await
            .unwrap_err()
            .code(),
        Code::InvalidArgument
    );
    let mut gone = agent.request("b", &spec(&["true"]));
    gone.rootfs = Some(RootFs {
        layers: vec![harness::file_layer("/no/such/layer")],
    });
    let error = agent.client.create_container(gone).await.unwrap_err();
    assert!(error.message().contains("/no/such/layer"), "{error}");

    // None of these has left the name taken.
    agent.run("b", &spec(&["true"])).await;
    let again = agent.request("b", &spec(&["true"]));
    assert_eq!(
        agent
            .client
            .create_container(again)
            .await
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );
    let again = StartContainerRequest {
        container_id: "b".into(),
    };
    assert_eq!(
        agent
            .client
            .start_container(again)
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );
    let signal = SignalRequest {
        container_id: "b".into(),
        signal: 65,
        ..Default::default()
    };
    assert_eq!(
        agent.client.signal(signal).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn containers_share_what_the_pod_shares() {
    require_containers!();
    let mut agent = Agent::ready().await;
    let mut with_files = spec(&[
        "sh",
        "-c",
        "cat /etc/resolv.conf; cat /proc/sys/kernel/hostname; echo $$; touch /dev/shm/seen",
    ]);
    let mounts = with_files["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({ "destination": "/etc/resolv.conf", "type": "bind", "options": ["bind", "ro"],
        "source": "/run/caisson/sandbox/resolv.conf" }),
    );
    mounts.push(json!({ "destination": "/dev/shm", "type": "bind", "options": ["bind"], "source": "/run/caisson/sandbox/shm" }));
    with_files["linux"]["namespaces"] =
        json!([{ "type": "pid", "path": "/run/caisson/ns/pid" }, { "type": "mount" }]);
    agent.run("one", &with_files).await;
    agent.wait("one", "").await;
    let output = agent.read("one", "-", "stdout").await;
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines[..3],
        [
            "search default.svc.cluster.local",
            "nameserver 10.96.0.10",
            "pod-0"
        ]
    );
    assert_ne!(lines[3], "1", "the pod's PID namespace has its own PID 1");
    with_files["process"] = process(&["ls", "/dev/shm"]);
    agent.run("two", &with_files).await;
    assert_eq!(agent.read("two", "-", "stdout").await, "seen\n");
}

#[tokio::test]
async fn twenty_containers_at_once_and_an_orderly_end() {
    require_containers!();
    let mut agent = Agent::ready().await;
    let mut starts = Vec::new();
    for number in 0..20 {
        let id = format!("many-{number}");
        let request = agent.request(&id, &spec(&["sh", "-c", "echo $HOSTNAME; exec sleep 1000"]));
        let mut client = agent.client.clone();
        starts.push(tokio::spawn(async move {
            client.create_container(request).await?;
            client
                .start_container(StartContainerRequest { container_id: id })
                .await
        }));
    }
    for start in starts {
        start.await.unwrap().unwrap();
    }
    let list = agent
        .client
        .list_containers(ListContainersRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        list.containers
            .iter()
            .filter(|c| c.state() == State::Running)
            .count(),
        20
    );
    agent
        .client
        .shutdown(ShutdownRequest { grace_ms: 200 })
        .await
        .unwrap();
    assert!(agent.ended());
    for number in 0..20 {
        let cgroup = format!("/sys/fs/cgroup/caisson/many-{number}");
        assert!(!std::path::Path::new(&cgroup).exists(), "{cgroup} is left");
    }
}
