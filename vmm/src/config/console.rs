//! `--console` and `--serial`: the ports of a console device (virtio 1.2, 5.3), served by a daemon that we start. Their keys
//! are those of [`cleave_common::port`].

use cleave_common::options;
use cleave_common::port::{Kind, MAX_PORTS, OnFull, Place, PortConfig, PortError};
use serde::{Deserialize, Deserializer};

use super::UartConfig;

/// The console and the serial ports of a machine that can be planned.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConsoleDevice {
    /// The consoles, then the others.
    pub ports: Vec<PortConfig>,
}

/// A key of the configuration file: a table, or the text of the command line.
#[derive(Debug, Clone, PartialEq)]
pub struct Port(pub PortConfig);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::table_or_text(deserializer, None).map(Self)
    }
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ConsoleError {
    #[error("--console: {0}")]
    Console(PortError),
    #[error("--serial: {0}")]
    Serial(PortError),
    #[error("--{0}: fd= is for cleave-serial: a machine's ports have names of files")]
    Fd(&'static str),
    #[error("--serial: stdio is for --console")]
    SerialStdio,
    #[error("--console stdio and --uart stdio want the same terminal: give one of them another place")]
    BothStdio,
    #[error("{0} consoles and serial ports are asked for: there is room for {MAX_PORTS}")]
    TooMany(usize),
    #[error("two serial ports are named '{0}'")]
    Name(String),
}

/// What `--console` and `--serial` say. `None`: there is no such device.
pub(super) fn device(
    consoles: Vec<Port>,
    serials: Vec<Port>,
    uart: Option<&UartConfig>,
) -> Result<Option<ConsoleDevice>, ConsoleError> {
    let consoles = consoles.into_iter().map(|Port(port)| PortConfig { kind: Some(Kind::Console), ..port });
    let (mut ports, mut at_terminal) = (Vec::new(), 0);
    for port in consoles {
        check("console", &port, ConsoleError::Console)?;
        at_terminal += usize::from(port.stdio);
        ports.push(port);
    }
    for Port(port) in serials {
        check("serial", &port, ConsoleError::Serial)?;
        if port.stdio {
            return Err(ConsoleError::SerialStdio);
        }
        ports.push(port);
    }
    if at_terminal + usize::from(uart == Some(&UartConfig::Stdio)) > 1 {
        return Err(ConsoleError::BothStdio);
    }
    if ports.len() > MAX_PORTS as usize {
        return Err(ConsoleError::TooMany(ports.len()));
    }
    let mut names: Vec<&String> = ports.iter().filter_map(|port| port.name.as_ref()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ConsoleError::Name(pair[0].clone()));
    }
    Ok((!ports.is_empty()).then_some(ConsoleDevice { ports }))
}

fn check(
    option: &'static str,
    port: &PortConfig,
    refused: fn(PortError) -> ConsoleError,
) -> Result<(), ConsoleError> {
    match port.clone().validate().map_err(refused)?.place {
        Place::Inherited(_) => Err(ConsoleError::Fd(option)),
        _ => Ok(()),
    }
}

impl ConsoleDevice {
    /// What messages call the device.
    pub const NAME: &str = "console";

    /// The descriptor at which its daemon finds the machine's terminal.
    pub const TERMINAL_FD: i32 = 4;

    /// Whether a port is this process's terminal.
    pub fn has_terminal(&self) -> bool {
        self.ports.iter().any(|port| port.stdio)
    }

    /// What its daemon is told of each port.
    pub fn texts(&self) -> impl Iterator<Item = String> + '_ {
        self.ports.iter().map(|port| match port.stdio {
            // The machine reads the terminal, with its keys, and nothing is lost that it does not read at once.
            true => {
                let on_full = port.on_full.or(Some(OnFull::Wait));
                PortConfig { stdio: false, fd: Some(Self::TERMINAL_FD), on_full, ..port.clone() }.to_text()
            }
            false => port.to_text(),
        })
    }
}

/// Reads the value of `--console` or `--serial`.
pub fn parse(text: &str) -> Result<Port, options::OptionError> {
    options::parse(text, None).map(Port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(consoles: &[&str], serials: &[&str], uart: Option<UartConfig>) -> Result<ConsoleDevice, String> {
        let ports = |texts: &[&str]| texts.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>();
        let (consoles, serials) =
            (ports(consoles).map_err(|e| e.to_string())?, ports(serials).map_err(|e| e.to_string())?);
        device(consoles, serials, uart.as_ref()).map(Option::unwrap_or_default).map_err(|e| e.to_string())
    }

    #[test]
    fn the_daemon_is_told_of_each_port_and_finds_the_terminal_at_its_descriptor() {
        let device = of(&["stdio"], &["name=a,unix=/x,,y"], None).unwrap();
        assert!(device.has_terminal());
        let texts: Vec<String> = device.texts().collect();
        assert_eq!(texts, ["console,fd=4,on-full=wait", "name=a,unix=/x,,y"]);
        assert_eq!(cleave_common::port::parse(&texts[1]).unwrap().unix, Some("/x,y".into()));
        assert!(!of(&["pty"], &[], Some(UartConfig::Stdio)).unwrap().has_terminal());
    }

    #[test]
    fn what_cannot_be_is_said_in_the_options_words() {
        for (consoles, serials, uart, wanted) in [
            (&["stdio"][..], &[][..], Some(UartConfig::Stdio), "want the same terminal"),
            (&["stdio", "stdio"], &[], None, "want the same terminal"),
            (&[], &["name=a,stdio"], None, "stdio is for --console"),
            (&["fd=3"], &[], None, "--console: fd= is for cleave-serial"),
            (&[], &["unix=/x"], None, "--serial: name= is needed"),
            (&[], &["name=a,pty", "name=a,pty"], None, "named 'a'"),
            (&["tty"], &[], None, "unknown key 'tty' (did you mean 'pty'?)"),
        ] {
            let said = of(consoles, serials, uart).unwrap_err();
            assert!(said.contains(wanted), "{said}");
        }
    }
}
