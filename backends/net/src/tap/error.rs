//! Why there is no tap device, and what to do about it.

use std::io;

use cleave_common::exit::{ExitCode, Failure};

pub(super) const TUN: &str = "/dev/net/tun";

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("{TUN} cannot be opened: {}", tun_advice(.0))]
    NoTun(#[source] io::Error),
    #[error(
        "there is no tap device {0}, and making one takes CAP_NET_ADMIN: run this as root, or have root make it first: \
         ip tuntap add dev {0} mode tap multi_queue user USER && ip link set {0} up"
    )]
    MayNotMake(String),
    #[error(
        "{0} is not this user's, and CAP_NET_ADMIN is missing: run this as root, or give it to the user ('ip tuntap add ... user USER')"
    )]
    MayNotOpen(String),
    #[error("the tap device {0} is in use by another program: use another one, or end that program")]
    InUse(String),
    #[error(
        "{0} is no tap device that this can use: it is of another kind, or was made with 'multi_queue' missing and is to have more queues than one"
    )]
    WrongKind(String),
    #[error("{name} cannot be opened with {pairs} queues")]
    Open { name: String, pairs: u16, source: io::Error },
    #[error("--tap-fd: {0}")]
    Inherited(String),
    #[error("network interfaces cannot be looked at")]
    Links(#[source] io::Error),
    #[error("there is no bridge {0}: make it first: ip link add {0} type bridge && ip link set {0} up")]
    NoBridge(String),
    #[error("{tap} is a port of another bridge than {bridge}: take it out first: ip link set {tap} nomaster")]
    OtherBridge { tap: String, bridge: String },
    #[error("{tap} cannot become a port of {bridge}{}", needs_admin(source))]
    Bridge { tap: String, bridge: String, source: io::Error },
    #[error("the MTU of {tap} cannot be set to {mtu}{}", needs_admin(source))]
    Mtu { tap: String, mtu: u16, source: io::Error },
    #[error("{tap} cannot be set up")]
    SetUp { tap: String, source: io::Error },
}

fn tun_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "this kernel has no TUN/TAP driver loaded (modprobe tun), or this container no such device"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not (it is for all users on most systems: chmod 0666)"
        }
        _ => "",
    }
}

fn needs_admin(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ": that takes CAP_NET_ADMIN; root can do it beforehand",
        _ => "",
    }
}

impl From<TapError> for Failure {
    fn from(error: TapError) -> Self {
        let code = match &error {
            TapError::Inherited(_)
            | TapError::WrongKind(_)
            | TapError::NoBridge(_)
            | TapError::OtherBridge { .. } => ExitCode::Usage,
            _ => ExitCode::Host,
        };
        Self::new(code, error)
    }
}
