//! What passt is told on its command line, and what it is told of name servers when those it would find are of no use.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use cleave_common::passt::PasstOptions;
use tracing::warn;

/// How a guest is to be connected.
#[derive(Debug, Clone)]
pub(crate) struct UserOptions {
    /// The program: a path, or a name to look for in `PATH`.
    pub(crate) program: PathBuf,
    pub(crate) passt: PasstOptions,
    pub(crate) mtu: u16,
}

/// Where there are the name servers of this host.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where those are that a resolver on the loopback asks, if it is systemd's.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

impl UserOptions {
    /// The arguments, but for the socket.
    pub(super) fn arguments(&self) -> Vec<String> {
        let upstream = if self.passt.host { Vec::new() } else { upstream_of_loopback() };
        let servers = upstream.iter().flat_map(|server| ["--dns".to_owned(), server.to_string()]);
        self.passt.arguments().into_iter().chain(servers).collect()
    }
}

/// Name servers for a guest that cannot reach the only ones this host names, because those are on its loopback. Empty if
/// passt can be left to find some.
fn upstream_of_loopback() -> Vec<IpAddr> {
    let read = |path| name_servers(&fs::read_to_string(path).unwrap_or_default());
    let named = read(RESOLV_CONF);
    if named.is_empty() || named.iter().any(|server| !server.is_loopback()) {
        return Vec::new();
    }
    let upstream: Vec<IpAddr> = read(UPSTREAM).into_iter().filter(|server| !server.is_loopback()).collect();
    if upstream.is_empty() {
        warn!(
            "this host's only name server is on its loopback, where the guest cannot reach it: host=on (--host on) lets it"
        );
    }
    upstream
}

/// As resolv.conf(5) names them. One with a scope is of no use to a guest.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_resolver_reads_them() {
        let text = "# nameserver 192.0.2.1\nnameserver 127.0.0.53\n nameserver\t2001:db8::1 # of the provider\n\
                    nameserver fe80::1%eth0\noptions edns0\nnameserver\nsearch nameserver\n";
        let expected: Vec<IpAddr> = ["127.0.0.53", "2001:db8::1"].map(|text| text.parse().unwrap()).into();
        assert_eq!(name_servers(text), expected);
    }
}
