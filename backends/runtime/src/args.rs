//! The command line that every device daemon has (vhost-user, "Backend program conventions").

use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use clap::Args;
use cleave_common::exit::Failure;

use crate::sandbox::SandboxMode;
use crate::socket::{Endpoint, Listener, SocketError, close_inherited, take_inherited};

/// Flags that every daemon shares; flatten them into its own.
#[derive(Debug, Args)]
#[group(skip)]
pub struct CommonArgs {
    /// Listen on this unix socket for a frontend, and again whenever it goes away
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"])]
    pub socket_path: Option<PathBuf>,

    /// Serve the frontend on this inherited socket, and end with it; a listening one is listened on
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    pub fd: Option<RawFd>,

    /// Entries of the largest queue a frontend may set up: a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// Confine the process before it serves: no files, no network, no privileges, few system calls
    #[arg(long, value_enum, value_name = "on|off", default_value_t, hide_possible_values = true)]
    pub sandbox: SandboxMode,

    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (2..=32768).contains(&size) => Ok(size),
        _ => Err("a power of two from 2 to 32768 is needed".to_owned()),
    }
}

/// The socket these flags mean, not yet listened on: a daemon that cannot start leaves no trace of one.
#[derive(Debug)]
pub struct SocketClaim(Claim);

#[derive(Debug)]
enum Claim {
    Listen(PathBuf),
    Inherited(Endpoint),
}

impl CommonArgs {
    /// Takes what was inherited, and closes what else was. Call it before the process opens anything of its own.
    pub fn claim_socket(self) -> Result<SocketClaim, SocketError> {
        self.claim_socket_and(&[]).map(|(claim, _)| claim)
    }

    /// As [`CommonArgs::claim_socket`], and takes the descriptors `others` beside it; `None` for one that is not open.
    pub fn claim_socket_and(
        self,
        others: &[RawFd],
    ) -> Result<(SocketClaim, Vec<Option<OwnedFd>>), SocketError> {
        let others = claim_descriptors(others, self.fd);
        let claim = match (self.socket_path, self.fd) {
            (Some(path), _) => Ok(SocketClaim(Claim::Listen(path))),
            (None, fd) => {
                Endpoint::inherited(fd.unwrap_or(-1)).map(|endpoint| SocketClaim(Claim::Inherited(endpoint)))
            }
        };
        claim.map(|claim| (claim, others))
    }
}

/// Takes the inherited descriptors `wanted`, of which `other` is none, and closes what else was inherited but that one.
/// `None` for one that is not open, or is named twice. Call it before the process opens anything of its own.
pub fn claim_descriptors(wanted: &[RawFd], other: Option<RawFd>) -> Vec<Option<OwnedFd>> {
    let kept: Vec<RawFd> = wanted.iter().copied().chain(other).collect();
    close_inherited(&kept);
    let mut taken: Vec<RawFd> = other.into_iter().collect();
    let take = |fd: &RawFd| {
        let again = taken.contains(fd);
        taken.push(*fd);
        if again { None } else { take_inherited(*fd) }
    };
    wanted.iter().map(take).collect()
}

impl SocketClaim {
    /// Where frontends come from, from now on.
    pub fn open(self) -> Result<Endpoint, SocketError> {
        match self.0 {
            Claim::Listen(path) => Listener::bind(&path).map(Endpoint::Listening),
            Claim::Inherited(endpoint) => Ok(endpoint),
        }
    }
}

/// Answers `--print-capabilities`.
///
/// # Errors
/// It cannot be written.
pub fn print_capabilities(device_type: &str, features: &[&str]) -> Result<(), Failure> {
    let json = capabilities_json(device_type, features);
    let written = writeln!(io::stdout(), "{json}");
    written.map_err(|error| Failure::host(format!("cannot write to standard output: {error}")))
}

/// The answer to `--print-capabilities`: the device type's name in vhost-user.json, and the optional features it lists.
pub fn capabilities_json(device_type: &str, features: &[&str]) -> String {
    let features: Vec<String> = features.iter().map(|feature| format!("\"{feature}\"")).collect();
    format!("{{\"type\": \"{device_type}\", \"features\": [{}]}}", features.join(", "))
}
