//! AppArmor of the node's kernel: whether there is one, and the profile that containers on the host have by default.

use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Says whether the kernel confines by AppArmor.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// The profiles that are loaded, one a line: its name, and its mode in parentheses.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The name of the profile.
pub const DEFAULT_PROFILE: &str = "caisson-default";
/// The profile. Capabilities, system calls and device access are limited otherwise; this one keeps files and
/// interfaces of the kernel that belong to the host out of reach.
const PROFILE: &str = r"
profile caisson-default flags=(attach_disconnected,mediate_deleted) {
  capability,
  network,
  unix,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (send, receive) peer=caisson-default,
  ptrace (trace, read, tracedby, readby) peer=caisson-default,

  deny mount,
  deny pivot_root,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/kmem rwklx,
  deny /proc/mem rwklx,
  deny /proc/sys/kernel/{core_pattern,modprobe,hotplug,poweroff_cmd,usermodehelper/**} w,
  deny /proc/sys/{fs/binfmt_misc,vm}/** w,
  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
";

/// Whether the kernel confines by AppArmor.
pub async fn enabled() -> bool {
    let text = tokio::fs::read_to_string(ENABLED).await;
    text.is_ok_and(|text| text.trim() == "Y")
}

/// Loads the default profile, if it is not loaded.
///
/// # Errors
/// What apparmor_parser said, or that it is missing.
pub async fn load_default() -> io::Result<()> {
    let loaded = tokio::fs::read_to_string(LOADED).await.unwrap_or_default();
    let wanted = format!("{DEFAULT_PROFILE} (");
    if loaded.lines().any(|line| line.starts_with(&wanted)) {
        return Ok(());
    }
    let mut child = Command::new("apparmor_parser")
        .args(["--replace", "--skip-cache"])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| {
            io::Error::other(format!(
                "apparmor_parser (package apparmor) cannot be run: {e}"
            ))
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(PROFILE.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "apparmor_parser refused the profile {DEFAULT_PROFILE}: {}",
        said.trim()
    )))
}
