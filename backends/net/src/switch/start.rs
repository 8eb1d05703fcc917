//! From the command line to a switch that serves.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cleave_common::cpus::CpuList;
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::mac::MacAddress;
use cleave_common::throttle::NetThrottleConfig;
use cleave_runtime::{Device, Endpoint, Listener, Member, Sandbox, SandboxMode, Signals, run_all};
use tracing::info;

use super::options::PortOptions;
use super::uplink::{Uplink, UplinkThread};
use super::{MAX_PORTS, PortIndex, Switch, SwitchArgs, SwitchOptions, SwitchPort};
use crate::device::{Net, NetError, NetOptions};
use crate::sandbox;
use crate::tap::Tap;

/// Of guests that nobody gave another one.
const DEFAULT_MTU: u16 = 1500;

/// Why there is no switch.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("--switch has a socket for each port: leave {0} out")]
    NotWith(&'static str),
    #[error(
        "the ports of --switch can neither be limited nor captured: leave {0} out, or use it with --tap alone"
    )]
    NotOfPorts(&'static str),
    #[error("a switch needs ports: --ports N, or --port NAME for each")]
    NoPorts,
    #[error("{0} ports are too many: {MAX_PORTS} are possible")]
    TooManyPorts(usize),
    #[error("two ports are at {}: give each a name of its own", .0.display())]
    SamePlace(PathBuf),
    #[error("cannot make the directory {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot set up the switch")]
    SetUp(#[source] io::Error),
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let code = match &error {
            StartError::SetUp(_) => ExitCode::Host,
            StartError::Directory { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Host
            }
            _ => ExitCode::Usage,
        };
        Self::new(code, error)
    }
}

/// What all ports have in common with any network device.
pub(crate) struct Common {
    pub(crate) mode: SandboxMode,
    pub(crate) pairs: u16,
    pub(crate) max_queue_size: u16,
    pub(crate) mtu: Option<u16>,
    pub(crate) poll: Duration,
    pub(crate) cpus: Option<CpuList>,
}

/// Refuses what is about one device alone.
pub(crate) fn refuse(alone: [(&'static str, bool); 3]) -> Result<(), Failure> {
    match alone.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(StartError::NotWith(option).into()),
        None => Ok(()),
    }
}

/// Refuses what is not there for a switch's ports: a limit would have to drop here, for nobody may wait for another's guest.
pub(crate) fn refuse_for_now(missing: [(&'static str, bool); 2]) -> Result<(), Failure> {
    match missing.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(StartError::NotOfPorts(option).into()),
        None => Ok(()),
    }
}

/// Serves a switch until a signal asks it to end.
pub(crate) fn serve(
    args: &SwitchArgs,
    directory: &Path,
    tap: Option<Tap>,
    common: Common,
    signals: &Signals,
) -> Result<(), Failure> {
    let ports = checked(args, directory)?;
    let endpoints = listen(&ports, directory)?;
    let (syscalls, ioctls) = match tap.as_ref().map(Tap::is_ours) {
        None => (sandbox::SWITCHING, &[][..]),
        Some(true) => (sandbox::SYSCALLS, sandbox::IOCTLS_OF_OURS),
        Some(false) => (sandbox::SYSCALLS, sandbox::IOCTLS),
    };
    let sandbox =
        Sandbox { program: "cleave-net", mode: common.mode, syscalls, ioctls, ..Sandbox::default() };
    let confined = sandbox.enter_for(&endpoints)?;
    let uplink = tap.map(Uplink::new).transpose().map_err(StartError::SetUp)?.map(Arc::new);
    let options = SwitchOptions {
        ports: ports.len(),
        pairs: common.pairs,
        isolated: args.isolate,
        ageing: Duration::from_secs(args.ageing),
        mtu: uplink.as_ref().map_or(common.mtu.unwrap_or(DEFAULT_MTU), |uplink| uplink.mtu()),
    };
    let switch = Arc::new(Switch::new(&options, uplink.clone()).map_err(StartError::SetUp)?);
    let mut members = Vec::new();
    for (index, (port, endpoint)) in ports.iter().zip(endpoints).enumerate() {
        let device = device(&switch, PortIndex(index), port, directory, &common)?;
        members.push(Member { name: port.name().to_owned(), device, endpoint });
    }
    info!("{} ports in {}", members.len(), directory.display());
    let _thread = uplink
        .map(|uplink| UplinkThread::start(switch.clone(), uplink))
        .transpose()
        .map_err(StartError::SetUp)?;
    run_all(members, signals, &confined, &|| switch.report())
}

fn checked(args: &SwitchArgs, directory: &Path) -> Result<Vec<PortOptions>, StartError> {
    let ports = args.wanted();
    match ports.len() {
        0 => return Err(StartError::NoPorts),
        count if count > usize::from(MAX_PORTS) => return Err(StartError::TooManyPorts(count)),
        _ => {}
    }
    let mut paths: Vec<PathBuf> = ports.iter().map(|port| port.path(directory)).collect();
    paths.sort();
    match paths.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(StartError::SamePlace(two[0].clone())),
        None => Ok(ports),
    }
}

/// Listens at all ports, or at none.
fn listen(ports: &[PortOptions], directory: &Path) -> Result<Vec<Endpoint>, Failure> {
    if ports.iter().any(PortOptions::is_inside)
        && let Err(source) = fs::create_dir(directory)
        && source.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(StartError::Directory { path: directory.to_owned(), source }.into());
    }
    let listeners = ports.iter().map(|port| Listener::bind(&port.path(directory)));
    let endpoints: Result<Vec<Endpoint>, _> =
        listeners.map(|listener| listener.map(Endpoint::Listening)).collect();
    Ok(endpoints?)
}

fn device(
    switch: &Arc<Switch>,
    index: PortIndex,
    port: &PortOptions,
    directory: &Path,
    common: &Common,
) -> Result<Box<dyn Device + Send>, NetError> {
    let options = NetOptions {
        mac: port.mac.unwrap_or_else(|| derived_address(&port.path(directory))),
        pairs: common.pairs,
        max_queue_size: common.max_queue_size,
        poll: common.poll,
        cpus: common.cpus.clone(),
        throttle: NetThrottleConfig::default(),
        capture: None,
    };
    let ours = Arc::new(SwitchPort::new(switch.clone(), index, common.pairs));
    // What its threads say bears its name.
    Member::span(port.name()).in_scope(|| Ok(Box::new(Net::new(ours, options)?) as _))
}

/// The same each time on one host for one socket, wherever the daemon was started from.
fn derived_address(socket: &Path) -> MacAddress {
    let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    crate::derived_address(&socket.to_string_lossy())
}
