//! What ADD left for CHECK, DEL and GC: a file for each pod, on a disk that survives a reboot, so that addresses are
//! given back.

use std::path::PathBuf;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::{NetworkError, PodIdentity};
use super::PortMapping;
use super::list::NetworkList;

/// A pod's attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cached {
    /// The network as it was at ADD.
    pub list: NetworkList,
    /// The result of ADD, or what there is of it.
    pub result: Value,
    /// Ports mapped.
    pub port_mappings: Vec<PortMapping>,
    /// The rest of the pod's identity.
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
}

impl Cached {
    /// A pod's attachment before ADD.
    pub fn new(list: NetworkList, pod: &PodIdentity) -> Self {
        Self {
            list,
            result: Value::Null,
            port_mappings: pod.port_mappings.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
        }
    }

    /// The pod, for whom nobody else remembers it.
    pub fn pod(&self, id: &str) -> PodIdentity {
        PodIdentity {
            id: id.to_owned(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            port_mappings: self.port_mappings.clone(),
        }
    }
}

/// The directory of these files.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The cache in this directory.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn file(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// What becomes a pod's file when it is whole. A daemon that ends before leaves it.
    fn unfinished(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.new"))
    }

    /// Writes a pod's file.
    ///
    /// # Errors
    /// The disk's.
    pub fn save(&self, id: &str, cached: &Cached) -> Result<(), NetworkError> {
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            let (file, new) = (self.file(id), self.unfinished(id));
            let mut out = fs::File::create(&new)?;
            io::Write::write_all(&mut out, &serde_json::to_vec(cached)?)?;
            out.sync_all()?;
            fs::rename(&new, &file)
        };
        write().map_err(|e| host("keep the CNI result", id, &e))
    }

    /// Reads a pod's file; `None`: there is none.
    ///
    /// # Errors
    /// The disk's, or the file is damaged.
    pub fn restore(&self, id: &str) -> Result<Option<Cached>, NetworkError> {
        let bytes = match fs::read(self.file(id)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| host("read the CNI result", id, &e))?,
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| host("understand the kept CNI result", id, &e))
    }

    /// Removes a pod's file. Idempotent.
    ///
    /// # Errors
    /// The disk's.
    pub fn forget(&self, id: &str) -> Result<(), NetworkError> {
        for file in [self.unfinished(id), self.file(id)] {
            match fs::remove_file(file) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(host("forget the CNI result", id, &e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The pods that have a file.
    pub fn ids(&self) -> Vec<String> {
        fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".json").map(str::to_owned)
            })
            .collect()
    }
}

fn host(step: &'static str, id: &str, cause: &dyn std::fmt::Display) -> NetworkError {
    NetworkError::Host {
        step,
        id: id.to_owned(),
        cause: cause.to_string(),
    }
}
