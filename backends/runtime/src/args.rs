//! The command line that every device daemon has (vhost-user, "Backend program conventions").

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;

use crate::socket::{Endpoint, Listener, SocketError};

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

    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

impl CommonArgs {
    /// The socket these flags mean. Call it before the process opens anything of its own.
    pub fn endpoint(&self) -> Result<Endpoint, SocketError> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) => Listener::bind(path).map(Endpoint::Listening),
            (None, fd) => Endpoint::inherited(fd.unwrap_or(-1)),
        }
    }
}

/// The answer to `--print-capabilities`: the device type's name in vhost-user.json, and the optional features it lists.
pub fn capabilities_json(device_type: &str, features: &[&str]) -> String {
    let features: Vec<String> = features.iter().map(|feature| format!("\"{feature}\"")).collect();
    format!("{{\"type\": \"{device_type}\", \"features\": [{}]}}", features.join(", "))
}
