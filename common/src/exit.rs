//! Exit codes: one numbering for the VMM and every daemon, so that a service manager can act on them.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io;

/// How a Cleave process ends. The numbers are part of the command-line interface; see `README.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest shut down, or the daemon was asked to stop.
    Success = 0,
    /// A bug in Cleave: please report it.
    Internal = 1,
    /// The command line, the configuration or a file it names is wrong.
    Usage = 2,
    /// The host lacks something: KVM, permission, memory, huge pages.
    Host = 3,
    /// A device backend could not be started, reached or understood.
    Device = 4,
    /// The guest ended in a state it cannot leave: triple fault, KVM internal error.
    GuestFault = 6,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        (code as u8).into()
    }
}

/// An error that knows which exit code it is worth.
#[derive(Debug)]
pub struct Failure {
    pub code: ExitCode,
    explained: bool,
    source: Box<dyn Error + Send + Sync>,
}

impl Failure {
    pub fn new(code: ExitCode, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code, explained: false, source: source.into() }
    }

    /// The same failure, of which a person has been told already: by a daemon that said why it ended.
    pub fn explained(self) -> Self {
        Self { explained: true, ..self }
    }

    /// Whether saying it again would only repeat.
    pub fn is_explained(&self) -> bool {
        self.explained
    }

    pub fn usage(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(ExitCode::Usage, source)
    }

    pub fn host(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(ExitCode::Host, source)
    }

    pub fn device(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(ExitCode::Device, source)
    }

    pub fn internal(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(ExitCode::Internal, source)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", printable(&one_line(&*self.source)), advice(&*self.source))
    }
}

/// `text` on one line: what a file is called may hold line breaks, and what moves a terminal's cursor.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect::<String>().into()
}

/// What to do about a shortage that the system's words do not explain.
fn advice(error: &(dyn Error + 'static)) -> &'static str {
    let mut cause = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            Some(libc::EMFILE) => return ": raise 'ulimit -n' (LimitNOFILE= under systemd)",
            Some(libc::ENFILE) => return ": the host has too many files open, raise 'sysctl fs.file-max'",
            _ => cause = error.source(),
        }
    }
    ""
}

/// One line for a person: the error, then its causes after colons. A cause that its parent already quotes is not
/// said twice.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut parent = line.clone();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !parent.ends_with(&text) {
            line = format!("{line}: {text}");
        }
        parent = text;
        cause = error.source();
    }
    line
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open disk.raw")]
        struct Outer(#[source] std::io::Error);

        let failure = Failure::usage(Outer(std::io::Error::other("no such file")));
        assert_eq!(failure.to_string(), "cannot open disk.raw: no such file");
        assert_eq!(failure.code as u8, 2);
    }

    #[test]
    fn a_shortage_of_descriptors_says_what_to_raise() {
        let said = Failure::host(std::io::Error::from_raw_os_error(libc::EMFILE)).to_string();
        assert!(said.ends_with("raise 'ulimit -n' (LimitNOFILE= under systemd)"), "{said}");
    }

    #[test]
    fn a_name_with_a_line_break_stays_on_its_line() {
        let said = Failure::usage("cannot open a\nb\u{1b}[2J, caf\u{e9}").to_string();
        assert_eq!(said, "cannot open a\\nb\\u{1b}[2J, caf\u{e9}");
    }

    #[test]
    fn a_quoted_cause_is_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open disk.raw: {0}")]
        struct Outer(#[source] std::io::Error);

        let failure = Failure::host(Outer(std::io::Error::other("no such file")));
        assert_eq!(failure.to_string(), "cannot open disk.raw: no such file");
    }
}
