//! What goes wrong while the lab or a guest is made, as one line that says what to do.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{program} is not installed: apt-get install {package}")]
    NotInstalled { program: String, package: &'static str },
    #[error("{command} ended with {status}: {said}")]
    Command { command: String, status: String, said: String },
    #[error("Debian offers no package that matches {pattern}; the lab's sources are in {sources}")]
    NoPackage { pattern: String, sources: PathBuf },
    #[error("{path}: {why}")]
    Malformed { path: PathBuf, why: String },
    #[error("the command did not end within {seconds} s and was stopped; the console is kept in {console}")]
    TimeLimit { seconds: u64, console: PathBuf },
    #[error(
        "the lab's machine gave no sign of life for {seconds} s and was stopped; its console is kept in {console}"
    )]
    Frozen { seconds: u64, console: PathBuf },
    #[error(
        "the lab's machine ended ({status}) before its command did; its console, kept in {console}, ends:\n{tail}"
    )]
    MachineDied { status: String, console: PathBuf, tail: String },
    #[error("{0}")]
    Refused(String),
}

/// Names the action that failed: `fs::read(p).context(|| format!("read {}", p.display()))?`.
pub trait Context<T> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|source| Error::Io { what: what().to_string(), source: source.into() })
    }
}

/// Runs a helper program to its end and gives what it wrote; a failure quotes the end of its standard error.
/// `package` is the Debian package to name when the program is missing.
pub fn run(command: &mut Command, package: &'static str) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NotInstalled { program, package });
        }
        Err(error) => return Err(error).context(|| format!("start {program}")),
    };
    if output.status.success() {
        return Ok(output);
    }
    Err(Error::Command {
        command: program,
        status: output.status.to_string(),
        said: last_lines(&String::from_utf8_lossy(&output.stderr), 12),
    })
}

/// The last `count` lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
