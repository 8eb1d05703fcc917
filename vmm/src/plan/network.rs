//! A network device's daemon, and what it is told.

use std::ffi::OsString;

use cleave_common::mac::MacAddress;
use cleave_common::passt::{self, PasstOptions};

use super::{Backend, DaemonSpec, Need, Terminal};
use crate::config::{NetConfig, NetDevice, NetPeer};

/// passt serves devices itself since 2025.
const VHOST_USER: Need = Need {
    option: "--vhost-user",
    advice: "install a newer passt (Debian 13 has one), or leave direct=on out: then cleave-net is between",
};

/// The queues to assume of a network device's daemon that cannot say how many it has, and the daemon.
pub(super) fn daemon(net: &NetDevice) -> (Option<u16>, Backend) {
    let spawn = |program: &str, args, settings: &NetConfig, needs| {
        Backend::Spawn(DaemonSpec {
            program: program.to_owned(),
            device: net.name.clone(),
            args,
            restart: settings.restart.unwrap_or_default(),
            restart_limit: settings.restart_limit,
            io_timeout: None,
            terminal: Terminal::None,
            keeps_state: false,
            needs,
        })
    };
    match &net.peer {
        NetPeer::Tap { tap, settings } => {
            (None, spawn("cleave-net", net_arguments(tap, settings), settings, None))
        }
        NetPeer::User { passt, settings } => {
            (None, spawn("cleave-net", user_arguments(&net.name, passt, settings), settings, None))
        }
        NetPeer::Passt { passt, settings } => {
            let arguments = std::iter::once(VHOST_USER.option.to_owned()).chain(passt.arguments());
            let arguments = arguments.map(OsString::from).collect();
            (Some(2), spawn(passt::PROGRAM, arguments, settings, Some(VHOST_USER)))
        }
        NetPeer::Socket { socket, wait, queues } => {
            (*queues, Backend::Attach { socket: socket.clone(), wait: wait.0 })
        }
    }
}

fn user_arguments(name: &str, passt: &PasstOptions, settings: &NetConfig) -> Vec<OsString> {
    // Nobody but its passt sees it; two devices of one guest must not have the same one.
    let mac = settings.mac.unwrap_or_else(|| MacAddress::derived_from([name.as_bytes()]));
    let mut arguments = vec!["--user".into(), format!("--mac={mac}").into()];
    arguments.extend(passt.forwards.iter().map(|forward| format!("--hostfwd={forward}").into()));
    arguments.extend(passt.host.then(|| "--host=on".into()));
    let words = [
        settings.mtu.map(|mtu| format!("--mtu={mtu}")),
        settings.poll_us.map(|microseconds| format!("--poll-us={microseconds}")),
        settings.cpus.as_ref().map(|cpus| format!("--cpus={cpus}")),
    ];
    arguments.extend(words.into_iter().flatten().map(OsString::from));
    arguments.extend(frame_arguments(settings));
    arguments
}

/// What is done with the frames that pass.
fn frame_arguments(settings: &NetConfig) -> impl Iterator<Item = OsString> {
    let throttle = Some(settings.throttle).filter(|throttle| !throttle.is_empty());
    let pcap = settings.pcap.as_ref().map(|path| {
        let mut word = OsString::from("--pcap=");
        word.push(path);
        word
    });
    let snaplen = settings.pcap_snaplen.map(|len| format!("--pcap-snaplen={len}").into());
    throttle.map(|throttle| format!("--throttle={throttle}").into()).into_iter().chain(pcap).chain(snaplen)
}

fn net_arguments(tap: &str, settings: &NetConfig) -> Vec<OsString> {
    let value = |key: &str, value: Option<String>| value.map(|value| format!("--{key}={value}").into());
    [
        value("tap", Some(tap.to_owned())),
        value("bridge", settings.bridge.clone()),
        value("mac", settings.mac.map(|mac| mac.to_string())),
        value("mtu", settings.mtu.map(|mtu| mtu.to_string())),
        value("queues", settings.queues.map(|queues| queues.to_string())),
        value("poll-us", settings.poll_us.map(|microseconds| microseconds.to_string())),
        value("cpus", settings.cpus.as_ref().map(|cpus| cpus.to_string())),
    ]
    .into_iter()
    .flatten()
    .chain(frame_arguments(settings))
    .collect()
}
