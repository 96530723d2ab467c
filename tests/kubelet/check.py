#!/usr/bin/env python3
"""Runs a kubelet with static pods against a daemon and checks what it makes of them.

    tests/kubelet/check.py KUBELET SOCKET DIR LOG

KUBELET is the program, SOCKET the daemon's, DIR a directory for the kubelet's files, LOG what it has to say. There is no API server: what the
kubelet thinks of its pods is asked from its own endpoints. Every wait has a bound; prints a line a check; status 1 if one
failed. scripts/kubelet-check prepares the node and calls this.
"""

import glob
import gzip
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

PORT, HOST_PORT = 10250, 18081
IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
NODE = "static-node"
# Seconds; the machine may be an emulated one.
PATIENCE = 900

CONFIG = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://{socket}
staticPodPath: {dir}/manifests
podLogsDir: {dir}/logs
volumePluginDir: {dir}/plugins
address: 127.0.0.1
port: {port}
authentication: {{ anonymous: {{ enabled: true }}, webhook: {{ enabled: false }} }}
authorization: {{ mode: AlwaysAllow }}
cgroupDriver: cgroupfs
failSwapOn: false
resolvConf: ""
fileCheckFrequency: 2s
syncFrequency: 5s
containerLogMaxSize: 16Ki
containerLogMaxFiles: 40
containerLogMonitorInterval: 3s
featureGates: {{ PodAndContainerStatsFromCRI: true }}
imageMinimumGCAge: 1s
evictionPressureTransitionPeriod: 5s
evictionHard: {{ memory.available: 50Mi, nodefs.available: "{least}", imagefs.available: "{least}" }}
"""


def container(name, script=None, **more):
    """A container that runs a shell script."""
    command = {"command": ["sh", "-c", script]} if script else {}
    return {"name": name, "image": IMAGE, "imagePullPolicy": "IfNotPresent", **command, **more}


def probe(**more):
    return {"periodSeconds": 3, "timeoutSeconds": 20, "failureThreshold": 3, **more}


def shell(script):
    return {"exec": {"command": ["sh", "-c", script]}}


def mount(name, path, **more):
    return {"name": name, "mountPath": path, **more}


def pods(host):
    """The pods by name; `host` is a directory of the host that one of them mounts."""
    idle = "trap 'exit 0' TERM; while :; do sleep 1; done"
    return {
        "probes": {"containers": [
            container("exec", f"sleep 2; touch /tmp/ready; {idle}", readinessProbe=probe(**shell("cat /tmp/ready"))),
            container("http", "mkdir /www; echo served >/www/index.html; exec httpd -f -p 8080 -h /www",
                      ports=[{"containerPort": 8080, "hostPort": HOST_PORT}],
                      livenessProbe=probe(httpGet={"path": "/", "port": 8080}),
                      readinessProbe=probe(httpGet={"path": "/", "port": 8080})),
            container("tcp", "exec httpd -f -p 8081 -h /", startupProbe=probe(tcpSocket={"port": 8081})),
            container("grpc", "exec health 9000", readinessProbe=probe(grpc={"port": 9000})),
        ]},
        "unhealthy": {"terminationGracePeriodSeconds": 2, "containers": [
            container("dies", idle, livenessProbe=probe(**shell("exit 1"), failureThreshold=1)),
            # A probe that does not end is killed, and the container stays as it is.
            container("slow", idle, readinessProbe=probe(**shell("sleep 3600"), timeoutSeconds=1)),
        ]},
        "crash": {"containers": [
            container("message", "echo because >/dev/termination-log; exit 3"),
            container("fallback", "echo said in the log; exit 4", terminationMessagePolicy="FallbackToLogsOnError"),
        ]},
        "order": {
            "restartPolicy": "Never",
            "volumes": [{"name": "notes", "emptyDir": {}}],
            "initContainers": [
                container("first", "echo first >>/notes/all", volumeMounts=[mount("notes", "/notes")]),
                container("sidecar", f"echo sidecar >>/notes/all; touch /notes/up; {idle}", restartPolicy="Always",
                          volumeMounts=[mount("notes", "/notes")], startupProbe=probe(**shell("cat /notes/up"))),
                container("second", "echo second >>/notes/all", volumeMounts=[mount("notes", "/notes")]),
            ],
            "containers": [container("main", "echo main >>/notes/all; cat /notes/all",
                                     volumeMounts=[mount("notes", "/notes")])],
        },
        "hooks": {
            "terminationGracePeriodSeconds": 20,
            "volumes": [{"name": "host", "hostPath": {"path": host, "type": "Directory"}}],
            "containers": [container(
                "hooked", "trap 'echo term >>/host/hooks; exit 0' TERM; while :; do sleep 1; done",
                volumeMounts=[mount("host", "/host")],
                lifecycle={"postStart": shell("echo postStart >>/host/hooks"),
                           "preStop": shell("echo preStop >>/host/hooks")})],
        },
        "logs": {"restartPolicy": "Never", "containers": [container(
            "writer", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i of a log that is rotated; "
            "[ $((i % 100)) != 0 ] || sleep 1; done")]},
        "volumes": {
            "restartPolicy": "Never",
            "securityContext": {"runAsUser": 1000, "runAsGroup": 3000, "fsGroup": 2000, "supplementalGroups": [4000]},
            "volumes": [
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
                {"name": "disk", "emptyDir": {"sizeLimit": "64Mi"}},
                {"name": "parts", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
                {"name": "host", "hostPath": {"path": host}},
                {"name": "about", "downwardAPI": {"items": [
                    {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            ],
            "containers": [container(
                "user",
                "set -ex; id; test $(id -u) = 1000; test $(id -g) = 3000; id -G | grep -w 2000; id -G | grep -w 4000; "
                "echo x >/memory/f; echo x >/disk/f; test $(stat -c %g /disk) = 2000; "
                "grep -E ' /memory tmpfs .*size=16384k' /proc/mounts; test $(stat -c %g /memory) = 2000; "
                "grep -E ' /part tmpfs .*size=8192k' /proc/mounts; echo y >/part/f; test $(cat /whole/a/b/f) = y; "
                "test $(cat /ro/seed) = seed; ! touch /ro/no; test $(cat /sub/seed) = below; "
                "test $(cat /about/name) = volumes-$NODE; test -n \"$POD_IP\"; grep -w \"$POD_IP\" /etc/hosts; echo all right",
                env=[{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                     {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                volumeMounts=[mount("memory", "/memory"), mount("disk", "/disk"), mount("about", "/about"),
                              mount("parts", "/whole"), mount("parts", "/part", subPath="a/b"),
                              mount("host", "/ro", readOnly=True), mount("host", "/sub", subPath="below")])],
        },
        "limited": {"containers": [container(
            "busy", f"dd if=/dev/zero of=/tmp/file bs=1M count=4; {idle}",
            resources={"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}})]},
    }


class Failed(Exception):
    """A check that does not hold (yet)."""


def expect(condition, text):
    if not condition:
        raise Failed(text)


class Node:
    """The kubelet and what it says."""

    def __init__(self, program, socket, directory, log):
        self.program, self.dir, self.said = program, directory, log
        self.manifests, self.host = f"{directory}/manifests", f"{directory}/host"
        for name in (self.manifests, f"{directory}/plugins", f"{directory}/root", f"{self.host}/below"):
            os.makedirs(name)
        for name, text in (("seed", "seed"), ("below/seed", "below")):
            self.write(f"{self.host}/{name}", text)
        self.write(f"{self.host}/hooks", "")
        self.socket, self.least, self.used, self.process = socket, "1%", 0, None

    @staticmethod
    def write(path, text):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def start(self):
        config = CONFIG.format(socket=self.socket, dir=self.dir, port=PORT, least=self.least)
        self.write(f"{self.dir}/config.yaml", config)
        with open(self.said, "ab") as log:
            self.process = subprocess.Popen(
                [self.program, f"--config={self.dir}/config.yaml", f"--root-dir={self.dir}/root",
                 f"--cert-dir={self.dir}/pki", f"--hostname-override={NODE}", "--v=2"], stdout=log, stderr=log)

    def stop(self):
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            self.process = None

    def ask(self, path, method="GET"):
        """The body of an answer of the kubelet's own server."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it signs its certificate itself
        request = urllib.request.Request(f"https://127.0.0.1:{PORT}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.HTTPError) as error:
            if self.process.poll() is not None:
                raise SystemExit(f"the kubelet ended with status {self.process.returncode}") from error
            raise Failed(f"{path}: {error}") from error

    def add(self, name, spec):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec}
        self.write(f"{self.dir}/{name}.new", json.dumps(pod))
        os.rename(f"{self.dir}/{name}.new", f"{self.manifests}/{name}.json")

    def remove(self, name):
        os.unlink(f"{self.manifests}/{name}.json")

    def names(self):
        return [pod["metadata"]["name"] for pod in json.loads(self.ask("/pods"))["items"] or []]

    def status(self, name):
        for pod in json.loads(self.ask("/pods"))["items"] or []:
            if pod["metadata"]["name"] == f"{name}-{NODE}":
                return pod["status"]
        raise Failed("the kubelet does not list the pod")

    def containers(self, name):
        return {c["name"]: c for c in self.status(name).get("containerStatuses", [])}

    def log(self, pod, name):
        return self.ask(f"/containerLogs/default/{pod}-{NODE}/{name}")


def brief(containers):
    return json.dumps({name: [c["ready"], c["restartCount"], c["state"]] for name, c in containers.items()})


def check_probes(node):
    found = node.containers("probes")
    expect(len(found) == 4 and all(c["ready"] and c["started"] and not c["restartCount"] for c in found.values()), brief(found))


def check_host_port(_node):
    try:
        with urllib.request.urlopen(f"http://10.88.0.1:{HOST_PORT}/", timeout=10) as answer:
            expect(answer.read() == b"served\n", "another body")
    except OSError as error:
        raise Failed(str(error)) from error


def check_liveness(node):
    found = node.containers("unhealthy")
    expect(found and found["dies"]["restartCount"] >= 1, brief(found))


def check_probe_timeout(node):
    check_liveness(node)
    slow = node.containers("unhealthy")["slow"]
    expect(not slow["ready"] and not slow["restartCount"] and "running" in slow["state"], brief({"slow": slow}))


def check_back_off(node):
    found = node.containers("crash")
    expect(len(found) == 2 and all(
        c["restartCount"] >= 2 and c["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff"
        for c in found.values()), brief(found))


def check_messages(node):
    found = {name: c.get("lastState", {}).get("terminated", {}) for name, c in node.containers("crash").items()}
    expect(found.get("message", {}).get("message") == "because\n" and found["message"]["exitCode"] == 3, str(found))
    expect(found.get("fallback", {}).get("message") == "said in the log\n" and found["fallback"]["exitCode"] == 4, str(found))


def check_order(node):
    status = node.status("order")
    expect(status["phase"] == "Succeeded", status["phase"] + " " + brief(node.containers("order")))
    expect(node.log("order", "main").split() == ["first", "sidecar", "second", "main"], node.log("order", "main"))


def check_post_start(node):
    expect(node.status("hooks")["phase"] == "Running", "not running")
    with open(f"{node.host}/hooks", encoding="utf-8") as file:
        expect(file.read() == "postStart\n", "the hook has not run once")


def check_logs(node):
    status = node.status("logs")
    expect(status["phase"] == "Succeeded", status["phase"])
    files, lines = glob.glob(f"{node.dir}/logs/default_logs-*/writer/*"), []
    for name in files:
        with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
            lines += [int(line.split()[4]) for line in file]
    expect(len(files) >= 3, f"the log was not rotated: {files}")
    expect(sorted(lines) == list(range(1, 2001)), f"{len(lines)} of 2000 lines in {len(files)} files")


def check_volumes(node):
    status = node.status("volumes")
    if status["phase"] == "Failed":
        raise Failed("FINAL: " + node.log("volumes", "user")[-600:])
    expect(status["phase"] == "Succeeded", status["phase"])
    expect("all right" in node.log("volumes", "user"), node.log("volumes", "user")[-600:])


def check_exec(node):
    said = node.ask(f"/run/default/limited-{NODE}/busy?cmd=cat%20/proc/self/comm", "POST")
    expect(said == "cat\n", repr(said))


def check_stats(node):
    summary = json.loads(node.ask("/stats/summary?only_cpu_and_memory=false"))
    image_fs = summary["node"]["runtime"]["imageFs"]
    expect(image_fs["usedBytes"] > 0 and image_fs["availableBytes"] > 0 and image_fs["inodesUsed"] > 0, f"imageFs {image_fs}")
    pod = next((p for p in summary["pods"] or [] if p["podRef"]["name"] == f"limited-{NODE}"), None)
    expect(pod and pod.get("containers"), "no statistics of the pod")
    busy = pod["containers"][0]
    for what, value in (
        ("container CPU", busy.get("cpu", {}).get("usageCoreNanoSeconds")),
        ("container memory", busy.get("memory", {}).get("workingSetBytes")),
        ("container rootfs", busy.get("rootfs", {}).get("usedBytes")),
        ("container logs", busy.get("logs", {}).get("usedBytes")),
        ("pod CPU", pod.get("cpu", {}).get("usageCoreNanoSeconds")),
        ("pod memory", pod.get("memory", {}).get("workingSetBytes")),
        ("pod network", (pod.get("network") or {}).get("rxBytes")),
        ("pod processes", (pod.get("process_stats") or {}).get("process_count")),
    ):
        expect(value, f"{what} is {value}: {json.dumps(pod)[:1500]}")
    expect(busy["rootfs"]["usedBytes"] >= 4 << 20, f"rootfs {busy['rootfs']}")


def check_restart(node):
    """A new kubelet finds its pods and leaves them alone."""
    before = {c["containerID"]: c["restartCount"] for c in node.containers("probes").values()}
    node.stop()
    node.start()
    wait(node, "", check_probes)
    time.sleep(10)
    expect(before == {c["containerID"]: c["restartCount"] for c in node.containers("probes").values()}, "containers were replaced")


def check_pre_stop(node):
    with open(f"{node.host}/hooks", encoding="utf-8") as file:
        said = file.read().split()
    expect(said == ["postStart", "preStop", "term"], str(said))


def check_gone(node):
    expect(not node.names(), f"still there: {node.names()}")
    left = subprocess.run(["pgrep", "-x", "caisson-vmm"], capture_output=True, text=True, check=False).stdout.split()
    expect(not left, f"{len(left)} pod processes are left")


def image_fs(node):
    return json.loads(node.ask("/stats/summary"))["node"]["runtime"]["imageFs"]


def fill_disk(node):
    """Starts a kubelet that wants a little less room than there is, and takes some of it away."""
    node.stop()
    room = os.statvfs(node.dir)
    free = room.f_bavail * room.f_frsize
    node.least = f"{(free >> 20) - 512}Mi"
    node.start()
    wait(node, "", image_fs)
    node.used = image_fs(node)["usedBytes"]
    with open(f"{node.dir}/filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)


def check_eviction(node):
    """Static pods are never evicted; what a kubelet that is short of room does first is to delete images without containers."""
    with open(node.said, encoding="utf-8", errors="replace") as file:
        expect("attempting to reclaim" in file.read(), "the kubelet does not notice that the disk is full")
    used = image_fs(node)["usedBytes"]
    expect(used < node.used // 10, f"images still use {used} of {node.used} bytes")


def wait(node, name, check):
    """Asks until the check holds; says so, where it has a name. False if it does not hold in time."""
    deadline, start = time.monotonic() + PATIENCE, time.monotonic()
    while True:
        try:
            check(node)
            break
        except (Failed, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, Failed) else str(error)
            if time.monotonic() > deadline or reason.startswith("FINAL"):
                print(f"FAILED  {name or check.__name__}: {reason}", flush=True)
                return False
        time.sleep(2)
    if name:
        print(f"ok      {name} ({time.monotonic() - start:.0f} s)", flush=True)
    return True


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    node = Node(*sys.argv[1:])
    node.start()
    wanted = pods(node.host)
    try:
        for name, spec in wanted.items():
            node.add(name, spec)
        good = [wait(node, name, check) for name, check in (
            ("probes: exec, HTTP, TCP and gRPC", check_probes),
            ("a host port", check_host_port),
            ("a liveness probe restarts", check_liveness),
            ("a probe that takes too long is ended", check_probe_timeout),
            ("restarts with back-off", check_back_off),
            ("termination messages", check_messages),
            ("init and sidecar containers, in order", check_order),
            ("a postStart hook", check_post_start),
            ("log rotation loses no line", check_logs),
            ("volumes, users and groups", check_volumes),
            ("a command in a container", check_exec),
            ("statistics", check_stats),
            ("a new kubelet leaves pods alone", check_restart),
        )]
        for name in wanted:
            node.remove(name)
        good += [wait(node, name, check) for name, check in (
            ("a preStop hook, then SIGTERM", check_pre_stop),
            ("pods that are gone leave nothing", check_gone),
        )]
        fill_disk(node)
        good.append(wait(node, "a full disk, images are deleted", check_eviction))
        os.unlink(f"{node.dir}/filler")
        node.add("order", wanted["order"])
        good.append(wait(node, "room again, images are pulled again", check_order))
        node.remove("order")
        good.append(wait(node, "and it leaves nothing", check_gone))
    finally:
        node.stop()
    print(f"kubelet: {sum(good)} passed, {len(good) - sum(good)} failed")
    sys.exit(0 if all(good) else 1)


main()
