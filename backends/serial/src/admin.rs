//! What the control socket can ask: which ports there are, others, fewer, a log, a size.

use std::os::fd::OwnedFd;

use cleave_common::control::{ControlError, Request, nothing, value_of};
use cleave_common::exit::Failure;
use cleave_common::port::{self, Place, PortSpec};
use cleave_runtime::Control;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::line::{self, OpenError, Opened, Source};
use crate::ports::Size;
use crate::worker::{Handle, Worker};

const COMMANDS: &[&str] = &["query-ports", "port-add", "port-remove", "log-read", "resize"];

pub(crate) struct Admin(pub(crate) Handle);

/// A port, for people and programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct PortState {
    id: u32,
    name: Option<String>,
    console: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
    /// Somebody on the host is there to read.
    host_open: bool,
    clients: usize,
    from_guest: u64,
    to_guest: u64,
    /// Bytes that readers missed.
    dropped: u64,
    size: Option<[u16; 2]>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    /// As `--port` has it.
    port: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Which {
    /// The name, or the number.
    port: Value,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    port: Option<Value>,
    columns: u16,
    rows: u16,
}

impl Control for Admin {
    fn commands(&self) -> &'static [&'static str] {
        COMMANDS
    }

    fn execute(&self, mut request: Request) -> Result<Value, ControlError> {
        match request.command.as_str() {
            "query-ports" => value_of(&self.ask(|worker| worker.states())?),
            "port-add" => {
                let (Add { port }, fds) = (request.arguments()?, std::mem::take(&mut request.fds));
                let spec = spec(&port)?;
                let opened = received(&spec.place, fds)?;
                let id = self.ask(|worker| worker.add(spec, opened))?.map_err(refused)?;
                Ok(serde_json::json!({ "id": id }))
            }
            "port-remove" => {
                let Which { port } = request.arguments()?;
                self.ask(move |worker| worker.find(&port).map(|id| worker.remove(id)))??;
                Ok(nothing())
            }
            "log-read" => {
                let Which { port } = request.arguments()?;
                self.ask(move |worker| worker.find(&port).and_then(|id| worker.log(id)))?
            }
            _ => {
                let Resize { port, columns, rows } = request.arguments()?;
                let port = port.unwrap_or(Value::from(0));
                let size = Size { columns, rows };
                self.ask(move |worker| {
                    let id = worker.find(&port)?;
                    worker.line(id).map(|line| line.tell_size(size)).ok_or_else(|| no_port(&port))
                })??;
                Ok(nothing())
            }
        }
    }
}

impl Admin {
    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T, ControlError> {
        self.0.ask(question).ok_or_else(|| ControlError::new("the daemon is ending"))
    }
}

fn refused(error: impl std::error::Error + 'static) -> ControlError {
    ControlError::new(cleave_common::exit::one_line(&error))
}

fn no_port(port: &Value) -> ControlError {
    ControlError::not_found(format!("there is no port {port}: query-ports lists those that there are"))
}

fn spec(text: &str) -> Result<PortSpec, ControlError> {
    port::parse(text).map_err(refused)?.validate().map_err(refused)
}

impl Worker {
    fn find(&self, port: &Value) -> Result<u32, ControlError> {
        let is_meant = |id: &u32| {
            self.ports().nature(*id).is_some_and(|nature| match port {
                Value::String(name) => nature.name.as_ref() == Some(name),
                other => other.as_u64() == Some(u64::from(*id)),
            })
        };
        (0..self.ports().max()).find(is_meant).ok_or_else(|| no_port(port))
    }

    fn states(&mut self) -> Vec<PortState> {
        (0..self.ports().max()).filter_map(|id| self.state(id)).collect()
    }

    fn state(&mut self, id: u32) -> Option<PortState> {
        let nature = self.ports().nature(id)?.clone();
        let (guest_open, size) = (self.ports().is_guest_open(id), self.ports().size(id));
        let [from_guest, to_guest] = self.moved(id);
        let line = self.line(id)?;
        Some(PortState {
            id,
            name: nature.name,
            console: nature.is_console,
            guest_open,
            host_open: line.is_open(),
            clients: line.clients(),
            from_guest,
            to_guest,
            dropped: line.dropped(),
            size: size.map(|size| [size.columns, size.rows]),
        })
    }

    /// What is there of a log, as text, and how much there was before it.
    fn log(&mut self, id: u32) -> Result<Value, ControlError> {
        let history = self.line(id).and_then(|line| line.history());
        let history =
            history.ok_or_else(|| ControlError::new("this port keeps no log: log= or history= does"))?;
        let text = String::from_utf8_lossy(&history.from(history.start()).concat()).into_owned();
        Ok(serde_json::json!({ "dropped": history.start(), "text": text }))
    }

    /// SIGUSR1.
    pub(crate) fn report(&mut self) -> String {
        let ports = self.states();
        let said = ports.iter().map(|port| {
            let name = port.name.clone().unwrap_or_else(|| format!("console {}", port.id));
            let ends = match (port.guest_open, port.host_open) {
                (true, true) => "open",
                (true, false) => "open in the guest",
                (false, true) => "open on the host",
                (false, false) => "closed",
            };
            format!("{name}: {ends}, {} bytes from the guest, {} to it", port.from_guest, port.to_guest)
        });
        said.collect::<Vec<_>>().join("; ")
    }
}

/// `ctl port-add`: the port's other end is opened by who asks, as he may, and sent along.
pub(crate) fn open_for(command: &str, arguments: &mut Map<String, Value>) -> Result<Vec<OwnedFd>, Failure> {
    let text = arguments.get("port").and_then(Value::as_str).unwrap_or_default();
    if command != "port-add" || text.is_empty() {
        return Ok(Vec::new());
    }
    let spec = port::parse(text).map_err(Failure::usage)?.validate().map_err(Failure::usage)?;
    if matches!(spec.place, Place::Stdio | Place::Inherited(_)) {
        return Err(Failure::usage("stdio and fd= are for ports that a daemon starts with"));
    }
    let mut opened = line::open(&spec.place, None)?;
    // The socket is the daemon's from now on.
    std::mem::forget(opened.file.take());
    Ok(opened.source.into_fds())
}

/// The other end of such a port.
fn received(place: &Place, fds: Vec<OwnedFd>) -> Result<Opened, ControlError> {
    let count = fds.len();
    let source = Source::from_fds(place, fds).ok_or_else(|| {
        ControlError::new(format!(
            "{count} descriptors do not make such a port: 'cleave-serial ctl SOCKET port-add port=...' opens what it takes"
        ))
    })?;
    Ok(Opened { source: source.map_err(|error: OpenError| refused(error))?, file: None, terminal: None })
}
