//! Layers of no pattern, and what the kernel's own reader makes of their images.

use super::super::fuzzing;
use super::*;

/// Numbers of no pattern, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(256) as u8).collect()
    }
}

/// A tar stream with entries of every kind that may be taken, in any order, some of the same name.
fn random_tar(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut tar = Tar::default();
    let mut files: Vec<String> = Vec::new();
    for _ in 0..random.below(150) {
        let depth = random.below(3);
        let mut path: String = (0..depth)
            .map(|_| format!("d{}/", ["a", "b", "c"][random.below(3)]))
            .collect();
        path += &format!("{}{}", "n".repeat(random.below(200)), random.below(30));
        if random.below(3) == 0 {
            let count = random.below(3000);
            let value = random.bytes(count);
            let nanoseconds = random.below(1_000_000_000);
            tar = tar.pax(&[
                ("path", path.as_bytes()),
                ("SCHILY.xattr.user.x", &value),
                ("SCHILY.xattr.trusted.y", b"y"),
                (
                    "mtime",
                    format!("{}.{nanoseconds:09}", random.below(1 << 31)).as_bytes(),
                ),
                ("uid", random.below(1 << 31).to_string().as_bytes()),
            ]);
        } else if path.len() > 99 {
            tar = tar.pax(&[("path", path.as_bytes())]);
        }
        let short = &path[..path.len().min(99)];
        tar = match random.below(9) {
            0 => tar.dir(short, 0o755),
            1 => tar.symlink(short, &"t".repeat(1 + random.below(99))),
            2 if !files.is_empty() => {
                let target = files[random.below(files.len())].clone();
                tar.pax(&[("path", path.as_bytes()), ("linkpath", target.as_bytes())])
                    .hard_link("x", "x")
            }
            3 => tar.device(
                b'3',
                short,
                random.below(4096) as u32,
                random.below(1 << 20) as u32,
            ),
            4 => tar.raw(b'6', short, "", b"", 0o600),
            5 => tar.raw(b'0', short, "", b"", 0o4711),
            _ => {
                files.push(path.clone());
                let count = [0, 1, 2047, 2048, 2049, 4096, 4097, 70_000][random.below(8)];
                let data = random.bytes(count);
                tar.raw(b'0', short, "", &data, 0o640)
            }
        };
    }
    tar.end()
}

/// Mode, owner, group, time, links, and content.
type Shown = (u16, u32, u32, (i64, u32), u32, Vec<u8>);

/// What `stat` and the file itself show of everything below a mount point.
fn by_the_kernel(root: &std::path::Path) -> BTreeMap<Vec<u8>, Shown> {
    use std::os::unix::ffi::OsStrExt;
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut data = Vec::new();
        if meta.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if meta.is_file() {
            data = fs::read(&path).unwrap();
        } else if meta.is_symlink() {
            data = fs::read_link(&path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec();
        }
        let name = path
            .strip_prefix(root)
            .unwrap()
            .as_os_str()
            .as_bytes()
            .to_vec();
        let mtime = (meta.mtime(), meta.mtime_nsec() as u32);
        let what = (
            meta.mode() as u16,
            meta.uid(),
            meta.gid(),
            mtime,
            meta.nlink() as u32,
            data,
        );
        found.insert(name, what);
    }
    found
}

#[test]
fn the_kernel_reads_what_was_written() {
    let (mut taken, mut files) = (0, 0);
    for seed in 0..40 {
        let tar = random_tar(seed);
        let Some(read) = fuzzing::layer(&tar) else {
            continue; // a name below a file, say
        };
        taken += 1;
        files += read.len();
        let Some((_made, mounted)) = mount(&tar) else {
            return;
        };
        let kernel = by_the_kernel(&mounted.path(""));
        let ours: BTreeMap<_, _> = read
            .into_iter()
            .map(|(path, f)| (path, (f.mode, f.uid, f.gid, f.mtime, f.links, f.data)))
            .collect();
        assert_eq!(kernel.len(), ours.len(), "seed {seed}");
        for (path, what) in &ours {
            assert!(
                kernel.get(path) == Some(what),
                "seed {seed}: {:?}",
                String::from_utf8_lossy(path)
            );
        }
    }
    assert!(taken > 10 && files > 300, "{taken} layers, {files} files");
}

/// What the fuzzer begins with.
#[test]
fn the_seeds_of_the_fuzzer() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds/layer");
    let mut taken = 0;
    for entry in fs::read_dir(seeds).unwrap() {
        taken += usize::from(fuzzing::layer(&fs::read(entry.unwrap().path()).unwrap()).is_some());
    }
    assert!(taken >= 3, "{taken}");
}
