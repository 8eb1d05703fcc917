//! A daemon's control socket: what it is asked and what it answers, in QMP's dialect of JSON, a message a line.
//!
//! ```text
//!   client                                                   daemon
//!                                    <-- {"QMP": {"version": ..., "capabilities": []}}
//!   {"execute": "eject", "arguments": {"lun": 1}, "id": 7} -->
//!                                    <-- {"return": {}, "id": 7}   or   {"error": {"class": ..., "desc": ...}, "id": 7}
//! ```
//!
//! Programs that speak QMP work with it (QEMU's docs/interop/qmp-spec); a command may come before `qmp_capabilities`, so
//! that a line from a shell works as well. Descriptors travel with the first byte of a request (SCM_RIGHTS): a confined
//! daemon cannot open a file, but it can be given one.

mod client;
mod lines;
mod server;

use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

pub use client::{Client, ClientError};
pub use lines::{Line, LineError, Lines, MAX_LINE};
pub use server::{Listener, MAX_CLIENTS, Server};

/// The command by which a client of QMP begins.
pub const CAPABILITIES: &str = "qmp_capabilities";

/// What kind of refusal it is, by QMP's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    GenericError,
    CommandNotFound,
    DeviceNotFound,
}

impl ErrorClass {
    fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// Why a command was not carried out: nothing has changed, unless the words say so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct ControlError {
    pub class: ErrorClass,
    pub desc: String,
}

impl ControlError {
    pub fn new(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    pub fn not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::DeviceNotFound, desc: desc.into() }
    }

    pub fn unknown_command(command: &str, known: &[&'static str]) -> Self {
        let near = crate::options::did_you_mean(command, known.iter().copied());
        Self {
            class: ErrorClass::CommandNotFound,
            desc: format!("unknown command '{command}'{near}; the commands are: {}", known.join(", ")),
        }
    }
}

/// One command, as it arrived.
#[derive(Debug)]
pub struct Request {
    pub command: String,
    pub arguments: Map<String, Value>,
    /// What came along.
    pub fds: Vec<OwnedFd>,
    id: RequestId,
}

/// Which request an answer is for.
#[derive(Debug, Clone)]
pub struct RequestId(Option<Value>);

impl RequestId {
    /// What is sent back.
    pub fn answer(&self, outcome: Result<Value, ControlError>) -> Value {
        answer(self.0.as_ref(), outcome)
    }
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no request: the answer that says so.
    pub fn read(line: Line) -> Result<Self, Value> {
        let refuse = |id: Option<&Value>, desc: String| answer(id, Err(ControlError::new(desc)));
        let value: Value = serde_json::from_slice(&line.bytes)
            .map_err(|error| refuse(None, format!("this is no JSON: {error}")))?;
        let Value::Object(mut object) = value else {
            return Err(refuse(None, "a request is an object: {\"execute\": \"COMMAND\"}".to_owned()));
        };
        let id = object.remove("id");
        let command = match object.remove("execute") {
            Some(Value::String(command)) => command,
            Some(_) => return Err(refuse(id.as_ref(), "'execute' names a command, as a string".to_owned())),
            None => return Err(refuse(id.as_ref(), "'execute' is missing".to_owned())),
        };
        let arguments = match object.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(refuse(id.as_ref(), "'arguments' is an object".to_owned())),
        };
        if let Some(key) = object.keys().next() {
            let near = crate::options::did_you_mean(key, ["execute", "arguments", "id"]);
            return Err(refuse(id.as_ref(), format!("unknown member '{key}'{near}")));
        }
        Ok(Self { command, arguments, fds: line.fds, id: RequestId(id) })
    }

    /// The arguments as the struct they are to be: its fields are their names, and unknown ones are refused if it denies
    /// them.
    pub fn arguments<T: DeserializeOwned>(&self) -> Result<T, ControlError> {
        T::deserialize(Value::Object(self.arguments.clone()))
            .map_err(|error| ControlError::new(format!("{}: {error}", self.command)))
    }

    /// The one descriptor that is to come along.
    pub fn single_fd(&mut self) -> Result<OwnedFd, ControlError> {
        match (self.fds.pop(), self.fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            (None, _) => Err(ControlError::new(format!("{}: no descriptor came along", self.command))),
            (Some(_), false) => Err(ControlError::new(format!("{}: one descriptor is taken", self.command))),
        }
    }

    pub fn id(&self) -> RequestId {
        self.id.clone()
    }
}

fn answer(id: Option<&Value>, outcome: Result<Value, ControlError>) -> Value {
    let mut object = match outcome {
        Ok(value) => Map::from_iter([("return".to_owned(), value)]),
        Err(ControlError { class, desc }) => {
            Map::from_iter([("error".to_owned(), json!({"class": class.name(), "desc": desc}))])
        }
    };
    if let Some(id) = id {
        object.insert("id".to_owned(), id.clone());
    }
    Value::Object(object)
}

/// What a daemon says first.
pub fn greeting(program: &str, version: &str) -> Value {
    let mut numbers = version.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let [major, minor, micro] = std::array::from_fn(|_| numbers.next().unwrap_or(0));
    let version = json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": format!("{program} {version}")});
    json!({"QMP": {"version": version, "capabilities": []}})
}

/// The answer of a command that has nothing to say.
pub fn nothing() -> Value {
    Value::Object(Map::new())
}

/// `value` as an answer.
///
/// # Errors
/// It has what JSON has not: a map whose keys are no strings.
pub fn value_of(value: &impl Serialize) -> Result<Value, ControlError> {
    serde_json::to_value(value).map_err(|error| ControlError::new(format!("the answer is no JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Request, Value> {
        Request::read(Line { bytes: text.as_bytes().to_vec(), fds: Vec::new() })
    }

    #[test]
    fn a_request_has_a_command_and_its_answer_the_requests_id() {
        let request = read(r#"{"execute": "eject", "arguments": {"lun": 1}, "id": [7]}"#).unwrap();
        assert_eq!((request.command.as_str(), &request.arguments["lun"]), ("eject", &json!(1)));
        assert_eq!(request.id().answer(Ok(nothing())), json!({"return": {}, "id": [7]}));
        let refused = request.id().answer(Err(ControlError::unknown_command("ejct", &["eject", "change"])));
        let desc = "unknown command 'ejct' (did you mean 'eject'?); the commands are: eject, change";
        assert_eq!(refused, json!({"error": {"class": "CommandNotFound", "desc": desc}, "id": [7]}));
    }

    #[test]
    fn what_is_no_request_is_answered_with_the_reason() {
        for (text, wanted) in [
            ("{", "this is no JSON"),
            ("[]", "a request is an object"),
            (r#"{"exec": "eject"}"#, "'execute' is missing"),
            (r#"{"execute": 1}"#, "'execute' names a command"),
            (r#"{"execute": "a", "arguments": []}"#, "'arguments' is an object"),
            (r#"{"execute": "a", "argument": {}}"#, "unknown member 'argument' (did you mean 'arguments'?)"),
        ] {
            let answer = read(text).unwrap_err();
            let desc = answer["error"]["desc"].as_str().unwrap();
            assert!(desc.starts_with(wanted), "{text}: {desc}");
        }
    }

    #[test]
    fn arguments_are_a_struct_whose_unknown_fields_are_refused() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Eject {
            lun: u16,
        }
        let request = read(r#"{"execute": "eject", "arguments": {"lun": 3}}"#).unwrap();
        assert_eq!(request.arguments::<Eject>().unwrap().lun, 3);
        let request = read(r#"{"execute": "eject", "arguments": {"lnu": 3}}"#).unwrap();
        let error = request.arguments::<Eject>().unwrap_err();
        assert!(error.desc.starts_with("eject: unknown field `lnu`"), "{error}");
    }
}
