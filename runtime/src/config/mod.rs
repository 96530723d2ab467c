//! The daemon's configuration: one TOML file whose every key has a default.
//!
//! A missing file means the defaults; a key that is not known is an error that names it. The commented file that
//! `caisson config default` prints is made from [`Config::default`] and the table in [`keys`].

mod keys;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

pub use keys::default_file;

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/caisson/config.toml";

/// The most bytes a configuration file may have.
const MAX_FILE: u64 = 1 << 20;

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The directory of durable state: images, records, writable layers.
    pub root: PathBuf,
    /// The directory of run-time state: sockets, mounts. On a tmpfs, gone after a reboot.
    pub state: PathBuf,
    /// The unix socket on which CRI and the CLI's service are served.
    pub socket: PathBuf,
    /// What the daemon logs: a level, or a `tracing` filter such as "info,caisson::image=debug".
    pub log_level: String,
    /// The cgroup under which pods are accounted for when the client names none.
    pub cgroup_parent: String,
    /// Whether handlers of kind `host`, which run a pod without a VM, are allowed.
    pub allow_host: bool,
    /// The handler of a pod that asks for none.
    pub default_handler: String,
    /// Runtime handler names and the kind of sandbox each stands for.
    pub handlers: BTreeMap<String, HandlerKind>,
    /// How a pod's microVM is made.
    pub microvm: MicroVmConfig,
    /// How a pod on the host is made.
    pub host: HostSettings,
    /// CNI networking.
    pub cni: CniSettings,
    /// Images and registries.
    pub images: ImageSettings,
    /// The server of exec, attach and port-forward.
    pub streaming: StreamingSettings,
    /// Where traces go.
    pub telemetry: TelemetrySettings,
}

/// The kinds of sandbox.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerKind {
    /// A microVM of the pod's own.
    #[default]
    MicroVm,
    /// Processes of the host, for pods that cannot be in a VM.
    Host,
}

/// Where a microVM's writable layers go.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScratchKind {
    /// A sparse file on the host's disk.
    #[default]
    Disk,
    /// The guest's memory.
    Memory,
}

/// Whether the node's kernel carries pods' frames (vhost-net).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostNet {
    /// Pod processes do.
    #[default]
    Off,
    /// Where it can; pod processes do elsewhere, and where there are limits.
    Auto,
    /// It must: a pod that cannot have it does not start.
    On,
}

/// How a pod's microVM is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MicroVmConfig {
    /// The `caisson-vmm` program; empty: searched, see [`Config::vmm_path`].
    pub vmm: PathBuf,
    /// The guest kernel; empty: searched, see [`Config::kernel_path`].
    pub kernel: PathBuf,
    /// The initramfs that holds the agent; empty: searched, see [`Config::initramfs_path`].
    pub initramfs: PathBuf,
    /// Virtual CPUs of a pod without a CPU limit, 1 to 32.
    pub vcpus: u8,
    /// Memory in MiB of a pod without a memory limit.
    pub memory_mib: u32,
    /// MiB added to a pod's memory limit for the guest kernel and the agent.
    pub overhead_mib: u32,
    /// Where writable layers go.
    pub scratch: ScratchKind,
    /// The most GiB that all writable layers of a pod may hold.
    pub scratch_gib: u32,
    /// The first host user ID of pod processes, and the first group ID.
    pub first_user: u32,
    /// How many user IDs from there on are for pod processes: each pod has one.
    pub users: u32,
    /// Bytes that each disk of a pod reads and writes in a second at most; 0: no limit.
    pub disk_bytes_per_second: u64,
    /// Requests that each disk of a pod serves in a second at most; 0: no limit.
    pub disk_operations_per_second: u64,
    /// Bytes that a pod sends in a second at most, and as many that it receives; 0: no limit.
    pub net_bytes_per_second: u64,
    /// Frames that a pod sends in a second at most, and as many that it receives; 0: no limit.
    pub net_packets_per_second: u64,
    /// Whether the node's kernel carries pods' frames.
    pub vhost_net: VhostNet,
    /// Words added to the guest's kernel command line.
    pub kernel_cmdline_extra: String,
    /// Seconds that a guest may take from power-on until its agent answers, 1 to 3600.
    pub start_timeout_seconds: u32,
    /// Whether pods are clones of machines that were booted once.
    pub templates: bool,
    /// How many clones are started before their pods are known.
    pub ready_clones: u32,
}

/// How a pod on the host is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostSettings {
    /// The `caisson-agent` program; empty: searched, see [`Config::agent_path`].
    pub agent: PathBuf,
    /// The most GiB that all writable layers of a pod may hold on the host's disk.
    pub scratch_gib: u32,
}

/// CNI networking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniSettings {
    /// The directory of network configurations; the first file by name counts.
    pub conf_dir: PathBuf,
    /// The directories in which plugins are looked for, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Seconds that one call of a plugin may take.
    pub timeout_seconds: u32,
}

/// Images and registries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// The directory with `HOST/hosts.toml`, in containerd's format.
    pub certs_dir: PathBuf,
    /// The most GiB that one image may have when it is unpacked.
    pub max_unpacked_gib: u32,
    /// Layers that are fetched and unpacked at once, by all pulls together, 1 to 64.
    pub parallel_layers: u8,
    /// Seconds after which a pull that brings nothing is given up, 1 to 86400.
    pub progress_timeout_seconds: u32,
    /// Whether layers that registries do not distribute are fetched from the addresses in their manifest.
    pub foreign_layers: bool,
    /// Whether layers get fs-verity, so that one that is changed on the disk is noticed.
    pub verity: bool,
    /// Names of images that are never collected.
    pub pinned: Vec<String>,
    /// Registries whose images must be signed.
    pub policy: Vec<SignaturePolicy>,
}

/// Images of a registry must be signed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignaturePolicy {
    /// A registry's host, or a host with a path.
    pub registry: String,
    /// The file with the public key, in PEM (ECDSA P-256), as cosign writes it.
    pub cosign_key: PathBuf,
}

/// The server of exec, attach and port-forward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingSettings {
    /// Where it listens and what its URLs name; port 0 takes one that is free.
    pub address: SocketAddr,
    /// Seconds without a byte either way after which a client is cut off, 1 to 2592000 (30 days).
    pub idle_timeout_seconds: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/caisson".into(),
            state: "/run/caisson".into(),
            socket: "/run/caisson/caisson.sock".into(),
            log_level: "info".into(),
            cgroup_parent: "/caisson".into(),
            allow_host: false,
            default_handler: "microvm".into(),
            handlers: BTreeMap::from([
                ("microvm".to_owned(), HandlerKind::MicroVm),
                ("host".to_owned(), HandlerKind::Host),
            ]),
            microvm: MicroVmConfig::default(),
            host: HostSettings::default(),
            cni: CniSettings::default(),
            images: ImageSettings::default(),
            streaming: StreamingSettings::default(),
            telemetry: TelemetrySettings::default(),
        }
    }
}

impl Default for StreamingSettings {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            idle_timeout_seconds: 4 * 3600,
        }
    }
}

impl MicroVmConfig {
    /// The host users of pod processes.
    pub fn pod_users(&self) -> std::ops::Range<u32> {
        let end = self.first_user.saturating_add(self.users);
        self.first_user..end.saturating_sub(self.templates.into())
    }

    /// Whether what a pod sends and receives has a limit.
    pub fn limits_network(&self) -> bool {
        self.net_bytes_per_second != 0 || self.net_packets_per_second != 0
    }

    /// The host user of machines that become templates: the last one, which no pod has then.
    pub fn template_user(&self) -> u32 {
        self.first_user.saturating_add(self.users).saturating_sub(1)
    }
}

impl Default for MicroVmConfig {
    fn default() -> Self {
        Self {
            vmm: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            vcpus: 2,
            memory_mib: 512,
            overhead_mib: 128,
            scratch: ScratchKind::Disk,
            scratch_gib: 8,
            first_user: 1_900_000_000,
            users: 65_536,
            disk_bytes_per_second: 0,
            disk_operations_per_second: 0,
            net_bytes_per_second: 0,
            net_packets_per_second: 0,
            vhost_net: VhostNet::Off,
            kernel_cmdline_extra: String::new(),
            start_timeout_seconds: 120,
            templates: false,
            ready_clones: 0,
        }
    }
}

/// Where traces go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetrySettings {
    /// The address of an OpenTelemetry collector (OTLP over gRPC), such as `http://127.0.0.1:4317`; empty: none.
    pub endpoint: String,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self {
            agent: PathBuf::new(),
            scratch_gib: 8,
        }
    }
}

impl Default for CniSettings {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            timeout_seconds: 60,
        }
    }
}

impl Default for ImageSettings {
    fn default() -> Self {
        Self {
            certs_dir: "/etc/caisson/certs.d".into(),
            max_unpacked_gib: 64,
            parallel_layers: 3,
            progress_timeout_seconds: 300,
            foreign_layers: false,
            verity: false,
            pinned: Vec::new(),
            policy: Vec::new(),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read the configuration {path}: {cause}; mend it or name another one with --config"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The file is not what it should be.
    #[error(
        "the configuration {path} is not valid: {cause}; `caisson config default` prints every key"
    )]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the key's name.
        cause: String,
    },
    /// A value cannot be used.
    #[error("the configuration key {key} is not usable: {cause}")]
    Value {
        /// The key.
        key: &'static str,
        /// Why, and what would be.
        cause: String,
    },
    /// A file that the daemon needs is nowhere.
    #[error(
        "no {what} was found (looked at {looked}); build it with scripts/build or set {key} in the configuration"
    )]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Where it was looked for.
        looked: String,
        /// The key that would name it.
        key: &'static str,
    },
}

impl Config {
    /// Reads the file that the command line named, or the usual one.
    ///
    /// # Errors
    /// A named file that is missing, an unreadable or invalid file, an unknown key, a value out of range.
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        let read = |cause: std::io::Error| ConfigError::Read {
            path: path.to_owned(),
            cause: cause.to_string(),
        };
        match std::fs::metadata(path) {
            Ok(meta) if meta.len() > MAX_FILE => {
                return Err(read(std::io::Error::other("it is larger than 1 MiB")));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                return Ok(Self::default());
            }
            Err(error) => return Err(read(error)),
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Parses a configuration; `path` is for messages.
    ///
    /// # Errors
    /// See [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            cause: error.to_string().trim().replace('\n', " "),
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let value = |key, cause: &str| {
            Err(ConfigError::Value {
                key,
                cause: cause.to_owned(),
            })
        };
        for (key, path) in [
            ("root", &self.root),
            ("state", &self.state),
            ("socket", &self.socket),
            ("cni.conf_dir", &self.cni.conf_dir),
            ("images.certs_dir", &self.images.certs_dir),
        ] {
            if !path.is_absolute() {
                return value(key, "it must be an absolute path");
            }
        }
        if !(1..=32).contains(&self.microvm.vcpus) {
            return value("microvm.vcpus", "a microVM has 1 to 32 virtual CPUs");
        }
        if !(64..=1_048_576).contains(&self.microvm.memory_mib) {
            return value("microvm.memory_mib", "a microVM has 64 to 1048576 MiB");
        }
        if self.microvm.overhead_mib > 65_536 {
            return value("microvm.overhead_mib", "the overhead is at most 65536 MiB");
        }
        for (key, scratch_gib) in [
            ("microvm.scratch_gib", self.microvm.scratch_gib),
            ("host.scratch_gib", self.host.scratch_gib),
        ] {
            if !(1..=65_536).contains(&scratch_gib) {
                return value(key, "writable layers get 1 to 65536 GiB");
            }
        }
        if !(1..=3600).contains(&self.microvm.start_timeout_seconds) {
            return value(
                "microvm.start_timeout_seconds",
                "a guest has 1 to 3600 seconds to start",
            );
        }
        if !(1..=600).contains(&self.cni.timeout_seconds) {
            return value("cni.timeout_seconds", "a plugin has 1 to 600 seconds");
        }
        if self.microvm.first_user == 0 {
            return value("microvm.first_user", "the pod process never runs as root");
        }
        if self.microvm.vhost_net == VhostNet::On && self.microvm.limits_network() {
            return value(
                "microvm.vhost_net",
                "the node's kernel keeps to no limit: with net_bytes_per_second or net_packets_per_second it is auto or off",
            );
        }
        let end = self.microvm.first_user.checked_add(self.microvm.users);
        if self.microvm.pod_users().is_empty() || end.is_none() {
            return value(
                "microvm.users",
                "each pod has a user, templates have one, and user IDs end at 4294967294",
            );
        }
        if self.microvm.ready_clones > 0 && !self.microvm.templates {
            return value(
                "microvm.ready_clones",
                "they are clones of a template, so templates must be true",
            );
        }
        if !(1..=64).contains(&self.images.parallel_layers) {
            return value("images.parallel_layers", "1 to 64 layers come at once");
        }
        if !(1..=86_400).contains(&self.images.progress_timeout_seconds) {
            return value(
                "images.progress_timeout_seconds",
                "a pull may bring nothing for 1 to 86400 seconds",
            );
        }
        if self.streaming.address.ip().is_unspecified() {
            return value(
                "streaming.address",
                "URLs name it, so it must be one address that the kubelet can dial, such as 127.0.0.1:0",
            );
        }
        if !(1..=2_592_000).contains(&self.streaming.idle_timeout_seconds) {
            return value(
                "streaming.idle_timeout_seconds",
                "an idle client is cut off after 1 to 2592000 seconds",
            );
        }
        let endpoint = &self.telemetry.endpoint;
        if !endpoint.is_empty() && !is_collector(endpoint) {
            return value(
                "telemetry.endpoint",
                "it must be the http:// address of a collector that takes OTLP over gRPC without TLS, such as http://127.0.0.1:4317",
            );
        }
        if !self.handlers.contains_key(&self.default_handler) {
            return value(
                "default_handler",
                "it must be one of the names in [handlers]",
            );
        }
        Ok(())
    }

    /// What a handler name stands for; an empty name is the default handler.
    pub fn handler(&self, name: &str) -> Option<HandlerKind> {
        let name = if name.is_empty() {
            &self.default_handler
        } else {
            name
        };
        self.handlers.get(name).copied()
    }

    /// The handlers that pods may have: those of kind `host` only where they are allowed.
    pub fn usable_handlers(&self) -> impl Iterator<Item = (&str, HandlerKind)> {
        self.handlers
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .filter(|(_, kind)| *kind != HandlerKind::Host || self.allow_host)
    }

    /// Whether any handler that pods may have is of this kind.
    pub fn uses(&self, kind: HandlerKind) -> bool {
        self.usable_handlers().any(|(_, one)| one == kind)
    }

    /// What to tell a person whose pod cannot be in a microVM.
    pub fn host_hint(&self) -> String {
        let host = |(_, kind): &(&str, HandlerKind)| *kind == HandlerKind::Host;
        match self.usable_handlers().find(host) {
            Some((name, _)) => {
                format!("give the pod a runtime class with the handler `{name}`, which runs it on the host")
            }
            None => {
                "it needs a handler of kind `host`, which runs pods on the host: set allow_host = true in the configuration to have the handler `host`".into()
            }
        }
    }

    /// The `caisson-agent` program for pods on the host, searched as [`Config::vmm_path`].
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the places that were looked at.
    pub fn agent_path(&self) -> Result<PathBuf, ConfigError> {
        find(
            "agent (caisson-agent)",
            "host.agent",
            &self.host.agent,
            &["caisson-agent"],
        )
    }

    /// The `caisson-vmm` program: as configured, or beside this executable, or in /usr/lib/caisson.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the places that were looked at.
    pub fn vmm_path(&self) -> Result<PathBuf, ConfigError> {
        find(
            "pod process (caisson-vmm)",
            "microvm.vmm",
            &self.microvm.vmm,
            &["caisson-vmm"],
        )
    }

    /// The guest kernel, searched as [`Config::vmm_path`] under the names vmlinux and bzImage.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the places that were looked at.
    pub fn kernel_path(&self) -> Result<PathBuf, ConfigError> {
        find(
            "guest kernel",
            "microvm.kernel",
            &self.microvm.kernel,
            &["vmlinux", "bzImage"],
        )
    }

    /// The guest's initramfs, searched as [`Config::vmm_path`] under the name initramfs.cpio.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the places that were looked at.
    pub fn initramfs_path(&self) -> Result<PathBuf, ConfigError> {
        find(
            "initramfs",
            "microvm.initramfs",
            &self.microvm.initramfs,
            &["initramfs.cpio"],
        )
    }
}

/// Where this program is. It does not change, and each Status call asks for it.
static OWN_DIRECTORY: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    let program = std::env::current_exe().ok()?;
    program.parent().map(Path::to_owned)
});

/// Looks for a file: the configured one only, or by name beside the executable and in /usr/lib/caisson.
fn find(
    what: &'static str,
    key: &'static str,
    configured: &Path,
    names: &[&str],
) -> Result<PathBuf, ConfigError> {
    let candidates: Vec<PathBuf> = if configured.as_os_str().is_empty() {
        let own = OWN_DIRECTORY.as_deref();
        own.map(Path::to_owned)
            .into_iter()
            .chain([PathBuf::from("/usr/lib/caisson")])
            .flat_map(|dir| names.iter().map(move |name| dir.join(name)))
            .collect()
    } else {
        vec![configured.to_owned()]
    };
    candidates
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or_else(|| ConfigError::Missing {
            what,
            key,
            looked: candidates
                .iter()
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
                .join(", "),
        })
}

fn is_collector(endpoint: &str) -> bool {
    endpoint
        .parse()
        .is_ok_and(|uri: http::Uri| uri.scheme_str() == Some("http") && uri.authority().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named() {
        let error = Config::parse("[microvm]\nvcpu = 2\n", Path::new("x.toml")).unwrap_err();
        assert!(error.to_string().contains("vcpu"), "{error}");
        let error = Config::parse("rooot = \"/x\"\n", Path::new("x.toml")).unwrap_err();
        assert!(error.to_string().contains("rooot"), "{error}");
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (text, key) in [
            ("[microvm]\nvcpus = 0", "microvm.vcpus"),
            ("[microvm]\nvcpus = 33", "microvm.vcpus"),
            ("[microvm]\nmemory_mib = 1", "microvm.memory_mib"),
            ("[microvm]\nfirst_user = 0", "microvm.first_user"),
            ("[microvm]\nusers = 0", "microvm.users"),
            ("[microvm]\nusers = 4294967295", "microvm.users"),
            (
                "[microvm]\nvhost_net = \"on\"\nnet_packets_per_second = 1",
                "microvm.vhost_net",
            ),
            (
                "[telemetry]\nendpoint = \"https://node:4317\"",
                "telemetry.endpoint",
            ),
            (
                "[telemetry]\nendpoint = \"127.0.0.1:4317\"",
                "telemetry.endpoint",
            ),
            ("root = \"relative\"", "root"),
            ("[images]\nparallel_layers = 0", "images.parallel_layers"),
            (
                "[images]\nprogress_timeout_seconds = 0",
                "images.progress_timeout_seconds",
            ),
            ("[images]\ncerts_dir = \"x\"", "images.certs_dir"),
            ("[streaming]\naddress = \"0.0.0.0:1\"", "streaming.address"),
            (
                "[streaming]\nidle_timeout_seconds = 0",
                "streaming.idle_timeout_seconds",
            ),
            ("default_handler = \"gvisor\"", "default_handler"),
        ] {
            let error = Config::parse(text, Path::new("x.toml")).unwrap_err();
            assert!(error.to_string().contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error_only_when_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.toml");
        assert!(matches!(
            Config::load(Some(&path)),
            Err(ConfigError::Read { .. })
        ));
    }

    #[test]
    fn handlers_are_looked_up_by_name() {
        let config = Config::default();
        assert_eq!(config.handler(""), Some(HandlerKind::MicroVm));
        assert_eq!(config.handler("microvm"), Some(HandlerKind::MicroVm));
        assert_eq!(config.handler("runc"), None);
        let config = Config::parse(
            "[handlers]\nmicrovm = \"microvm\"\nhost = \"host\"",
            Path::new("x"),
        )
        .unwrap();
        assert_eq!(config.handler("host"), Some(HandlerKind::Host));
    }

    #[test]
    fn the_host_is_hinted_at_by_a_name_that_would_do() {
        let hint = |text: &str| Config::parse(text, Path::new("x")).unwrap().host_hint();
        assert!(hint("").contains("allow_host = true"));
        assert!(hint("allow_host = true").contains("handler `host`,"));
        let named = "allow_host = true\n[handlers]\nmicrovm = \"microvm\"\nnode-agents = \"host\"";
        assert!(hint(named).contains("handler `node-agents`,"));
        let names = |config: &Config| {
            let all = config.usable_handlers();
            all.map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&Config::default()), ["microvm"]);
        let allowed = Config::parse("allow_host = true", Path::new("x")).unwrap();
        assert_eq!(names(&allowed), ["host", "microvm"]);
    }

    #[test]
    fn a_missing_kernel_says_where_it_was_looked_for() {
        let mut config = Config::default();
        config.microvm.kernel = "/nonexistent/vmlinux".into();
        let error = config.kernel_path().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/vmlinux"), "{error}");
        assert!(error.contains("microvm.kernel"), "{error}");
    }
}
