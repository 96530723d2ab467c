#!/usr/bin/env python3
"""Makes the images of `scripts/bench images` as a registry's storage.

    tests/bench/images.py DIR PULL_MB LARGE_MB FILE_MB FILES TAR_FILES

DIR (created here) gets `registry`, the storage of Debian's docker-registry, with these images of the repository `bench`:

    pull:1      PULL_MB in 10 layers
    pull:2      the same but for the last layer
    small       10 MB
    large       LARGE_MB
    work        a file of FILE_MB (/big), FILES files of at most 3 KB in directories of 100 (/files), and an archive of
                TAR_FILES files (/small.tar)
    shared      a file of 40 MB (/big)
    pause       for the sandboxes of containerd

All have busybox. Half of the data is pseudo-random, half is text; the same numbers give the same bytes. Nothing is kept in
memory, and no registry is needed: the layout is that of the distribution project's "filesystem" storage driver.
"""

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile

BUSYBOX = "/bin/busybox"
MB = 1000 * 1000
CHUNK = 64 << 10
TEXT = (b"The quick brown fox jumps over the lazy dog. " * (CHUNK // 45 + 1))[: CHUNK // 2]
TYPE = "application/vnd.oci.image."


class Data:
    """A file object of SIZE bytes, half random and half text."""

    def __init__(self, size, seed):
        self.left, self.random, self.chunk = size, random.Random(seed), b""

    def read(self, size):
        out = []
        while size and (self.left or self.chunk):
            if not self.chunk:
                self.chunk = (self.random.randbytes(CHUNK // 2) + TEXT)[: self.left]
                self.left -= len(self.chunk)
            out.append(self.chunk[:size])
            self.chunk = self.chunk[size:]
            size -= len(out[-1])
        return b"".join(out)


class Digest:
    """A writer that hashes and counts what goes through it."""

    def __init__(self, below=None):
        self.below, self.hash, self.size = below, hashlib.sha256(), 0

    def write(self, data):
        self.hash.update(data)
        self.size += len(data)
        if self.below:
            self.below.write(data)
        return len(data)

    def flush(self):
        pass

    def __str__(self):
        return "sha256:" + self.hash.hexdigest()


class Storage:
    def __init__(self, root):
        self.root = os.path.join(root, "registry/docker/registry/v2")

    def _write(self, path, data):
        path = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    def _publish(self, path, digest):
        place = os.path.join(self.root, f"blobs/sha256/{digest[7:9]}/{digest[7:]}")
        os.makedirs(place, exist_ok=True)
        os.replace(path, os.path.join(place, "data"))

    def blob(self, data):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._write(f"blobs/sha256/{digest[7:9]}/{digest[7:]}/data", data)
        return {"digest": digest, "size": len(data)}

    def layer(self, fill):
        """A layer that `fill` writes to a tar archive: its descriptor and its diff ID."""
        path = os.path.join(self.root, "new")
        os.makedirs(self.root, exist_ok=True)
        with open(path, "wb") as file:
            packed = Digest(file)
            with gzip.GzipFile("", "wb", 1, packed, 0) as pack:
                plain = Digest(pack)
                with tarfile.open(mode="w|", fileobj=plain, format=tarfile.GNU_FORMAT) as archive:
                    fill(archive)
        self._publish(path, str(packed))
        return {"mediaType": TYPE + "layer.v1.tar+gzip", "digest": str(packed), "size": packed.size}, str(plain)

    def image(self, name, tag, layers, command):
        config = self.blob(json.dumps({
            "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
            "config": {"Env": ["PATH=/bin"], "Entrypoint": command},
            "rootfs": {"type": "layers", "diff_ids": [diff for _, diff in layers]},
        }, sort_keys=True).encode())
        manifest = self.blob(json.dumps({
            "schemaVersion": 2, "mediaType": TYPE + "manifest.v1+json",
            "config": {"mediaType": TYPE + "config.v1+json", **config}, "layers": [layer for layer, _ in layers],
        }, sort_keys=True).encode())["digest"]
        place = f"repositories/bench/{name}"
        for blob in [config["digest"], *(layer["digest"] for layer, _ in layers)]:
            self._write(f"{place}/_layers/sha256/{blob[7:]}/link", blob.encode())
        for link in (f"revisions/sha256/{manifest[7:]}", f"tags/{tag}/current", f"tags/{tag}/index/sha256/{manifest[7:]}"):
            self._write(f"{place}/_manifests/{link}/link", manifest.encode())


def add(archive, name, size=0, seed=0, kind=tarfile.REGTYPE, link="", mode=0o755, content=None):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, size
    archive.addfile(info, content or (Data(size, seed) if size else None))


def base(archive):
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for name in ("bin", "dev", "etc", "proc", "root", "sys"):
        add(archive, name, kind=tarfile.DIRTYPE)
    add(archive, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)
    with open(BUSYBOX, "rb") as file:
        add(archive, "bin/busybox", os.path.getsize(BUSYBOX), content=file)
    for applet in sorted(set(applets) - {"busybox"}):
        add(archive, "bin/" + applet, kind=tarfile.SYMTYPE, link="busybox")


def several(size, seed):
    """Files of half a megabyte and a large one, SIZE bytes together."""

    def fill(archive):
        add(archive, f"data-{seed}", kind=tarfile.DIRTYPE)
        files = min(20, size // MB)
        for number in range(files):
            add(archive, f"data-{seed}/{number}", MB // 2, f"{seed}-{number}")
        add(archive, f"data-{seed}/large", size - files * (MB // 2), f"{seed}-large")

    return fill


def tree(archive, top, files, seed):
    sizes = random.Random(seed)
    add(archive, top, kind=tarfile.DIRTYPE)
    for number in range(files):
        if number % 100 == 0:
            directory = f"{top}/{number // 100}"
            add(archive, directory, kind=tarfile.DIRTYPE)
        content = TEXT[: sizes.randrange(3000)]
        add(archive, f"{directory}/file-{number}", len(content), content=io.BytesIO(content))


def small_tar(archive, files):
    plain = io.BytesIO()
    with tarfile.open(mode="w", fileobj=plain, format=tarfile.GNU_FORMAT) as inner:
        tree(inner, "tree", files, "tar")
    plain.seek(0)
    add(archive, "small.tar", len(plain.getbuffer()), content=plain)


def main():
    if len(sys.argv) != 7 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    pull, large, file, files, tar_files = (int(argument) for argument in sys.argv[2:])
    if pull < 20 or large < 20 or not all((file, files, tar_files)):
        sys.exit("bench images: PULL_MB and LARGE_MB are at least 20, the others at least 1")
    storage = Storage(sys.argv[1])
    bottom = storage.layer(base)
    shell = ["/bin/sleep", "2147483647"]
    each = pull * MB // 9
    middle = [storage.layer(several(each, f"pull-{number}")) for number in range(8)]
    for tag in ("1", "2"):
        last = storage.layer(several(each, "last-" + tag))
        storage.image("pull", tag, [bottom, *middle, last], shell)
    for name, size in (("small", 10), ("large", large)):
        storage.image(name, "latest", [bottom, storage.layer(several(size * MB, name))], shell)
    big = storage.layer(lambda archive: add(archive, "big", file * MB, "big"))
    many = storage.layer(lambda archive: tree(archive, "files", files, "files"))
    packed = storage.layer(lambda archive: small_tar(archive, tar_files))
    storage.image("work", "latest", [bottom, big, many, packed], shell)
    shared = storage.layer(lambda archive: add(archive, "big", 40 * MB, "shared"))
    storage.image("shared", "latest", [bottom, shared], shell)
    storage.image("pause", "latest", [bottom], shell)


main()
