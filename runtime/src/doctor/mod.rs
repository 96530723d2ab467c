//! What a node needs, and whether it is there: `caisson doctor`, and the daemon's own question whether KVM works.

pub mod pod;

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::Mutex;

use crate::config::{Config, VhostNet};
use crate::cri::CriError;
use crate::network::{Cni, CniConfig};
use crate::sandbox::microvm::vhost;

/// How long the probe may take.
const PROBE_LIMIT: Duration = Duration::from_secs(20);
/// How long a failure is remembered before KVM is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// What `caisson-vmm probe` says.
#[derive(Clone, Debug, Deserialize)]
pub struct Probe {
    /// Whether KVM runs guest code as fast as hardware does.
    pub works: bool,
    /// Why, in one sentence.
    pub reason: String,
}

/// Runs `caisson-vmm probe`, which runs guest instructions and looks at the time.
pub async fn probe(config: &Config) -> Probe {
    let no = |reason: String| Probe {
        works: false,
        reason,
    };
    let vmm = match config.vmm_path() {
        Ok(vmm) => vmm,
        Err(error) => return no(error.to_string()),
    };
    let run = tokio::process::Command::new(&vmm)
        .arg("probe")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PROBE_LIMIT, run).await {
        Err(_) => no(format!(
            "KVM is not usable: {} probe did not answer within {} s",
            vmm.display(),
            PROBE_LIMIT.as_secs()
        )),
        Ok(Err(error)) => no(format!("{} cannot be run: {error}", vmm.display())),
        Ok(Ok(output)) => read_probe(&output.stdout).unwrap_or_else(|| {
            no(format!(
                "{} probe answered nothing that can be understood: {}",
                vmm.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            ))
        }),
    }
}

fn read_probe(output: &[u8]) -> Option<Probe> {
    output
        .split(|byte| *byte == b'\n')
        .find_map(|line| serde_json::from_slice(line).ok())
}

/// Whether KVM works here, found out once and remembered.
pub struct KvmProbe {
    config: Config,
    last: Mutex<Option<(Instant, Probe)>>,
}

impl KvmProbe {
    /// Not asked yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            last: Mutex::new(None),
        }
    }

    /// What the probe says; a success holds for good, a failure for a moment.
    pub async fn get(&self) -> Probe {
        let mut last = self.last.lock().await;
        if let Some((at, probe)) = last.as_ref()
            && (probe.works || at.elapsed() < RETRY)
        {
            return probe.clone();
        }
        let probe = probe(&self.config).await;
        *last = Some((Instant::now(), probe.clone()));
        probe
    }

    /// That KVM works.
    ///
    /// # Errors
    /// FAILED_PRECONDITION that says why not.
    pub async fn require(&self) -> Result<(), CriError> {
        let probe = self.get().await;
        if probe.works {
            Ok(())
        } else {
            Err(CriError::precondition(format!(
                "no microVM can run on this node: {}",
                probe.reason
            )))
        }
    }
}

/// One thing a node needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// Whether it is there.
    pub good: bool,
    /// Which, or why not and what to do.
    pub detail: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = if self.good { "ok  " } else { "FAIL" };
        write!(f, "{mark}  {:<12}  {}", self.what, self.detail)
    }
}

/// `caisson doctor`: prints a line for each thing a node needs, or with `only_kvm` the one on KVM. Successful if all
/// that was asked about is there.
pub async fn doctor(config: &Config, only_kvm: bool) -> ExitCode {
    let good = if only_kvm {
        let probe = probe(config).await;
        println!("{}", probe.reason);
        probe.works
    } else {
        let findings = examine(config).await;
        for finding in &findings {
            println!("{finding}");
        }
        findings.iter().all(|finding| finding.good)
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Looks at everything that the daemon will need.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let probe = probe(config).await;
    let mut all = vec![Finding {
        what: "kvm",
        good: probe.works,
        detail: probe.reason,
    }];
    for (what, found) in [
        ("caisson-vmm", config.vmm_path()),
        ("kernel", config.kernel_path()),
        ("initramfs", config.initramfs_path()),
    ] {
        all.push(finding(what, found.map(|path| path.display().to_string())));
    }
    let cni = Cni::new(cni_config(config));
    all.push(finding(
        "cni",
        cni.load()
            .map(|_| format!("configured in {}", config.cni.conf_dir.display())),
    ));
    all.push(file(
        "cgroup v2",
        Path::new("/sys/fs/cgroup/cgroup.controllers"),
        "mount cgroup2 on /sys/fs/cgroup (boot with systemd.unified_cgroup_hierarchy=1)",
    ));
    all.push(file(
        "tun",
        Path::new("/dev/net/tun"),
        "load the kernel module tun",
    ));
    all.push(vhost_net(config, vhost::try_open().map(drop)));
    all.push(match in_path("mkfs.ext4") {
        Some(path) => Finding {
            what: "mkfs.ext4",
            good: true,
            detail: path.display().to_string(),
        },
        None => Finding {
            what: "mkfs.ext4",
            good: false,
            detail: "not found; install e2fsprogs".into(),
        },
    });
    all
}

/// Who carries pods' frames. That the kernel does not is no fault, unless it must.
fn vhost_net(config: &Config, device: std::io::Result<()>) -> Finding {
    let microvm = &config.microvm;
    let processes = "pods' processes carry their frames";
    let (good, detail) = match (microvm.vhost_net, device) {
        (VhostNet::Off, _) => (true, format!("{processes}: microvm.vhost_net is off")),
        (VhostNet::Auto, _) if microvm.limits_network() => {
            (true, format!("{processes}: there are limits on them"))
        }
        (VhostNet::Auto | VhostNet::On, Ok(())) => (true, vhost::DEVICE.to_owned()),
        (VhostNet::Auto, Err(error)) => (true, format!("{processes}: {error}")),
        (VhostNet::On, Err(error)) => (false, vhost::needed(&error)),
    };
    Finding {
        what: "vhost-net",
        good,
        detail,
    }
}

/// Where CNI's parts are, by the configuration.
pub fn cni_config(config: &Config) -> CniConfig {
    CniConfig {
        conf_dir: config.cni.conf_dir.clone(),
        bin_dirs: config.cni.bin_dirs.clone(),
        cache_dir: config.root.join("cni"),
        timeout: Duration::from_secs(u64::from(config.cni.timeout_seconds)),
    }
}

fn finding(what: &'static str, result: Result<String, impl std::fmt::Display>) -> Finding {
    let good = result.is_ok();
    Finding {
        what,
        good,
        detail: result.unwrap_or_else(|error| error.to_string()),
    }
}

fn file(what: &'static str, path: &Path, remedy: &str) -> Finding {
    let good = path.exists();
    Finding {
        what,
        good,
        detail: if good {
            path.display().to_string()
        } else {
            format!("{} is missing; {remedy}", path.display())
        },
    }
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_one_line_of_json() {
        let probe = read_probe(
            b"noise\n{\"works\":false,\"instructions\":1,\"microseconds\":2,\"reason\":\"slow\"}\n",
        )
        .unwrap();
        assert!(!probe.works);
        assert_eq!(probe.reason, "slow");
        assert!(read_probe(b"").is_none());
    }

    #[test]
    fn who_carries_frames_is_told() {
        let told = |text: &str, there: bool| {
            let config = Config::parse(text, Path::new("x")).unwrap();
            let device = match there {
                true => Ok(()),
                false => Err(std::io::Error::other("not there")),
            };
            let finding = vhost_net(&config, device);
            (finding.good, finding.detail)
        };
        assert!(told("", true).1.contains("is off"));
        let auto = "[microvm]\nvhost_net = \"auto\"";
        assert_eq!(told(auto, true), (true, vhost::DEVICE.to_owned()));
        let (good, detail) = told(auto, false);
        assert!(good && detail.contains("not there"), "{detail}");
        let (good, detail) = told(&format!("{auto}\nnet_packets_per_second = 1"), true);
        assert!(good && detail.contains("limits"), "{detail}");
        let (good, detail) = told("[microvm]\nvhost_net = \"on\"", false);
        assert!(!good && detail.contains("not there"), "{detail}");
        assert!(told("[microvm]\nvhost_net = \"on\"", true).0);
    }

    #[tokio::test]
    async fn a_missing_vmm_is_a_reason() {
        let mut config = Config::default();
        config.microvm.vmm = "/nonexistent/caisson-vmm".into();
        let probe = probe(&config).await;
        assert!(!probe.works);
        assert!(probe.reason.contains("/nonexistent/caisson-vmm"));
        let error = KvmProbe::new(config).require().await.unwrap_err();
        assert_eq!(error.code, tonic::Code::FailedPrecondition);
    }
}
