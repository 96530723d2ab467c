//! Runs CNI plugins as the CNI specification 1.1.0 says: a network configuration is a list of plugins, each an
//! executable that gets its part on standard input and answers on standard output.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::{NetworkError, PodIdentity};

/// The name of the interface that plugins make.
pub const INTERFACE: &str = "eth0";
/// The most bytes of a configuration file or a plugin's answer.
const MAX_JSON: u64 = 1 << 20;
/// The most plugins in a list.
const MAX_PLUGINS: usize = 32;
/// The versions of the CNI specification that are spoken.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

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

/// A network configuration list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NetworkList {
    #[serde(rename = "cniVersion", default = "first_version")]
    version: String,
    name: String,
    plugins: Vec<Map<String, Value>>,
}

/// What ADD left for DEL.
#[derive(Serialize, Deserialize)]
struct Cached {
    list: NetworkList,
    result: Value,
    port_mappings: Vec<PortMapping>,
}

fn first_version() -> String {
    VERSIONS[0].into()
}

/// Runs the plugins of the node's network.
#[derive(Clone, Debug)]
pub struct Cni {
    config: CniConfig,
}

impl Cni {
    /// CNI in these directories.
    pub fn new(config: CniConfig) -> Self {
        Self { config }
    }

    /// The network configuration that a pod would get now.
    ///
    /// # Errors
    /// [`NetworkError::NotConfigured`]: there is none, or the first one cannot be used, and why.
    pub fn load(&self) -> Result<NetworkList, NetworkError> {
        let dir = &self.config.conf_dir;
        let not_configured = |why: String| NetworkError::NotConfigured(why);
        let mut files: Vec<PathBuf> = fs::read_dir(dir)
            .map_err(|e| {
                not_configured(format!(
                    "{} cannot be read ({e}); put a .conflist file there",
                    dir.display()
                ))
            })?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|e| e == "conflist" || e == "conf" || e == "json")
            })
            .collect();
        files.sort();
        let file = files.first().ok_or_else(|| {
            not_configured(format!(
                "{} has no .conflist, .conf or .json file; put one there",
                dir.display()
            ))
        })?;
        let list =
            read_list(file).map_err(|why| not_configured(format!("{}: {why}", file.display())))?;
        for plugin in &list.plugins {
            self.find(plugin_type(plugin))
                .map_err(|why| not_configured(format!("{}: {why}", file.display())))?;
        }
        Ok(list)
    }

    /// Runs ADD of every plugin, in order. The result is kept for [`Cni::del`].
    ///
    /// # Errors
    /// [`NetworkError`]; the caller calls [`Cni::del`] to undo what was done.
    pub async fn add(&self, pod: &PodIdentity, netns: &Path) -> Result<(), NetworkError> {
        let list = self.load()?;
        // What DEL needs is on disk before anything is done that DEL must undo.
        let mut cached = Cached {
            list,
            result: Value::Null,
            port_mappings: pod.port_mappings.clone(),
        };
        self.save(&pod.id, &cached)?;
        for plugin in &cached.list.plugins {
            let input = self.input(&cached, plugin, &cached.result);
            let output = self.run("ADD", plugin, &input, pod, netns).await?;
            cached.result = output;
        }
        self.save(&pod.id, &cached)
    }

    /// Runs DEL of every plugin that ADD of this pod was begun with, in reverse order. Idempotent.
    ///
    /// # Errors
    /// The first plugin's failure, after all were run; it can be called again.
    pub async fn del(&self, pod: &PodIdentity, netns: &Path) -> Result<(), NetworkError> {
        let Some(cached) = self.restore(&pod.id)? else {
            return Ok(());
        };
        let mut failed = None;
        for plugin in cached.list.plugins.iter().rev() {
            let input = self.input(&cached, plugin, &cached.result);
            if let Err(error) = self.run("DEL", plugin, &input, pod, netns).await {
                failed.get_or_insert(error);
            }
        }
        match failed {
            Some(error) => Err(error),
            None => self.forget(&pod.id),
        }
    }

    /// A plugin's part of the configuration, as it gets it on standard input (CNI 1.1.0, section 3).
    fn input(&self, cached: &Cached, plugin: &Map<String, Value>, previous: &Value) -> Value {
        let mut input = plugin.clone();
        input.insert("cniVersion".into(), cached.list.version.clone().into());
        input.insert("name".into(), cached.list.name.clone().into());
        let wants = |capability: &str| {
            plugin
                .get("capabilities")
                .and_then(|c| c.get(capability))
                .and_then(Value::as_bool)
                .unwrap_or(false)
        };
        let mut runtime = Map::new();
        if wants("portMappings") && !cached.port_mappings.is_empty() {
            runtime.insert("portMappings".into(), json!(cached.port_mappings));
        }
        if !runtime.is_empty() {
            input.insert("runtimeConfig".into(), runtime.into());
        }
        input.remove("capabilities");
        if !previous.is_null() {
            input.insert("prevResult".into(), previous.clone());
        }
        input.into()
    }

    async fn run(
        &self,
        command: &'static str,
        plugin: &Map<String, Value>,
        input: &Value,
        pod: &PodIdentity,
        netns: &Path,
    ) -> Result<Value, NetworkError> {
        let name = plugin_type(plugin);
        let error = |cause: String| NetworkError::Plugin {
            plugin: name.to_owned(),
            command,
            id: pod.id.clone(),
            cause,
        };
        let path = self.find(name).map_err(&error)?;
        let result = tokio::time::timeout(
            self.config.timeout,
            self.execute(&path, command, input, pod, netns),
        )
        .await;
        match result {
            Err(_) => Err(error(format!(
                "it did not end within {} s and was killed",
                self.config.timeout.as_secs()
            ))),
            Ok(done) => done.map_err(error),
        }
    }

    async fn execute(
        &self,
        path: &Path,
        command: &str,
        input: &Value,
        pod: &PodIdentity,
        netns: &Path,
    ) -> Result<Value, String> {
        let search: Vec<_> = self
            .config
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            pod.namespace, pod.name, pod.id, pod.uid
        );
        let mut child = Command::new(path)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", search.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("{} cannot be run: {e}", path.display()))?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err("its standard streams are not there".into());
        };
        let write = async move {
            // A plugin that does not read its input says why by its exit status.
            let _ = stdin.write_all(input.to_string().as_bytes()).await;
        };
        let mut out = Vec::new();
        let mut err = Vec::new();
        let (mut stdout, mut stderr) = (stdout.take(MAX_JSON), stderr.take(MAX_JSON));
        let ((), read_out, read_err) = tokio::join!(
            write,
            stdout.read_to_end(&mut out),
            stderr.read_to_end(&mut err)
        );
        read_out.and(read_err).map_err(|e| e.to_string())?;
        let status = child.wait().await.map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(plugin_error(&out, &err, status));
        }
        if command == "DEL" || out.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&out).map_err(|e| format!("its answer is not JSON: {e}"))
    }

    /// The plugin's executable.
    fn find(&self, name: &str) -> Result<PathBuf, String> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(format!("{name:?} is not the name of a plugin"));
        }
        self.config
            .bin_dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| {
                let dirs: Vec<_> = self
                    .config
                    .bin_dirs
                    .iter()
                    .map(|d| d.display().to_string())
                    .collect();
                format!("plugin {name} is not in {}", dirs.join(" or "))
            })
    }

    fn cache_file(&self, id: &str) -> PathBuf {
        self.config.cache_dir.join(format!("{id}.json"))
    }

    fn save(&self, id: &str, cached: &Cached) -> Result<(), NetworkError> {
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.config.cache_dir)?;
            let file = self.cache_file(id);
            let new = file.with_extension("new");
            let mut out = fs::File::create(&new)?;
            io::Write::write_all(&mut out, &serde_json::to_vec(cached)?)?;
            out.sync_all()?;
            fs::rename(&new, &file)
        };
        write().map_err(|e| host("keep the CNI result", id, &e))
    }

    fn restore(&self, id: &str) -> Result<Option<Cached>, NetworkError> {
        let bytes = match fs::read(self.cache_file(id)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| host("read the CNI result", id, &e))?,
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| host("understand the kept CNI result", id, &e))
    }

    fn forget(&self, id: &str) -> Result<(), NetworkError> {
        match fs::remove_file(self.cache_file(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(host("forget the CNI result", id, &e))
            }
            _ => Ok(()),
        }
    }
}

fn host(step: &'static str, id: &str, cause: &dyn std::fmt::Display) -> NetworkError {
    NetworkError::Host {
        step,
        id: id.to_owned(),
        cause: cause.to_string(),
    }
}

fn plugin_type(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

/// Reads a list, or a single plugin's configuration as a list of one.
fn read_list(file: &Path) -> Result<NetworkList, String> {
    let size = fs::metadata(file).map_err(|e| e.to_string())?.len();
    if size > MAX_JSON {
        return Err(format!("it has {size} bytes, more than {MAX_JSON}"));
    }
    let text = fs::read(file).map_err(|e| e.to_string())?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| format!("not JSON: {e}"))?;
    let list: NetworkList = if value.get("plugins").is_some() {
        serde_json::from_value(value)
    } else {
        let version = value
            .get("cniVersion")
            .cloned()
            .unwrap_or_else(|| first_version().into());
        let name = value.get("name").cloned().unwrap_or(Value::Null);
        serde_json::from_value(json!({"cniVersion": version, "name": name, "plugins": [value]}))
    }
    .map_err(|e| format!("not a CNI network: {e}"))?;
    if !VERSIONS.contains(&list.version.as_str()) {
        return Err(format!(
            "cniVersion {} is not one of {}",
            list.version,
            VERSIONS.join(", ")
        ));
    }
    if list.plugins.is_empty() || list.plugins.len() > MAX_PLUGINS {
        return Err(format!(
            "it has {} plugins; 1 to {MAX_PLUGINS} are possible",
            list.plugins.len()
        ));
    }
    Ok(list)
}

/// A failed plugin's own words (CNI 1.1.0, section 5, "Error").
fn plugin_error(out: &[u8], err: &[u8], status: std::process::ExitStatus) -> String {
    if let Ok(error) = serde_json::from_slice::<HashMap<String, Value>>(out)
        && let Some(message) = error.get("msg").and_then(Value::as_str)
    {
        let details = error
            .get("details")
            .and_then(Value::as_str)
            .filter(|d| !d.is_empty())
            .map(|d| format!(" ({d})"))
            .unwrap_or_default();
        return format!("{message}{details}");
    }
    let text = String::from_utf8_lossy(err);
    match text.trim().lines().next_back() {
        Some(line) if !line.is_empty() => format!("{status}: {line}"),
        _ => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn cni(dir: &Path) -> Cni {
        for d in ["conf", "bin", "cache"] {
            fs::create_dir_all(dir.join(d)).unwrap();
        }
        Cni::new(CniConfig {
            conf_dir: dir.join("conf"),
            bin_dirs: vec![dir.join("bin")],
            cache_dir: dir.join("cache"),
            timeout: Duration::from_secs(2),
        })
    }

    fn plugin(dir: &Path, name: &str, script: &str) {
        let path = dir.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn pod() -> PodIdentity {
        PodIdentity {
            id: "p1".into(),
            port_mappings: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: "tcp".into(),
                host_ip: String::new(),
            }],
            ..PodIdentity::default()
        }
    }

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[
        {"type":"one"},{"type":"two","capabilities":{"portMappings":true}}]}"#;

    #[tokio::test]
    async fn results_go_from_plugin_to_plugin_and_back_at_del() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let cni = cni(dir);
        fs::write(dir.join("conf/10-a.conflist"), LIST).unwrap();
        let log = dir.join("log");
        let script = |answer: &str| {
            format!(
                "echo $CNI_COMMAND $CNI_IFNAME $(cat) >> {}; echo '{answer}'",
                log.display()
            )
        };
        plugin(dir, "one", &script(r#"{"from":"one"}"#));
        plugin(dir, "two", &script(r#"{"from":"two"}"#));
        cni.add(&pod(), Path::new("/ns")).await.unwrap();
        fs::remove_file(dir.join("conf/10-a.conflist")).unwrap();
        cni.del(&pod(), Path::new("/ns")).await.unwrap();
        cni.del(&pod(), Path::new("/ns")).await.unwrap();
        let log = fs::read_to_string(log).unwrap();
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), 4, "{log}");
        assert!(lines[0].starts_with("ADD eth0") && !lines[0].contains("prevResult"));
        assert!(lines[1].contains(r#""prevResult":{"from":"one"}"#));
        assert!(lines[1].contains(r#""hostPort":8080"#) && !lines[0].contains("hostPort"));
        assert!(lines[2].starts_with("DEL") && lines[2].contains(r#""type":"two""#));
        assert!(lines[3].contains(r#""prevResult":{"from":"two"}"#));
    }

    #[tokio::test]
    async fn a_failing_and_a_hanging_plugin_are_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let cni = cni(dir);
        fs::write(dir.join("conf/10-a.conflist"), LIST).unwrap();
        plugin(
            dir,
            "one",
            r#"echo '{"code":11,"msg":"no address left"}'; exit 1"#,
        );
        plugin(dir, "two", "exec sleep 60");
        let error = cni.add(&pod(), Path::new("/ns")).await.unwrap_err();
        assert!(error.to_string().contains("plugin one failed on ADD"));
        assert!(error.to_string().contains("no address left"), "{error}");
        plugin(dir, "one", "echo '{}'");
        let error = cni.add(&pod(), Path::new("/ns")).await.unwrap_err();
        assert!(error.to_string().contains("plugin two failed on ADD"));
        assert!(
            error.to_string().contains("did not end within 2 s"),
            "{error}"
        );
    }

    #[test]
    fn what_is_missing_is_said() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let cni = cni(dir);
        let say = |cni: &Cni| cni.load().unwrap_err().to_string();
        assert!(say(&cni).contains("has no .conflist"));
        fs::write(dir.join("conf/20-b.conf"), r#"{"name":"n","type":"one"}"#).unwrap();
        assert!(say(&cni).contains("plugin one is not in"));
        plugin(dir, "one", "");
        assert!(cni.load().is_ok());
        fs::write(dir.join("conf/10-a.conflist"), "{").unwrap();
        assert!(say(&cni).contains("not JSON"));
        let old = LIST.replace("1.0.0", "9.0.0");
        fs::write(dir.join("conf/10-a.conflist"), old).unwrap();
        assert!(say(&cni).contains("cniVersion 9.0.0"));
    }
}
