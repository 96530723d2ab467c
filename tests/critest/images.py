#!/usr/bin/env python3
"""Makes stand-ins of the images that the CRI conformance suite and a kubelet ask for, in a registry's storage.

    tests/critest/images.py DIR

DIR (created here) gets `registry`, the storage of Debian's docker-registry with all images, `test-images.yaml` for
critest's --test-images-file, `digest`, the digest of the image that critest names by digest, and `images`, a list.

Everything in the images comes from Debian packages, which are downloaded and unpacked, not installed, and from
tools.c. The kinds of manifest are mixed on purpose (OCI manifest, OCI index, Docker schema 2, Docker manifest list):
registries serve all four.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("busybox", "libc6", "nginx")
CREATED, MTIME = "2023-11-14T22:13:20Z", 1700000000

OCI = {
    "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
    "config": "application/vnd.oci.image.config.v1+json",
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "index": "application/vnd.oci.image.index.v1+json",
}
DOCKER = {
    "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "config": "application/vnd.docker.container.image.v1+json",
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "index": "application/vnd.docker.distribution.manifest.list.v2+json",
}


def fail(message):
    sys.exit(f"critest images: {message}")


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def as_json(value):
    return json.dumps(value, sort_keys=True).encode()


def output(*command, **options):
    """A command's standard output; ends the program, with what the command said, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        fail(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


class Layer:
    """A set of files that becomes a reproducible layer."""

    def __init__(self):
        self.entries = {}

    def directory(self, path, mode=0o755, uid=0, gid=0):
        self.entries[path] = (tarfile.DIRTYPE, mode, uid, gid, "", b"")
        return self

    def file(self, path, data, mode=0o644, uid=0, gid=0):
        self._parents(path)
        data = data if isinstance(data, bytes) else data.encode()
        self.entries[path] = (tarfile.REGTYPE, mode, uid, gid, "", data)
        return self

    def copy(self, path, source, mode=0o755):
        with open(source, "rb") as file:
            return self.file(path, file.read(), mode)

    def hard_link(self, path, target):
        self._parents(path)
        self.entries[path] = (tarfile.LNKTYPE, 0o755, 0, 0, target, b"")
        return self

    def whiteout(self, path):
        parent, name = os.path.split(path)
        return self.file(f"{parent}/.wh.{name}", b"")

    def _parents(self, path):
        parts = path.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            self.entries.setdefault("/".join(parts[:count]), (tarfile.DIRTYPE, 0o755, 0, 0, "", b""))

    def blobs(self):
        """The diff ID and the compressed bytes."""
        plain, packed = io.BytesIO(), io.BytesIO()
        # A hard link comes after what it points to.
        order = sorted(self.entries, key=lambda path: (self.entries[path][0] == tarfile.LNKTYPE, path))
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in order:
                info = tarfile.TarInfo(path)
                info.type, info.mode, info.uid, info.gid, info.linkname, data = self.entries[path]
                info.mtime, info.size = MTIME, len(data)
                archive.addfile(info, io.BytesIO(data))
        with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:
            file.write(plain.getvalue())
        return digest_of(plain.getvalue()), packed.getvalue()


class Images:
    """Images by reference, to be pushed all at once."""

    def __init__(self):
        self.blobs = {}
        # Reference -> media type and bytes of what the tag names, and the manifests below it.
        self.tags = {}

    def put(self, data):
        digest = digest_of(data)
        self.blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    def add(self, references, layers, config, kind="oci"):
        """Adds an image under all references; KIND is oci or docker, with -index for one of two platforms. Returns
        the digest of what the references name."""
        types = DOCKER if kind.startswith("docker") else OCI
        packed = [layer.blobs() for layer in layers]
        descriptors = [{"mediaType": types["layer"], **self.put(data)} for _, data in packed]

        def manifest(architecture):
            image = self.put(as_json({
                "architecture": architecture, "os": "linux", "created": CREATED, "config": config,
                "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in packed]},
                "history": [{"created": CREATED, "created_by": "tests/critest/images.py"} for _ in packed],
            }))
            return as_json({"schemaVersion": 2, "mediaType": types["manifest"],
                            "config": {"mediaType": types["config"], **image}, "layers": descriptors})

        top, media_type, below = manifest("amd64"), types["manifest"], []
        if kind.endswith("-index"):
            # The first platform is one that nobody here can run: to pick it is a bug.
            below = [("s390x", manifest("s390x")), ("amd64", top)]
            top, media_type = as_json({"schemaVersion": 2, "mediaType": types["index"], "manifests": [
                {"mediaType": types["manifest"], "size": len(data), "digest": digest_of(data),
                 "platform": {"architecture": architecture, "os": "linux"}}
                for architecture, data in below]}), types["index"]
        for reference in references:
            self.tags[reference] = (media_type, top, [(types["manifest"], data) for _, data in below])
        return digest_of(top)

    def push(self, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def ask(method, path, body=None, media_type=None, fine=(200, 201, 202)):
            connection.request(method, path, body, {"Content-Type": media_type} if media_type else {})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status not in fine:
                fail(f"the registry answers {method} {path} with {answer.status}: {said[:300]!r}")
            return answer

        for reference, (media_type, top, below) in self.tags.items():
            repository, tag = split(reference)
            manifests = below or [(media_type, top)]
            for _, data in manifests:
                document = json.loads(data)
                for blob in [document["config"], *document["layers"]]:
                    digest = blob["digest"]
                    if ask("HEAD", f"/v2/{repository}/blobs/{digest}", fine=(200, 404)).status == 200:
                        continue
                    place = ask("POST", f"/v2/{repository}/blobs/uploads/").getheader("Location")
                    path = re.sub(r"^https?://[^/]*", "", place)
                    ask("PUT", f"{path}{'&' if '?' in path else '?'}digest={digest}", self.blobs[digest],
                        "application/octet-stream")
            for kind, data in below:
                ask("PUT", f"/v2/{repository}/manifests/{digest_of(data)}", data, kind)
            ask("PUT", f"/v2/{repository}/manifests/{tag}", top, media_type)


def split(reference):
    """Repository and tag; the registry's name is the mirror's business."""
    repository, _, tag = reference.split("/", 1)[1].partition(":")
    return repository, tag or "latest"


def unpack(work):
    """Downloads the packages and unpacks them into one tree."""
    downloads, tree = os.path.join(work, "packages"), os.path.join(work, "tree")
    os.makedirs(downloads)
    output("apt-get", "-q", "download", *PACKAGES, cwd=downloads)
    for name in os.listdir(downloads):
        output("dpkg-deb", "-x", os.path.join(downloads, name), tree)
    return tree


def with_libraries(layer, tree, path, source):
    """Adds a program with its shared libraries: the tree's where it has them, else this machine's."""
    layer.copy(path, source)
    for library in re.findall(r"(/\S+)\s+\(0x", output("ldd", source)):
        found = next((f for f in (tree + library, tree + "/usr" + library) if os.path.exists(f)), library)
        layer.copy(library.lstrip("/"), found)


def make(images, work):
    """All images; returns the digest of the one that is named by digest."""
    tree, tools = unpack(work), os.path.join(work, "tools")
    output("gcc", "-O2", "-static", "-s", "-Wl,--build-id=none", "-o", tools, os.path.join(HERE, "tools.c"))
    k8s, e2e, staging = "registry.k8s.io/", "registry.k8s.io/e2e-test-images/", "gcr.io/k8s-staging-cri-tools/"

    passwd = (
        "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
        "www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"
    )
    group = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n"
    env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    shell = {"Env": env, "Cmd": ["sh"]}

    # The package busybox and not busybox-static, whose shell runs its own applets and nothing from PATH: the specs
    # on masked paths need the latter.
    busybox = os.path.join(tree, "bin/busybox")
    base = Layer()
    for name in ("dev", "proc", "sys", "etc", "root", "home", "mnt", "run", "var/run", "var/log"):
        base.directory(name)
    base.directory("tmp", 0o1777).directory("var/tmp", 0o1777).directory("var/www", 0o755, 33, 33)
    base.file("etc/passwd", passwd).file("etc/group", group).file("etc/shadow", "root:*:::::::\n", 0o640)
    base.file("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    with_libraries(base, tree, "bin/busybox", busybox)
    for applet in set(output(busybox, "--list").split()) - {"busybox", "[[", "pgrep", "ipcs", "health"}:
        base.hard_link(f"bin/{applet}", "bin/busybox")
    base.copy("bin/pgrep", tools).hard_link("bin/ipcs", "bin/pgrep").hard_link("bin/health", "bin/pgrep")

    def mark(text):
        return Layer().file("etc/test-image", text + "\n")

    images.add([e2e + "busybox:1.29-2", "docker.io/library/busybox:latest"], [base, mark("busybox")], shell,
               "docker-index")

    server = Layer()
    with_libraries(server, tree, "usr/sbin/nginx", os.path.join(tree, "usr/sbin/nginx"))
    server.directory("var/lib/nginx").directory("var/log/nginx", 0o755, 33, 33)
    server.file("usr/share/nginx/html/index.html", "<html><title>Welcome to nginx!</title></html>\n")
    server.file("etc/nginx/mime.types", "types { text/html html; }\n")

    def listening(port):
        return Layer().file(
            "etc/nginx/nginx.conf",
            "user www-data;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /dev/stderr notice;\n"
            "events { worker_connections 256; }\nhttp {\n  include mime.types;\n  access_log /dev/stdout;\n"
            f"  server {{ listen {port}; root /usr/share/nginx/html; index index.html; }}\n}}\n")

    web = {"Env": env, "Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}}
    images.add([e2e + "nginx:1.14-2"], [base, server, listening(80)], web, "oci-index")
    images.add([staging + "hostnet-nginx-amd64:latest"], [base, server, listening(12003)], web, "docker")
    # The suite looks for "httpd" in its log and for a web server on port 80.
    start = "#!/bin/sh\necho 'httpd: serving on port 80' >&2\nexec httpd -f -p 80 -h /www\n"
    images.add([e2e + "httpd:2.4.39-4"],
               [base, Layer().file("www/index.html", "<html>httpd</html>\n").file("start", start, 0o755)],
               {"Env": env, "Cmd": ["/start"], "ExposedPorts": {"80/tcp": {}}}, "docker")

    images.add([e2e + "nonewprivs:1.3"], [Layer().directory("tmp", 0o1777).copy("nnp", tools, 0o4755)],
               {"Env": env, "Entrypoint": ["/nnp"]})
    images.add([k8s + "pause:3.9", k8s + "pause:3.10", "k8s.gcr.io/pause:3.9"], [Layer().copy("pause", tools)],
               {"Env": env, "Entrypoint": ["/pause"], "User": "65535:65535"}, "docker-index")

    for name, user in (("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:users"),
                       ("username-group", "www-data:users")):
        images.add([f"{staging}test-image-user-{name}"], [base, mark("user " + user)], {**shell, "User": user})
    groups = Layer().file("etc/passwd", passwd + "default-user:x:1000:1000::/home/default-user:/bin/sh\n")
    groups.file("etc/group", group + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    groups.directory("home/default-user", 0o755, 1000, 1000)
    images.add([staging + "test-image-predefined-group"], [base, groups], {**shell, "User": "1000"})

    images.add([staging + "test-image-latest"], [base, mark("latest")], shell, "docker-index")
    images.add([staging + "test-image-tag:test"], [base, mark("tag test")], shell, "docker")
    images.add([staging + "test-image-tag:all"], [base, mark("tag all")], shell, "oci-index")
    for number, kind in ((1, "docker"), (2, "oci"), (3, "docker-index")):
        # With a directory that the last layer takes away again.
        below = mark("gone").file("etc/gone/deep/file", "x")
        images.add([f"{staging}test-image-{number}:latest"],
                   [base, below, mark(f"image {number}").whiteout("etc/gone")], shell, kind)
    images.add([f"{staging}test-image-tags:{number}" for number in (1, 2, 3)], [base, mark("tags")], shell, "docker")
    return images.add([staging + "test-image-digest:latest"], [base, mark("digest")], shell)


@contextlib.contextmanager
def registry(storage, work):
    """A docker-registry on a free port of the loopback for as long as the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = os.path.join(work, "registry.yaml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {storage}}}}}\n"
                   f"http: {{addr: '127.0.0.1:{port}'}}\n")
    with open(os.path.join(work, "registry.log"), "wb") as log, \
            subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    fail(f"docker-registry ended with status {process.returncode}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out, images = os.path.abspath(sys.argv[1]), Images()
    os.makedirs(out)
    with tempfile.TemporaryDirectory() as work:
        digest = make(images, work)
        with registry(os.path.join(out, "registry"), work) as port:
            images.push(port)

    def write(name, text):
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            file.write(text)

    write("test-images.yaml", "defaultTestContainerImage: registry.k8s.io/e2e-test-images/busybox:1.29-2\n"
          "webServerTestImage: registry.k8s.io/e2e-test-images/nginx:1.14-2\n")
    write("digest", digest + "\n")
    write("images", "".join(f"{reference} {digest_of(top)} {kind}\n" for reference, (kind, top, _) in images.tags.items()))


main()
