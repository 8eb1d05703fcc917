//! QMP: names and arguments of commands, and the events' form (QEMU's docs/interop/qmp-spec).

use std::time::{SystemTime, UNIX_EPOCH};

use cleave_common::control::{CAPABILITIES, ControlError, Request, nothing};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::answer::Notice;
use super::{Command, schema};

/// What a request asks for.
#[derive(Debug)]
pub(super) enum Asks {
    /// The machine has to do or say it.
    Machine(Command),
    /// It is so for every machine.
    Known(Value),
}

/// A command's name, its arguments and its result, by the names that [`schema`] has for types, and what it means.
pub(super) struct Entry {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [(&'static str, &'static str)],
    pub(super) returns: &'static str,
    read: fn(&Request) -> Result<Asks, ControlError>,
}

const fn entry(
    name: &'static str,
    returns: &'static str,
    read: fn(&Request) -> Result<Asks, ControlError>,
) -> Entry {
    Entry { name, arguments: &[], returns, read }
}

/// Every command.
pub(super) const COMMANDS: &[Entry] = &[
    entry(CAPABILITIES, "empty", |request| {
        /// No capability is offered, so none can be asked for.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Capabilities {
            #[serde(default)]
            enable: Vec<String>,
        }
        match arguments::<Capabilities>(request)?.enable.first() {
            None => Ok(Asks::Known(nothing())),
            Some(name) => Err(ControlError::new(format!("qmp_capabilities: '{name}' is not offered"))),
        }
    }),
    entry("query-version", "VersionInfo", |request| known(request, version())),
    entry("query-commands", "CommandInfo-list", |request| {
        known(request, COMMANDS.iter().map(|entry| json!({"name": entry.name})).collect())
    }),
    entry("query-qmp-schema", "SchemaInfo-list", |request| known(request, schema::of(COMMANDS))),
    entry("query-kvm", "KvmInfo", |request| known(request, json!({"enabled": true, "present": true}))),
    entry("query-status", "StatusInfo", |request| plain(request, Command::QueryStatus)),
    entry("query-name", "NameInfo", |request| plain(request, Command::QueryName)),
    entry("query-cpus-fast", "CpuInfoFast-list", |request| plain(request, Command::QueryCpus)),
    entry("stop", "empty", |request| plain(request, Command::Stop)),
    entry("cont", "empty", |request| plain(request, Command::Continue)),
    entry("system_powerdown", "empty", |request| plain(request, Command::PowerDown)),
    entry("system_reset", "empty", |request| plain(request, Command::Reset)),
    entry("quit", "empty", |request| plain(request, Command::Quit)),
    entry("x-cleave-query-devices", "CleaveDeviceInfo-list", |request| plain(request, Command::QueryDevices)),
    Entry {
        name: "x-cleave-restart-device",
        arguments: &[("device", "str")],
        returns: "empty",
        read: |request| {
            #[derive(Deserialize)]
            #[serde(deny_unknown_fields)]
            struct Device {
                device: String,
            }
            let name = arguments::<Device>(request)?.device;
            Ok(Asks::Machine(Command::RestartDevice { name }))
        },
    },
];

/// What `request` asks for.
pub(super) fn read(request: &Request) -> Result<Asks, ControlError> {
    match COMMANDS.iter().find(|entry| entry.name == request.command) {
        Some(entry) => (entry.read)(request),
        None => {
            let names: Vec<_> = COMMANDS.iter().map(|entry| entry.name).collect();
            Err(ControlError::unknown_command(&request.command, &names))
        }
    }
}

/// A command without arguments.
fn plain(request: &Request, command: Command) -> Result<Asks, ControlError> {
    without_arguments(request).map(|()| Asks::Machine(command))
}

fn known(request: &Request, answer: Value) -> Result<Asks, ControlError> {
    without_arguments(request).map(|()| Asks::Known(answer))
}

fn without_arguments(request: &Request) -> Result<(), ControlError> {
    match request.arguments.keys().next() {
        None => Ok(()),
        Some(key) => {
            Err(ControlError::new(format!("{} has no arguments, and '{key}' is given", request.command)))
        }
    }
}

fn arguments<T: DeserializeOwned>(request: &Request) -> Result<T, ControlError> {
    request.arguments()
}

fn version() -> Value {
    let greeting = greeting();
    greeting["QMP"]["version"].clone()
}

/// What a client is told first.
pub(super) fn greeting() -> Value {
    cleave_common::control::greeting("cleave", env!("CARGO_PKG_VERSION"))
}

/// `notice` as an event of now.
pub(super) fn event(notice: &Notice) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
    let mut event = Map::from_iter([("event".to_owned(), json!(notice.name()))]);
    if let Some(data) = notice.data() {
        event.insert("data".to_owned(), data);
    }
    event.insert("timestamp".to_owned(), timestamp);
    Value::Object(event)
}
