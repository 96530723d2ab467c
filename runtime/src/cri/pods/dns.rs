//! How a pod resolves names.

use std::net::IpAddr;

use caisson_proto::cri;

use crate::sandbox::Dns;

/// The node's own resolver configuration: first where systemd-resolved keeps the real one.
const NODE: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
/// The most bytes of such a file.
const MAX_FILE: u64 = 64 << 10;
/// The most name servers that a resolver looks at (resolv.conf(5), MAXNS).
const MAX_SERVERS: usize = 3;

/// What the client asked for; the node's own where it asked for nothing. A pod `on_host_network` reaches what the node
/// does.
pub async fn of(config: &cri::PodSandboxConfig, on_host_network: bool) -> Dns {
    if let Some(dns) = config.dns_config.clone() {
        return Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        };
    }
    for path in NODE {
        let small = tokio::fs::metadata(path)
            .await
            .is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE);
        if small && let Ok(text) = tokio::fs::read_to_string(path).await {
            return parse(&text, on_host_network);
        }
    }
    Dns::default()
}

/// Reads a resolv.conf(5). A server on the node's loopback device is not reachable from a pod and left out, unless
/// the `loopback` device is the pod's too.
fn parse(text: &str, loopback: bool) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let key = words.next();
        let values = words.map(str::to_owned);
        match key {
            Some("nameserver") => dns.servers.extend(values.take(1).filter(|server| {
                server
                    .parse::<IpAddr>()
                    .is_ok_and(|address| loopback || !address.is_loopback())
            })),
            Some("search" | "domain") => dns.searches = values.collect(),
            Some("options") => dns.options.extend(values),
            _ => {}
        }
    }
    dns.servers.truncate(MAX_SERVERS);
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_resolv_conf_is_taken_over_as_far_as_a_pod_can_use_it() {
        let dns = parse(
            "# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.2 ; here\nnameserver fe80::1%eth0\n\
             nameserver 2001:db8::1\nsearch a.example b.example\noptions ndots:2 timeout:1\nbogus\n",
            false,
        );
        assert_eq!(dns.servers, ["10.0.0.2", "2001:db8::1"]);
        assert_eq!(dns.searches, ["a.example", "b.example"]);
        assert_eq!(dns.options, ["ndots:2", "timeout:1"]);
        assert_eq!(parse("nameserver 127.0.0.53", true).servers, ["127.0.0.53"]);
    }
}
