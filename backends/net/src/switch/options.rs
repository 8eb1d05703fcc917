//! The command line's words about a switch.

use std::path::{Path, PathBuf};

use cleave_common::mac::MacAddress;
use cleave_common::options;
use serde::Deserialize;

use super::MAX_PORTS;

#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct SwitchArgs {
    /// Connect guests with one another: a socket for each of them in this directory, which is made if there is none. A tap
    /// device is the way to the world, if one is given
    // What it does not go with is refused later: an option that is in conflict with one given is no longer missed by those
    // that require it.
    #[arg(long, value_name = "DIR")]
    pub(crate) switch: Option<PathBuf>,

    /// So many ports: DIR/port0, DIR/port1 and so on
    #[arg(long, value_name = "N", requires = "switch", conflicts_with = "port", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_PORTS)))]
    pub(crate) ports: Option<u16>,

    /// A port of this name, at DIR/NAME; with a / in it, at this path. Once for each port; mac= is the guest's address
    #[arg(long, value_name = "NAME[,mac=ADDRESS]", requires = "switch", value_parser = port)]
    pub(crate) port: Vec<PortOptions>,

    /// Let guests reach what is behind the tap device, and not one another
    #[arg(long, requires = "switch")]
    pub(crate) isolate: bool,

    /// Forget where an address is when nothing came from it for so long
    #[arg(long, value_name = "SECONDS", requires = "switch", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) ageing: u64,
}

/// One port, as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortOptions {
    name: String,
    pub(crate) mac: Option<MacAddress>,
}

impl PortOptions {
    /// Where its socket is.
    pub(crate) fn path(&self, directory: &Path) -> PathBuf {
        if self.name.contains('/') { self.name.clone().into() } else { directory.join(&self.name) }
    }

    /// What it is called in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is in the switch's own directory.
    pub(crate) fn is_inside(&self) -> bool {
        !self.name.contains('/')
    }
}

fn port(text: &str) -> Result<PortOptions, String> {
    let port: PortOptions = options::parse(text, Some("name")).map_err(|error| error.to_string())?;
    match port.name.rsplit('/').next() {
        None | Some("" | "." | "..") => Err(format!("'{}' is no name for a socket", port.name)),
        _ => Ok(port),
    }
}

impl SwitchArgs {
    /// The ports, if any are asked for.
    pub(crate) fn wanted(&self) -> Vec<PortOptions> {
        let numbered = |number| PortOptions { name: format!("port{number}"), mac: None };
        let numbered = (0..self.ports.unwrap_or(0)).map(numbered);
        numbered.chain(self.port.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_a_name_in_the_directory_or_a_path() {
        let path = |text: &str| port(text).unwrap().path(Path::new("/run/net"));
        assert_eq!(path("a"), Path::new("/run/net/a"));
        assert_eq!(path("./a"), Path::new("./a"));
        assert_eq!(path("/run/vm1/net.sock"), Path::new("/run/vm1/net.sock"));
        let with = port("web,mac=52:54:00:00:00:07").unwrap();
        assert_eq!((with.name(), with.mac), ("web", "52:54:00:00:00:07".parse().ok()));
        for (wrong, words) in [
            ("", "'name=' is missing"),
            ("..", "no name for a socket"),
            ("/run/", "no name for a socket"),
            ("a,mak=1", "did you mean 'mac'?"),
            ("a,mac=01:00:5e:00:00:01", "no address of one interface"),
        ] {
            let said = port(wrong).unwrap_err();
            assert!(said.contains(words), "{wrong}: {said}");
        }
    }
}
