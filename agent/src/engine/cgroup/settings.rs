//! From `linux.resources` to files of cgroup v2 and what to write to them.
//!
//! The scales differ: the specification has those of cgroup v1. The conversions are the ones runc documents
//! (docs/cgroup-v2.md), so that a pod gets the same share under every runtime.

use crate::engine::spec::{BlockIo, Cpu, LinuxResources, Memory, SpecError, ThrottleDevice};

/// One write to a file of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The file's name.
    pub file: String,
    /// What is written.
    pub value: String,
    /// The field of the spec it comes from.
    pub field: String,
    /// Whether the file may be missing.
    pub optional: bool,
}

fn setting(file: impl Into<String>, value: impl ToString, field: &str) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        field: format!("linux.resources.{field}"),
        optional: false,
    }
}

fn invalid(field: &str, reason: impl Into<String>) -> SpecError {
    SpecError::invalid(format!("linux.resources.{field}"), reason)
}

/// Everything to write for `resources`, in order.
///
/// # Errors
/// Names a field with a value that cannot be.
pub(crate) fn plan(resources: &LinuxResources) -> Result<Vec<Setting>, SpecError> {
    let mut out = Vec::new();
    if let Some(one) = &resources.memory {
        memory(one, &mut out)?;
    }
    if let Some(one) = &resources.cpu {
        cpu(one, &mut out)?;
    }
    if let Some(limit) = resources.pids.and_then(|pids| pids.limit) {
        out.push(setting("pids.max", limit_or_max(limit), "pids.limit"));
    }
    if let Some(one) = &resources.block_io {
        block_io(one, &mut out)?;
    }
    for limit in &resources.hugepage_limits {
        let field = "hugepageLimits";
        let number = limit.page_size.trim_end_matches(['K', 'M', 'G', 'B']);
        let unit = &limit.page_size[number.len()..];
        let digits = number.bytes().all(|byte| byte.is_ascii_digit());
        if number.is_empty() || !digits || !matches!(unit, "KB" | "MB" | "GB") {
            return Err(invalid(
                field,
                format!("{:?} is not a page size such as 2MB", limit.page_size),
            ));
        }
        let file = |suffix: &str| format!("hugetlb.{}.{suffix}", limit.page_size);
        out.push(setting(file("max"), limit.limit, field));
        // Reservations, where the kernel counts them.
        out.push(Setting {
            optional: true,
            ..setting(file("rsvd.max"), limit.limit, field)
        });
    }
    for (file, value) in &resources.unified {
        let plain = file
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
        // The core's own files move and kill processes; they are no limits.
        if !plain || !file.contains('.') || file.starts_with('.') || file.starts_with("cgroup.") {
            return Err(invalid(
                &format!("unified.{file}"),
                "is not a controller's file",
            ));
        }
        for line in value.lines() {
            out.push(setting(file, line, &format!("unified.{file}")));
        }
    }
    Ok(out)
}

fn limit_or_max(limit: i64) -> String {
    if limit <= 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn memory(memory: &Memory, out: &mut Vec<Setting>) -> Result<(), SpecError> {
    for (value, field) in [
        (memory.limit, "memory.limit"),
        (memory.swap, "memory.swap"),
        (memory.reservation, "memory.reservation"),
    ] {
        if value.is_some_and(|value| value < -1) {
            return Err(invalid(field, "is below -1"));
        }
    }
    // 0 is what encoders write for "not set".
    let limit = memory.limit.filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        out.push(setting("memory.max", limit_or_max(limit), "memory.limit"));
    }
    // Version 1 limits memory and swap together, version 2 swap alone.
    match (memory.swap.filter(|swap| *swap != 0), limit) {
        (None, Some(-1)) => {
            let unlimited = setting("memory.swap.max", "max", "memory.swap");
            out.push(Setting {
                optional: true,
                ..unlimited
            });
        }
        (None, _) => {}
        (Some(-1), _) => out.push(setting("memory.swap.max", "max", "memory.swap")),
        (Some(_), None | Some(-1)) => {
            return Err(invalid("memory.swap", "needs memory.limit"));
        }
        (Some(swap), Some(limit)) if swap < limit => {
            return Err(invalid("memory.swap", "is below memory.limit"));
        }
        (Some(swap), Some(limit)) => {
            out.push(setting("memory.swap.max", swap - limit, "memory.swap"));
        }
    }
    if let Some(low) = memory.reservation.filter(|low| *low != 0) {
        out.push(setting(
            "memory.low",
            limit_or_max(low),
            "memory.reservation",
        ));
    }
    Ok(())
}

/// cgroup v1's 2 to 262144 on cgroup v2's 1 to 10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// cgroup v1's 10 to 1000 on cgroup v2's 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight) - 10) * 9999 / 990
}

fn cpu(cpu: &Cpu, out: &mut Vec<Setting>) -> Result<(), SpecError> {
    // Idle first: the kernel takes no weight for an idle group.
    match cpu.idle {
        None => {}
        Some(idle @ 0..=1) => out.push(setting("cpu.idle", idle, "cpu.idle")),
        Some(_) => return Err(invalid("cpu.idle", "is not 0 or 1")),
    }
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0)
        && cpu.idle != Some(1)
    {
        out.push(setting(
            "cpu.weight",
            weight_of_shares(shares),
            "cpu.shares",
        ));
    }
    let (quota, period) = (
        cpu.quota.filter(|quota| *quota != 0),
        cpu.period.filter(|period| *period != 0),
    );
    if quota.is_some_and(|quota| quota < -1) {
        return Err(invalid("cpu.quota", "is below -1"));
    }
    if quota.is_some() || period.is_some() {
        let value = format!(
            "{} {}",
            limit_or_max(quota.unwrap_or(-1)),
            period.unwrap_or(100_000)
        );
        out.push(setting("cpu.max", value, "cpu.quota"));
    }
    if let Some(burst) = cpu.burst {
        out.push(setting("cpu.max.burst", burst, "cpu.burst"));
    }
    for (list, file, field) in [
        (&cpu.cpus, "cpuset.cpus", "cpu.cpus"),
        (&cpu.mems, "cpuset.mems", "cpu.mems"),
    ] {
        let ranges = list
            .bytes()
            .all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'-'));
        if !ranges {
            return Err(invalid(
                field,
                format!("{list:?} is not a list of ranges such as 0-2,7"),
            ));
        }
        if !list.is_empty() {
            out.push(setting(file, list, field));
        }
    }
    Ok(())
}

fn block_io(io: &BlockIo, out: &mut Vec<Setting>) -> Result<(), SpecError> {
    let checked = |weight: u16, field: &str| {
        if (10..=1000).contains(&weight) {
            Ok(io_weight(weight))
        } else {
            Err(invalid(
                field,
                format!("{weight} is not between 10 and 1000"),
            ))
        }
    };
    if let Some(weight) = io.weight.filter(|weight| *weight != 0) {
        let field = "blockIO.weight";
        out.push(setting("io.weight", checked(weight, field)?, field));
    }
    for device in &io.weight_device {
        let field = "blockIO.weightDevice";
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            let value = format!(
                "{}:{} {}",
                device.major,
                device.minor,
                checked(weight, field)?
            );
            out.push(setting("io.weight", value, field));
        }
    }
    let mut throttle = |devices: &[ThrottleDevice], key: &str, field: &str| {
        for device in devices {
            let rate = match device.rate {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let value = format!("{}:{} {key}={rate}", device.major, device.minor);
            out.push(setting("io.max", value, field));
        }
    };
    throttle(
        &io.throttle_read_bps_device,
        "rbps",
        "blockIO.throttleReadBpsDevice",
    );
    throttle(
        &io.throttle_write_bps_device,
        "wbps",
        "blockIO.throttleWriteBpsDevice",
    );
    throttle(
        &io.throttle_read_iops_device,
        "riops",
        "blockIO.throttleReadIOPSDevice",
    );
    throttle(
        &io.throttle_write_iops_device,
        "wiops",
        "blockIO.throttleWriteIOPSDevice",
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: &str) -> Vec<(String, String)> {
        let resources = serde_json::from_str(json).unwrap();
        plan(&resources)
            .unwrap()
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn refused(json: &str) -> String {
        plan(&serde_json::from_str(json).unwrap())
            .unwrap_err()
            .to_string()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn swap_is_what_exceeds_the_memory() {
        let with = |memory: &str| written(&format!(r#"{{"memory":{memory}}}"#));
        assert_eq!(
            with(r#"{"limit":100,"swap":100}"#),
            pairs(&[("memory.max", "100"), ("memory.swap.max", "0")])
        );
        assert_eq!(
            with(r#"{"limit":100,"swap":150,"reservation":50}"#),
            pairs(&[
                ("memory.max", "100"),
                ("memory.swap.max", "50"),
                ("memory.low", "50")
            ])
        );
        assert_eq!(
            with(r#"{"limit":-1,"swap":-1}"#),
            pairs(&[("memory.max", "max"), ("memory.swap.max", "max")])
        );
        assert_eq!(with(r#"{"limit":0,"swap":0}"#), []);
        assert!(refused(r#"{"memory":{"limit":100,"swap":50}}"#).contains("memory.swap"));
        assert!(refused(r#"{"memory":{"swap":50}}"#).contains("memory.swap"));
        assert!(refused(r#"{"memory":{"limit":-2}}"#).contains("memory.limit"));
    }

    #[test]
    fn shares_and_weights_reach_both_ends_of_the_scale() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(1), 1);
        assert_eq!(io_weight(10), 1);
        assert_eq!(io_weight(1000), 10_000);
    }

    #[test]
    fn cpu_limits() {
        let with = |cpu: &str| written(&format!(r#"{{"cpu":{cpu}}}"#));
        assert_eq!(
            with(r#"{"quota":50000,"period":100000,"shares":1024,"cpus":"0-1","burst":1000}"#),
            pairs(&[
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpu.max.burst", "1000"),
                ("cpuset.cpus", "0-1")
            ])
        );
        assert_eq!(
            with(r#"{"period":50000}"#),
            pairs(&[("cpu.max", "max 50000")])
        );
        assert_eq!(with(r#"{"quota":-1}"#), pairs(&[("cpu.max", "max 100000")]));
        assert_eq!(
            with(r#"{"idle":1,"shares":1024}"#),
            pairs(&[("cpu.idle", "1")])
        );
        assert!(refused(r#"{"cpu":{"cpus":"0\n1"}}"#).contains("cpu.cpus"));
    }

    #[test]
    fn pids_huge_pages_and_block_devices() {
        assert_eq!(
            written(r#"{"pids":{"limit":-1}}"#),
            pairs(&[("pids.max", "max")])
        );
        assert_eq!(
            written(r#"{"pids":{"limit":1}}"#),
            pairs(&[("pids.max", "1")])
        );
        assert_eq!(
            written(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#),
            pairs(&[
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304")
            ])
        );
        assert!(
            refused(r#"{"hugepageLimits":[{"pageSize":"../x","limit":1}]}"#)
                .contains("hugepageLimits")
        );
        assert_eq!(
            written(
                r#"{"blockIO":{"weight":1000,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1048576}],
                "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]}}"#
            ),
            pairs(&[
                ("io.weight", "10000"),
                ("io.max", "8:0 rbps=1048576"),
                ("io.max", "8:0 wiops=max")
            ])
        );
        assert!(refused(r#"{"blockIO":{"weight":5}}"#).contains("blockIO.weight"));
    }

    #[test]
    fn unified_files_are_a_controllers_own() {
        assert_eq!(
            written(r#"{"unified":{"memory.high":"1000","io.max":"8:0 rbps=1\n8:16 rbps=2"}}"#),
            pairs(&[
                ("io.max", "8:0 rbps=1"),
                ("io.max", "8:16 rbps=2"),
                ("memory.high", "1000")
            ])
        );
        for bad in [
            "../x.y",
            "cgroup.procs",
            "cgroup.kill",
            "memory",
            ".",
            "a/b.c",
        ] {
            let error = refused(&format!(r#"{{"unified":{{"{bad}":"1"}}}}"#));
            assert!(error.contains("unified"), "{error}");
        }
    }
}
