//! Limits: CRI `LinuxContainerResources` to `linux.resources`.

use caisson_proto::cri;
use serde_json::{Map, Value, json};

use super::super::CriError;

/// `linux.resources` of these limits; what is zero or empty is not limited.
///
/// # Errors
/// INVALID_ARGUMENT for a negative or contradictory limit.
pub fn linux_resources(resources: &cri::LinuxContainerResources) -> Result<Value, CriError> {
    let mut cpu = Map::new();
    if resources.cpu_shares != 0 {
        cpu.insert(
            "shares".into(),
            unsigned("cpu_shares", resources.cpu_shares)?.into(),
        );
    }
    if resources.cpu_period != 0 {
        cpu.insert(
            "period".into(),
            unsigned("cpu_period", resources.cpu_period)?.into(),
        );
    }
    // A negative quota means none, as in the kernel's own interface.
    if resources.cpu_quota != 0 {
        cpu.insert("quota".into(), resources.cpu_quota.max(-1).into());
    }
    if !resources.cpuset_cpus.is_empty() {
        cpu.insert("cpus".into(), resources.cpuset_cpus.clone().into());
    }
    if !resources.cpuset_mems.is_empty() {
        cpu.insert("mems".into(), resources.cpuset_mems.clone().into());
    }
    let mut memory = Map::new();
    if resources.memory_limit_in_bytes != 0 {
        memory.insert(
            "limit".into(),
            resources.memory_limit_in_bytes.max(-1).into(),
        );
    }
    if resources.memory_swap_limit_in_bytes != 0 {
        let swap = resources.memory_swap_limit_in_bytes;
        if swap > 0 && swap < resources.memory_limit_in_bytes {
            return Err(CriError::invalid(format!(
                "memory_swap_limit_in_bytes ({swap}) counts memory and swap together and cannot be below memory_limit_in_bytes ({})",
                resources.memory_limit_in_bytes
            )));
        }
        memory.insert("swap".into(), swap.max(-1).into());
    }
    let mut all = Map::new();
    if !cpu.is_empty() {
        all.insert("cpu".into(), cpu.into());
    }
    if !memory.is_empty() {
        all.insert("memory".into(), memory.into());
    }
    // The kubelet names every page size of the host, most with a limit of 0; the guest may not have that size, and
    // without huge pages in it the limit holds by itself.
    let huge: Vec<Value> = resources
        .hugepage_limits
        .iter()
        .filter(|limit| limit.limit != 0)
        .map(|limit| json!({ "pageSize": limit.page_size, "limit": limit.limit }))
        .collect();
    if !huge.is_empty() {
        all.insert("hugepageLimits".into(), huge.into());
    }
    if !resources.unified.is_empty() {
        all.insert("unified".into(), json!(resources.unified));
    }
    Ok(all.into())
}

/// New limits over old ones: what the update leaves at zero or empty stays.
pub fn merge(
    old: &cri::LinuxContainerResources,
    update: &cri::LinuxContainerResources,
) -> cri::LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old } else { new }.clone();
    let mut unified = old.unified.clone();
    unified.extend(update.unified.clone());
    cri::LinuxContainerResources {
        cpu_period: number(update.cpu_period, old.cpu_period),
        cpu_quota: number(update.cpu_quota, old.cpu_quota),
        cpu_shares: number(update.cpu_shares, old.cpu_shares),
        memory_limit_in_bytes: number(update.memory_limit_in_bytes, old.memory_limit_in_bytes),
        oom_score_adj: number(update.oom_score_adj, old.oom_score_adj),
        cpuset_cpus: text(&update.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &old.cpuset_mems),
        hugepage_limits: if update.hugepage_limits.is_empty() {
            old.hugepage_limits.clone()
        } else {
            update.hugepage_limits.clone()
        },
        unified,
        memory_swap_limit_in_bytes: number(
            update.memory_swap_limit_in_bytes,
            old.memory_swap_limit_in_bytes,
        ),
    }
}

fn unsigned(field: &str, value: i64) -> Result<u64, CriError> {
    u64::try_from(value)
        .map_err(|_| CriError::invalid(format!("{field} is {value} and cannot be negative")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_carried_over_and_zeros_are_not() {
        let value = linux_resources(&cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 20,
            cpuset_cpus: "0-1".into(),
            hugepage_limits: vec![
                cri::HugepageLimit {
                    page_size: "2MB".into(),
                    limit: 4 << 20,
                },
                cri::HugepageLimit {
                    page_size: "1GB".into(),
                    limit: 0,
                },
            ],
            unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(
            value,
            json!({
                "cpu": { "shares": 512, "period": 100_000, "quota": 50_000, "cpus": "0-1" },
                "memory": { "limit": 1 << 20 },
                "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 << 20 }],
                "unified": { "memory.high": "1000" },
            })
        );
        assert_eq!(
            linux_resources(&cri::LinuxContainerResources::default()).unwrap(),
            json!({})
        );
    }

    #[test]
    fn impossible_limits_are_refused() {
        let negative = cri::LinuxContainerResources {
            cpu_shares: -1,
            ..Default::default()
        };
        assert!(linux_resources(&negative).is_err());
        let swap = cri::LinuxContainerResources {
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: 50,
            ..Default::default()
        };
        assert!(linux_resources(&swap).is_err());
    }

    #[test]
    fn an_update_leaves_what_it_does_not_name() {
        let old = cri::LinuxContainerResources {
            cpu_shares: 100,
            memory_limit_in_bytes: 7,
            ..Default::default()
        };
        let update = cri::LinuxContainerResources {
            memory_limit_in_bytes: 9,
            ..Default::default()
        };
        let merged = merge(&old, &update);
        assert_eq!((merged.cpu_shares, merged.memory_limit_in_bytes), (100, 9));
    }
}
