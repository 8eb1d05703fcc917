//! Where a program reaches a machine: `unix:PATH` or `tcp:HOST:PORT`, as QEMU's users write it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use cleave_common::options;
use serde::{Deserialize, Deserializer};

/// A socket to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for ControlAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split(',');
        let address = words.next().unwrap_or_default();
        let mut exposed = false;
        for word in words {
            match word {
                // What it does anyway: command lines for QEMU say so.
                "server" | "server=on" | "nowait" | "wait=off" => {}
                "exposed" | "exposed=on" => exposed = true,
                "wait=on" | "server=off" => {
                    return Err(format!("'{word}': cleave listens, and does not wait for a client"));
                }
                other => {
                    let near = options::did_you_mean(other, ["server=on", "wait=off", "exposed=on"]);
                    return Err(format!("unknown word '{other}'{near}"));
                }
            }
        }
        match address.split_once(':') {
            Some(("unix", "")) => Err("the path is missing: unix:PATH".to_owned()),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => tcp(rest, exposed).map(Self::Tcp),
            _ => Err(format!("'{text}' is neither unix:PATH nor tcp:HOST:PORT")),
        }
    }
}

/// There is no password: whoever reaches the port owns the machine.
fn tcp(text: &str, exposed: bool) -> Result<SocketAddr, String> {
    let wrong = || format!("'{text}' is not of the form HOST:PORT, with HOST an address or localhost");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| format!("'{port}' is no port: 0 to 65535"))?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let ip = match host {
        "" | "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => host.parse().map_err(|_| wrong())?,
    };
    if !ip.is_loopback() && !exposed {
        return Err(format!(
            "{ip} can be reached from other hosts, and whoever reaches it steers the machine without a password: use \
             127.0.0.1, or say exposed=on"
        ));
    }
    Ok(SocketAddr::new(ip, port))
}

impl<'de> Deserialize<'de> for ControlAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::from_word(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_written_as_for_qemu() {
        let parse = |text: &str| text.parse::<ControlAddress>();
        assert_eq!(parse("unix:/run/a,server=on,wait=off"), Ok(ControlAddress::Unix("/run/a".into())));
        assert_eq!(parse("tcp:localhost:4444,server,nowait").unwrap().to_string(), "tcp:127.0.0.1:4444");
        assert_eq!(parse("tcp:[::1]:4444").unwrap().to_string(), "tcp:[::1]:4444");
        assert_eq!(parse("tcp:0.0.0.0:1,exposed=on").unwrap().to_string(), "tcp:0.0.0.0:1");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, wanted) in [
            ("unix:", "the path is missing"),
            ("/run/a", "'/run/a' is neither"),
            ("tcp:4444", "'4444' is not of the form HOST:PORT"),
            ("tcp:localhost:99999", "'99999' is no port"),
            ("tcp:example.org:1", "'example.org:1' is not of the form"),
            ("tcp:0.0.0.0:1", "0.0.0.0 can be reached from other hosts"),
            ("unix:/a,wait=on", "'wait=on': cleave listens"),
            ("unix:/a,sever=on", "unknown word 'sever=on' (did you mean 'server=on'?)"),
        ] {
            let error = text.parse::<ControlAddress>().unwrap_err();
            assert!(error.starts_with(wanted), "{text}: {error}");
        }
    }
}
