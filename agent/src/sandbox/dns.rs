//! `resolv.conf`, `hosts` and `hostname` of the pod, for the containers' bind mounts.

use std::fmt::Write;
use std::path::Path;

use super::{Context, Plan, SandboxError};
use crate::paths;

/// resolv.conf(5).
fn resolv_conf(plan: &Plan) -> String {
    let mut text = String::new();
    if !plan.dns_searches.is_empty() {
        let _ = writeln!(text, "search {}", plan.dns_searches.join(" "));
    }
    for server in &plan.dns_servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !plan.dns_options.is_empty() {
        let _ = writeln!(text, "options {}", plan.dns_options.join(" "));
    }
    text
}

/// What every pod's hosts file begins with.
pub const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// hosts(5), from its beginning on.
fn hosts(plan: &Plan, beginning: &str) -> String {
    let mut text = beginning.to_owned();
    if !plan.hostname.is_empty() {
        let addresses = plan
            .interfaces
            .iter()
            .flat_map(|interface| &interface.addresses);
        for address in addresses {
            let _ = writeln!(text, "{}\t{}", address.address, plan.hostname);
        }
    }
    text
}

/// Writes the three files; `hosts_beginning` comes before the pod's own addresses.
pub fn write(plan: &Plan, hosts_beginning: &str) -> Result<(), SandboxError> {
    let files = [
        ("resolv.conf", resolv_conf(plan)),
        ("hosts", hosts(plan, hosts_beginning)),
        ("hostname", format!("{}\n", plan.hostname)),
    ];
    for (name, text) in files {
        let path = Path::new(paths::SANDBOX).join(name);
        std::fs::write(&path, text).context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Cidr;
    use crate::sandbox::plan::Interface;

    #[test]
    fn contents() {
        let plan = Plan {
            hostname: "web-0".into(),
            dns_servers: vec!["10.0.0.10".parse().unwrap(), "fd00::a".parse().unwrap()],
            dns_searches: vec!["ns.svc.cluster.local".into(), "cluster.local".into()],
            dns_options: vec!["ndots:5".into()],
            interfaces: vec![Interface {
                current_mac: [0; 6],
                mac: [0; 6],
                name: "eth0".into(),
                mtu: None,
                addresses: vec![Cidr::parse("10.1.2.3/24").unwrap()],
            }],
            ..Plan::default()
        };
        assert_eq!(
            resolv_conf(&plan),
            "search ns.svc.cluster.local cluster.local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
        assert!(hosts(&plan, HOSTS).ends_with("\n10.1.2.3\tweb-0\n"));
        assert_eq!(resolv_conf(&Plan::default()), "");
    }
}
