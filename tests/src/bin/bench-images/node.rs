//! The node under both: its page cache, its registry's log, its pod processes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use caisson_tests::runtime::Result;

/// Drops clean page cache, directory entries and inodes, as after a boot.
pub fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

/// Bytes of files in the page cache.
pub fn page_cache() -> Result<u64> {
    field(Path::new("/proc/meminfo"), "Cached:")
}

/// The processes with this name, and the memory that they have together: each shared page counts for its share.
pub fn memory_of(name: &str) -> Result<(usize, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for path in processes(name)? {
        count += 1;
        bytes += field(&path.join("smaps_rollup"), "Pss:")?;
    }
    Ok((count, bytes))
}

/// A file of the store that pod processes have open.
pub struct OpenLayer {
    /// How many of them.
    pub processes: usize,
    /// Bytes of it in the page cache.
    pub cached: u64,
}

/// The layers that processes with this name have open, each file once.
pub fn open_layers(name: &str) -> Result<Vec<OpenLayer>> {
    let mut found: BTreeMap<(u64, u64), (PathBuf, BTreeSet<PathBuf>)> = BTreeMap::new();
    for process in processes(name)? {
        for entry in fs::read_dir(process.join("fd"))? {
            let link = entry?.path();
            let target = fs::read_link(&link).unwrap_or_default();
            if target
                .extension()
                .is_none_or(|extension| extension != "erofs")
            {
                continue;
            }
            let file = fs::metadata(&link)?;
            let layer = found.entry((file.dev(), file.ino()));
            let (_, users) = layer.or_insert_with(|| (link, BTreeSet::new()));
            users.insert(process.clone());
        }
    }
    let layers = found.into_values().map(|(link, users)| {
        let told = Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .arg(&link)
            .output()?;
        let said = String::from_utf8(told.stdout)?;
        let cached = said.trim().parse();
        Ok(OpenLayer {
            processes: users.len(),
            cached: cached.map_err(|_| format!("fincore says of {}: {said:?}", link.display()))?,
        })
    });
    layers.collect()
}

/// The directories in /proc of the processes with this name.
fn processes(name: &str) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            all.push(path);
        }
    }
    Ok(all)
}

/// A figure in kB of a file of the kernel's.
fn field(path: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let figure = line.and_then(|rest| rest.split_whitespace().next());
    let figure = figure.ok_or_else(|| format!("{} has no {name}", path.display()))?;
    Ok(figure.parse::<u64>()? * 1024)
}

/// What the registry has sent, by its log.
pub struct Registry<'a> {
    log: &'a Path,
    from: usize,
}

impl<'a> Registry<'a> {
    /// From now on.
    pub fn watch(log: &'a Path) -> Result<Self> {
        Ok(Self {
            from: fs::read(log)?.len(),
            log,
        })
    }

    /// The number of blobs and the bytes of them since.
    pub fn sent(&self) -> Result<(usize, u64)> {
        let log = fs::read(self.log)?;
        let (mut count, mut bytes) = (0, 0);
        for line in log[self.from..].split(|byte| *byte == b'\n') {
            let Ok(entry) = serde_json::from_slice::<serde_json::Value>(line) else {
                continue;
            };
            let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
            let blob = text("http.request.uri").contains("/blobs/");
            if text("msg") == "response completed" && text("http.request.method") == "GET" && blob {
                count += 1;
                bytes += entry["http.response.written"].as_u64().unwrap_or(0);
            }
        }
        Ok((count, bytes))
    }
}
