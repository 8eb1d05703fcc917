//! Who asks a daemon.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{LineError, Lines};

/// How long an answer may take. No command waits for a guest.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to {}: is the daemon running, with --control at this path?", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    UnknownCommand(String),
    #[error("the daemon closed the connection")]
    Closed,
    #[error("this is no control socket: what came is not an answer")]
    NotControl,
    #[error(transparent)]
    Line(#[from] LineError),
}

/// A connection to a daemon's control socket.
#[derive(Debug)]
pub struct Client(Lines);

impl Client {
    /// # Errors
    /// Nobody listens there, or not for this.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client = Self(Lines::new(stream));
        match client.message()? {
            greeting if greeting.contains_key("QMP") => Ok(client),
            _ => Err(ClientError::NotControl),
        }
    }

    /// What `command` gives back.
    ///
    /// # Errors
    /// It was refused, or no answer came.
    pub fn call(
        &mut self,
        command: &str,
        arguments: &Map<String, Value>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, ClientError> {
        let request = json!({"execute": command, "arguments": arguments});
        self.0.send_with(&request.to_string(), fds)?;
        loop {
            let mut message = self.message()?;
            if let Some(value) = message.remove("return") {
                return Ok(value);
            }
            if let Some(error) = message.get("error") {
                let desc = error["desc"].as_str().unwrap_or("refused without a word").to_owned();
                return Err(match error["class"].as_str() {
                    Some("CommandNotFound") => ClientError::UnknownCommand(desc),
                    _ => ClientError::Refused(desc),
                });
            }
            // Events may come between.
            if !message.contains_key("event") {
                return Err(ClientError::NotControl);
            }
        }
    }

    fn message(&mut self) -> Result<Map<String, Value>, ClientError> {
        let line = self.0.wait(Instant::now() + PATIENCE)?.ok_or(ClientError::Closed)?;
        match serde_json::from_slice(&line.bytes) {
            Ok(Value::Object(message)) => Ok(message),
            _ => Err(ClientError::NotControl),
        }
    }
}
