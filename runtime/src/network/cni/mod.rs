//! Runs CNI plugins as the CNI specification 1.1.0 says: a network configuration is a list of plugins, each an
//! executable that gets its part on standard input and answers on standard output.

mod cache;
mod list;
#[cfg(any(test, fuzzing))]
pub(crate) use list::fuzz as fuzz_list;
mod plugin;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{NetworkError, PodIdentity};
use crate::steps::{self, Step};
use cache::{Cache, Cached};
pub use list::{NetworkList, Seen};
use list::{Plugin, plugin_type};
use plugin::{Attachment, Plugins};

/// The name of the interface that plugins make.
pub const INTERFACE: &str = "eth0";
/// How long a plugin may take to say how it is.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// Where CNI's parts are.
#[derive(Clone, Debug)]
pub struct CniConfig {
    /// The directory of network configurations; the first one by name counts.
    pub conf_dir: PathBuf,
    /// Directories of plugins, searched in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Where the results of ADD are kept for DEL; survives a reboot, so that addresses are given back.
    pub cache_dir: PathBuf,
    /// How long one plugin may take.
    pub timeout: Duration,
}

/// A port of the pod on the host, for the portmap plugin.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The port on the host.
    pub host_port: u16,
    /// The port in the pod.
    pub container_port: u16,
    /// "tcp", "udp" or "sctp".
    pub protocol: String,
    /// The address on the host; empty: all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// Runs the plugins of the node's network.
#[derive(Clone, Debug)]
pub struct Cni {
    conf_dir: PathBuf,
    plugins: Plugins,
    cache: Cache,
    timeout: Duration,
}

impl Cni {
    /// CNI in these directories.
    pub fn new(config: CniConfig) -> Self {
        Self {
            conf_dir: config.conf_dir,
            plugins: Plugins::new(config.bin_dirs),
            cache: Cache::new(config.cache_dir),
            timeout: config.timeout,
        }
    }

    /// The network configuration that a pod would get now.
    ///
    /// # Errors
    /// [`NetworkError::NotConfigured`]: there is none, or the first one cannot be used, and why.
    pub fn load(&self) -> Result<NetworkList, NetworkError> {
        self.load_seen().map(|(list, _)| list)
    }

    /// The same, with what tells whether it has changed since.
    ///
    /// # Errors
    /// As [`Cni::load`].
    pub fn load_seen(&self) -> Result<(NetworkList, Seen), NetworkError> {
        let (file, list) = list::first(&self.conf_dir).map_err(NetworkError::NotConfigured)?;
        for plugin in &list.plugins {
            self.plugins
                .find(plugin_type(plugin))
                .map_err(|why| NetworkError::NotConfigured(format!("{}: {why}", file.display())))?;
        }
        Ok((list, Seen::now(&self.conf_dir, &file)))
    }

    /// Runs ADD of every plugin, in order. The result is kept for [`Cni::check`] and [`Cni::del`].
    ///
    /// # Errors
    /// [`NetworkError`]; the caller calls [`Cni::del`] to undo what was done.
    pub async fn add(&self, pod: &PodIdentity, netns: &Path) -> Result<(), NetworkError> {
        // What DEL needs is on disk before anything is done that DEL must undo.
        let mut cached = Cached::new(self.load()?, pod);
        self.cache.save(&pod.id, &cached)?;
        steps::done(Step::AttachmentKept);
        for plugin in &cached.list.plugins {
            let input = attached(&cached, plugin, &cached.result);
            let output = self.attach("ADD", plugin, &input, pod, netns).await?;
            cached.result = output;
        }
        self.cache.save(&pod.id, &cached)
    }

    /// Runs CHECK of every plugin with the result of ADD. Nothing is checked where the network's version has no CHECK or
    /// its configuration, then or now, does without.
    ///
    /// # Errors
    /// The first plugin that finds the pod's network other than it made it.
    pub async fn check(&self, pod: &PodIdentity, netns: &Path) -> Result<(), NetworkError> {
        let Some(cached) = self.cache.restore(&pod.id)? else {
            return Ok(());
        };
        let disabled_now = self
            .load()
            .is_ok_and(|now| now.name == cached.list.name && now.disable_check);
        if disabled_now || cached.list.disable_check || !cached.list.speaks("0.4.0") {
            return Ok(());
        }
        for plugin in &cached.list.plugins {
            let input = attached(&cached, plugin, &cached.result);
            self.attach("CHECK", plugin, &input, pod, netns).await?;
        }
        Ok(())
    }

    /// Runs DEL of every plugin that ADD of this pod was begun with, in reverse order. Idempotent.
    ///
    /// # Errors
    /// The first plugin's failure, after all were run; it can be called again.
    pub async fn del(&self, pod: &PodIdentity, netns: &Path) -> Result<(), NetworkError> {
        let Some(cached) = self.cache.restore(&pod.id)? else {
            return self.cache.forget(&pod.id);
        };
        let mut failed = None;
        for plugin in cached.list.plugins.iter().rev() {
            let input = attached(&cached, plugin, &cached.result);
            if let Err(error) = self.attach("DEL", plugin, &input, pod, netns).await {
                failed.get_or_insert(error);
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                steps::done(Step::AttachmentReleased);
                self.cache.forget(&pod.id)
            }
        }
    }

    /// Asks every plugin whether it could serve an ADD now (STATUS, since CNI 1.1.0; older networks are not asked).
    ///
    /// # Errors
    /// What the first one says that could not.
    pub async fn status(&self, list: &NetworkList) -> Result<(), NetworkError> {
        if !list.speaks("1.1.0") {
            return Ok(());
        }
        for plugin in &list.plugins {
            let input = described(list, plugin);
            let limit = STATUS_LIMIT.min(self.timeout);
            self.ask("STATUS", plugin, &input, limit).await?;
        }
        Ok(())
    }

    /// The pods whose attachments are kept here and not among those `known`.
    pub fn stale(&self, known: &HashSet<String>) -> Vec<PodIdentity> {
        let strangers = self
            .cache
            .ids()
            .into_iter()
            .filter(|id| !known.contains(id));
        strangers
            .filter_map(|id| match self.cache.restore(&id) {
                Ok(cached) => Some(cached?.pod(&id)),
                Err(error) => {
                    tracing::warn!(%error, "an attachment that no pod has cannot be released");
                    None
                }
            })
            .collect()
    }

    /// Lets every plugin release what it holds for others than these pods (GC, since CNI 1.1.0). Pods that are kept as
    /// attached to another network are none of this one's.
    ///
    /// # Errors
    /// The first plugin's failure, after all were run.
    pub async fn gc(&self, attached: &HashSet<String>) -> Result<(), NetworkError> {
        let list = self.load()?;
        if list.disable_gc || !list.speaks("1.1.0") {
            return Ok(());
        }
        let elsewhere = |id: &String| {
            let kept = self.cache.restore(id).ok().flatten();
            kept.is_some_and(|cached| cached.list.name != list.name)
        };
        let mut valid: Vec<_> = attached.iter().filter(|id| !elsewhere(id)).collect();
        valid.sort();
        let valid: Vec<_> = valid
            .into_iter()
            .map(|id| json!({ "containerID": id, "ifname": INTERFACE }))
            .collect();
        let mut failed = None;
        for plugin in &list.plugins {
            let mut input = described(&list, plugin);
            input.insert("cni.dev/valid-attachments".into(), valid.clone().into());
            if let Err(error) = self.ask("GC", plugin, &input, self.timeout).await {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether a pod's attachment is kept here.
    pub fn has(&self, id: &str) -> bool {
        matches!(self.cache.restore(id), Ok(Some(_)) | Err(_))
    }

    /// Runs a command that is about a pod's interface.
    async fn attach(
        &self,
        command: &'static str,
        plugin: &Plugin,
        input: &Map<String, Value>,
        pod: &PodIdentity,
        netns: &Path,
    ) -> Result<Value, NetworkError> {
        let name = plugin_type(plugin);
        let (input, attachment) = (input.clone().into(), Attachment { pod, netns });
        self.plugins
            .run(name, command, &input, Some(attachment), self.timeout)
            .await
            .map_err(|cause| NetworkError::Plugin {
                plugin: name.to_owned(),
                command,
                id: pod.id.clone(),
                cause,
            })
    }

    /// Runs a command that is about the network as a whole.
    async fn ask(
        &self,
        command: &'static str,
        plugin: &Plugin,
        input: &Map<String, Value>,
        limit: Duration,
    ) -> Result<(), NetworkError> {
        let name = plugin_type(plugin);
        let input = input.clone().into();
        let answer = self.plugins.run(name, command, &input, None, limit).await;
        answer.map(drop).map_err(|cause| NetworkError::Network {
            plugin: name.to_owned(),
            command,
            cause,
        })
    }
}

/// A plugin's part of the configuration, as every command has it (CNI 1.1.0, section 3).
fn described(list: &NetworkList, plugin: &Plugin) -> Map<String, Value> {
    let mut input = plugin.clone();
    input.insert("cniVersion".into(), list.version.clone().into());
    input.insert("name".into(), list.name.clone().into());
    input.remove("capabilities");
    input
}

/// The same for a command about a pod's interface, with the previous result and what the plugin can use of the pod.
fn attached(cached: &Cached, plugin: &Plugin, previous: &Value) -> Map<String, Value> {
    let mut input = described(&cached.list, plugin);
    let wants = |capability: &str| {
        plugin
            .get("capabilities")
            .and_then(|c| c.get(capability))
            .and_then(Value::as_bool)
            .unwrap_or(false)
    };
    if wants("portMappings") && !cached.port_mappings.is_empty() {
        let runtime = json!({ "portMappings": cached.port_mappings });
        input.insert("runtimeConfig".into(), runtime);
    }
    if !previous.is_null() {
        input.insert("prevResult".into(), previous.clone());
    }
    input
}

#[cfg(test)]
mod tests;
