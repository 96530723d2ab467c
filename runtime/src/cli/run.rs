//! `caisson run`: a pod of one container, made by the calls that a kubelet makes.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;

use caisson_proto::{cli, cri};
use clap::Args;

use super::client::{CliError, Client, OWN_POD};
use super::session::{self, Session};
use super::{containers, images, options, terminal, timeline};

/// The period of CPU quotas, in microseconds.
const CPU_PERIOD: i64 = 100_000;

/// The arguments of `caisson run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Remove the pod when the command has ended.
    #[arg(long)]
    rm: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Do not wait: print the container's ID.
    #[arg(short, long, conflicts_with_all = ["rm", "tty", "interactive"])]
    detach: bool,
    /// The container's name; made up if it is not given.
    #[arg(long)]
    name: Option<String>,
    /// Set a variable of the environment.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = options::environment)]
    env: Vec<cri::KeyValue>,
    /// Show a directory or file of the host to the container.
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]", value_parser = options::volume)]
    volume: Vec<cri::Mount>,
    /// The most CPUs the container may use, such as 0.5; the virtual machine has as many, rounded up.
    #[arg(long, value_parser = options::cpus)]
    cpus: Option<u32>,
    /// The most memory the container may use, such as 256m; the virtual machine has a little more.
    #[arg(short, long, value_parser = options::bytes)]
    memory: Option<u64>,
    /// The working directory in the container.
    #[arg(short, long)]
    workdir: Option<String>,
    /// The user, as a name or number, with a group's number behind a colon.
    #[arg(short, long, value_parser = options::user)]
    user: Option<cri::LinuxContainerSecurityContext>,
    /// The pod's hostname; the container's name if it is not given.
    #[arg(long)]
    hostname: Option<String>,
    /// `cni`: the node's network. `none`: a loopback device only.
    #[arg(long, default_value = "cni", value_parser = ["cni", "none"])]
    network: String,
    /// The runtime handler; the daemon's default if it is not given.
    #[arg(long, default_value = "")]
    runtime: String,
    /// Make the container's root file system read-only.
    #[arg(long)]
    read_only: bool,
    /// Run another program than the image's entry point.
    #[arg(long)]
    entrypoint: Option<String>,
    /// Show how long each step of the start took.
    #[arg(long)]
    timings: bool,
    /// The image: a name, or an ID of `caisson images`.
    image: String,
    /// The command and its arguments; the image's own if there is none.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
}

/// Makes the pod, runs the command and passes its exit status through.
pub async fn run(client: &Client, args: RunArgs) -> Result<ExitCode, CliError> {
    if args.tty && !terminal::is_terminal() && args.interactive {
        return Err(CliError::Usage(
            "standard input is not a terminal; leave out -t".into(),
        ));
    }
    images::ensure(client, &args.image).await?;
    let suffix = format!("{:08x}", rand::random::<u32>());
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| format!("caisson-{suffix}"));
    let sandbox = sandbox_config(&args, &name, &suffix);
    let mut runtime = client.runtime.clone();
    let pod = runtime
        .run_pod_sandbox(cri::RunPodSandboxRequest {
            config: Some(sandbox.clone()),
            runtime_handler: args.runtime.clone(),
        })
        .await?
        .into_inner()
        .pod_sandbox_id;
    let result = run_in(client, &args, &name, &pod, sandbox).await;
    let failed_to_start = result.is_err();
    if args.rm || failed_to_start {
        containers::remove_pod(client, &pod).await?;
    } else if !args.detach {
        // Nothing runs in it any more: the machine's memory is given back, logs and status stay.
        containers::stop_pod(client, &pod).await?;
    }
    result.map_err(|error| match &error {
        CliError::Unexecutable { why, .. } => {
            eprintln!("caisson: {error}");
            CliError::Quiet(why.exit_status())
        }
        _ => error,
    })
}

async fn run_in(
    client: &Client,
    args: &RunArgs,
    name: &str,
    pod: &str,
    sandbox: cri::PodSandboxConfig,
) -> Result<ExitCode, CliError> {
    let mut runtime = client.runtime.clone();
    let container = runtime
        .create_container(cri::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(container_config(args, name)),
            sandbox_config: Some(sandbox),
        })
        .await?
        .into_inner()
        .container_id;
    if args.detach {
        runtime
            .start_container(cri::StartContainerRequest {
                container_id: container.clone(),
            })
            .await?;
        println!("{container}");
        if args.timings {
            timeline::print(client, pod).await?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let start = cli::StreamStart {
        container_id: container.clone(),
        stdin: args.interactive,
        tty: args.tty,
        start_container: true,
        ..cli::StreamStart::default()
    };
    let session = Session {
        stop: Some((client.clone(), container)),
        start,
    };
    let code = session::attach(client, session).await?;
    if args.timings {
        timeline::print(client, pod).await?;
    }
    Ok(code)
}

fn sandbox_config(args: &RunArgs, name: &str, suffix: &str) -> cri::PodSandboxConfig {
    let mut annotations = HashMap::new();
    if args.network == "none" {
        annotations.insert(
            crate::cri::pods::NETWORK_ANNOTATION.to_owned(),
            args.network.clone(),
        );
    }
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            // The daemon reserves name, namespace and UID together: this way a name is there once.
            uid: name.to_owned(),
            namespace: "caisson".to_owned(),
            attempt: 0,
        }),
        hostname: args.hostname.clone().unwrap_or_else(|| hostname(name)),
        log_directory: log_directory(name, suffix),
        labels: HashMap::from([(OWN_POD.to_owned(), "true".to_owned())]),
        annotations,
        linux: Some(cri::LinuxPodSandboxConfig {
            resources: Some(resources(args)),
            ..cri::LinuxPodSandboxConfig::default()
        }),
        ..cri::PodSandboxConfig::default()
    }
}

/// A name as a hostname: what DNS allows of it (RFC 1123), at most 63 bytes.
fn hostname(name: &str) -> String {
    let name: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(63)
        .collect();
    name.trim_matches('-').to_owned()
}

fn log_directory(name: &str, suffix: &str) -> String {
    Path::new(containers::LOG_ROOT)
        .join(format!("{name}_{suffix}"))
        .to_string_lossy()
        .into_owned()
}

fn resources(args: &RunArgs) -> cri::LinuxContainerResources {
    let mut resources = cri::LinuxContainerResources::default();
    if let Some(thousandths) = args.cpus {
        resources.cpu_period = CPU_PERIOD;
        resources.cpu_quota = i64::from(thousandths) * CPU_PERIOD / 1000;
    }
    if let Some(bytes) = args.memory {
        // The parser keeps it below 2^63.
        resources.memory_limit_in_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    }
    resources
}

fn container_config(args: &RunArgs, name: &str) -> cri::ContainerConfig {
    let mut security = args.user.clone().unwrap_or_default();
    security.readonly_rootfs = args.read_only;
    security.seccomp = Some(cri::SecurityProfile {
        profile_type: cri::security_profile::ProfileType::RuntimeDefault.into(),
        ..cri::SecurityProfile::default()
    });
    // A pod of one container: nobody to share the process namespace with.
    security.namespace_options = Some(cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        ..cri::NamespaceOption::default()
    });
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: args.image.clone(),
            ..cri::ImageSpec::default()
        }),
        command: args.entrypoint.iter().cloned().collect(),
        args: args.command.clone(),
        working_dir: args.workdir.clone().unwrap_or_default(),
        envs: args.env.clone(),
        mounts: args.volume.clone(),
        labels: HashMap::from([(OWN_POD.to_owned(), "true".to_owned())]),
        log_path: "container.log".to_owned(),
        stdin: args.interactive,
        stdin_once: args.interactive,
        tty: args.tty,
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources(args)),
            security_context: Some(security),
        }),
        ..cri::ContainerConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostname_is_what_dns_allows() {
        assert_eq!(hostname("a_b.c"), "a-b-c");
        assert_eq!(hostname("_x_"), "x");
        assert_eq!(hostname(&"y".repeat(80)).len(), 63);
    }
}
