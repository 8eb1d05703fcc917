//! A port of the host's that leads to one of the guest's: `tcp:2222:22`, `udp:[::1]:5353:53`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::options;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// `tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT`, an IPv6 address in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortForward {
    pub protocol: Protocol,
    /// Where it is listened on; the host's loopback unless given.
    pub address: IpAddr,
    pub host_port: u16,
    pub guest_port: u16,
}

/// A text that is no [`PortForward`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no forwarded port: {reason}; it is tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT, such as tcp:2222:22"
)]
pub struct PortForwardError {
    text: String,
    reason: String,
}

impl PortForward {
    /// Where it is listened on unless it says so: nobody but this host gets to the guest by an option that named nobody.
    pub const DEFAULT_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn parse(text: &str) -> Result<Self, String> {
        let (protocol, rest) = text.split_once(':').unwrap_or((text, ""));
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            other => return Err(format!("'{other}' is neither tcp nor udp")),
        };
        let (host, guest_port) = rest.rsplit_once(':').ok_or("there have to be two ports")?;
        let (address, host_port) = match host.rsplit_once(':') {
            None => (Self::DEFAULT_ADDRESS, host),
            Some((address, port)) => (parse_address(address)?, port),
        };
        let (host_port, guest_port) = (parse_port(host_port)?, parse_port(guest_port)?);
        Ok(Self { protocol, address, host_port, guest_port })
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    let inside = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = match inside {
        Some(inside) => inside.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => text.parse::<Ipv4Addr>().map(IpAddr::V4),
    };
    address.map_err(|_| format!("'{text}' is no IPv4 address, and no IPv6 address in brackets"))
}

fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("'{text}' is no port: 1 to 65535 are"))
}

impl FromStr for PortForward {
    type Err = PortForwardError;

    fn from_str(text: &str) -> Result<Self, PortForwardError> {
        Self::parse(text).map_err(|reason| PortForwardError { text: text.to_owned(), reason })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, address, host_port, guest_port } = self;
        match address {
            IpAddr::V4(address) => write!(f, "{protocol}:{address}:{host_port}:{guest_port}"),
            IpAddr::V6(address) => write!(f, "{protocol}:[{address}]:{host_port}:{guest_port}"),
        }
    }
}

impl<'de> Deserialize<'de> for PortForward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::from_word(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_read_and_the_host_keeps_to_itself_unless_told() {
        for (text, whole) in [
            ("tcp:2222:22", "tcp:127.0.0.1:2222:22"),
            ("udp:0.0.0.0:53:5353", "udp:0.0.0.0:53:5353"),
            ("tcp:[::1]:65535:1", "tcp:[::1]:65535:1"),
        ] {
            let forward: PortForward = text.parse().unwrap();
            assert_eq!(forward.to_string(), whole);
            assert_eq!(whole.parse(), Ok(forward));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("", "'' is neither tcp nor udp"),
            ("2222:22", "'2222' is neither tcp nor udp"),
            ("sctp:1:2", "'sctp' is neither"),
            ("tcp", "two ports"),
            ("tcp:22", "two ports"),
            ("tcp:0:22", "'0' is no port"),
            ("tcp:2222:65536", "'65536' is no port"),
            ("tcp:2222:", "'' is no port"),
            ("tcp:-1:22", "'-1' is no port"),
            ("tcp:localhost:2222:22", "'localhost' is no IPv4 address"),
            ("tcp:::1:2222:22", "'::1' is no IPv4 address, and no IPv6 address in brackets"),
            ("tcp:[127.0.0.1]:2222:22", "'[127.0.0.1]' is no"),
            ("tcp::2222:22", "'' is no IPv4 address"),
        ] {
            let said = text.parse::<PortForward>().unwrap_err().to_string();
            assert!(said.contains(reason), "{text}: {said}");
            assert!(said.ends_with("such as tcp:2222:22"), "{said}");
        }
    }
}
