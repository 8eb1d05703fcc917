//! What passt is told on its command line. Every option here is known to the passt of Debian 12 (2023-03-09) and later ones.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use cleave_common::forward::{PortForward, Protocol};
use tracing::warn;

/// How a guest is to be connected.
#[derive(Debug, Clone)]
pub(crate) struct UserOptions {
    /// The program: a path, or a name to look for in `PATH`.
    pub(crate) program: PathBuf,
    pub(crate) forwards: Vec<PortForward>,
    /// The guest reaches the host's own services, those of its loopback too, at the address of its gateway.
    pub(crate) host: bool,
    pub(crate) mtu: u16,
}

/// Where there are the name servers of this host.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where those are that a resolver on the loopback asks, if it is systemd's.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

impl UserOptions {
    /// The arguments, but for the socket.
    pub(super) fn arguments(&self) -> Vec<String> {
        let upstream = if self.host { Vec::new() } else { upstream_of_loopback() };
        self.arguments_with(&upstream)
    }

    fn arguments_with(&self, name_servers: &[IpAddr]) -> Vec<String> {
        let mut arguments: Vec<String> = ["--foreground", "--quiet", "--mtu"].map(str::to_owned).into();
        arguments.push(self.mtu.to_string());
        for (option, protocol) in [("--tcp-ports", Protocol::Tcp), ("--udp-ports", Protocol::Udp)] {
            let specs: Vec<String> =
                self.forwards.iter().filter(|forward| forward.protocol == protocol).map(spec).collect();
            // Said even if there are none: otherwise UDP ports follow those of TCP.
            let specs = if specs.is_empty() { vec!["none".to_owned()] } else { specs };
            arguments.extend(specs.into_iter().flat_map(|spec| [option.to_owned(), spec]));
        }
        if !self.host {
            arguments.push("--no-map-gw".to_owned());
        }
        arguments.extend(name_servers.iter().flat_map(|server| ["--dns".to_owned(), server.to_string()]));
        arguments
    }
}

fn spec(forward: &PortForward) -> String {
    let PortForward { address, host_port, guest_port, .. } = forward;
    format!("{address}/{host_port}:{guest_port}")
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

    fn options(forwards: &[&str], host: bool) -> UserOptions {
        let forwards = forwards.iter().map(|text| text.parse().unwrap()).collect();
        UserOptions { program: "passt".into(), forwards, host, mtu: 65520 }
    }

    #[test]
    fn nothing_is_forwarded_that_was_not_asked_for() {
        let said = options(&[], false).arguments_with(&[]).join(" ");
        assert_eq!(said, "--foreground --quiet --mtu 65520 --tcp-ports none --udp-ports none --no-map-gw");
        let said = options(&["tcp:2222:22", "udp:[::1]:53:5353", "tcp:0.0.0.0:80:8080"], true);
        let said = said.arguments_with(&["192.0.2.53".parse().unwrap()]).join(" ");
        let expected = "--mtu 65520 --tcp-ports 127.0.0.1/2222:22 --tcp-ports 0.0.0.0/80:8080 \
                        --udp-ports ::1/53:5353 --dns 192.0.2.53";
        assert!(said.ends_with(expected), "{said}");
    }

    #[test]
    fn name_servers_are_read_as_the_resolver_reads_them() {
        let text = "# nameserver 192.0.2.1\nnameserver 127.0.0.53\n nameserver\t2001:db8::1 # of the provider\n\
                    nameserver fe80::1%eth0\noptions edns0\nnameserver\nsearch nameserver\n";
        let expected: Vec<IpAddr> = ["127.0.0.53", "2001:db8::1"].map(|text| text.parse().unwrap()).into();
        assert_eq!(name_servers(text), expected);
    }
}
