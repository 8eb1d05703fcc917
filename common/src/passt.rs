//! The command line of passt(1), the program that gives a guest a network without privilege. Every option here is known to
//! the passt of Debian 12 (2023-03-09) and to later ones.

use crate::forward::{PortForward, Protocol};

/// The program, where it is not named otherwise.
pub const PROGRAM: &str = "passt";

/// What a guest is given, as far as passt has a word in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PasstOptions {
    pub forwards: Vec<PortForward>,
    /// The guest reaches the host's own services, those of its loopback too, at the address of its gateway.
    pub host: bool,
    /// What DHCP tells the guest; passt's own default if absent.
    pub mtu: Option<u16>,
}

impl PasstOptions {
    /// The arguments, but for the socket. It stays in the foreground.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--foreground".to_owned(), "--quiet".to_owned()];
        arguments.extend(self.mtu.into_iter().flat_map(|mtu| ["--mtu".to_owned(), mtu.to_string()]));
        for (option, protocol) in [("--tcp-ports", Protocol::Tcp), ("--udp-ports", Protocol::Udp)] {
            let mut specs: Vec<String> =
                self.forwards.iter().filter(|forward| forward.protocol == protocol).map(spec).collect();
            // Said even if there are none: otherwise UDP ports follow those of TCP.
            if specs.is_empty() {
                specs.push("none".to_owned());
            }
            arguments.extend(specs.into_iter().flat_map(|spec| [option.to_owned(), spec]));
        }
        if !self.host {
            arguments.push("--no-map-gw".to_owned());
        }
        arguments
    }
}

fn spec(forward: &PortForward) -> String {
    let PortForward { address, host_port, guest_port, .. } = forward;
    format!("{address}/{host_port}:{guest_port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_forwarded_that_was_not_asked_for() {
        let said = PasstOptions::default().arguments().join(" ");
        assert_eq!(said, "--foreground --quiet --tcp-ports none --udp-ports none --no-map-gw");
        let forwards = ["tcp:2222:22", "udp:[::1]:53:5353", "tcp:0.0.0.0:80:8080"];
        let forwards = forwards.iter().map(|text| text.parse().unwrap()).collect();
        let said = PasstOptions { forwards, host: true, mtu: Some(9000) }.arguments().join(" ");
        let expected = "--foreground --quiet --mtu 9000 --tcp-ports 127.0.0.1/2222:22 \
                        --tcp-ports 0.0.0.0/80:8080 --udp-ports ::1/53:5353";
        assert_eq!(said, expected);
    }
}
