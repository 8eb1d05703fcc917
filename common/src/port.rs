//! A port of a console device as people write it: `--port` of cleave-serial, `--console` and `--serial` of the VMM.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;

use crate::options::{self, OptionError};
use crate::size::ByteSize;
use crate::socket::MAX_PATH_LEN;

/// Bytes of a port's name.
pub const MAX_NAME_LEN: usize = 128;

/// Most ports of a device, as QEMU has it.
pub const MAX_PORTS: u32 = 31;

/// Bytes that are kept for a reader who is slow, where more than one may read.
const LEAST_HISTORY: u64 = 64 << 10;

/// Most bytes of a history.
const MOST_HISTORY: u64 = 64 << 20;

/// `--port [console,][name=NAME,]WHERE[,history=SIZE][,on-full=wait|drop]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PortConfig {
    /// The word in front, where there is one.
    pub kind: Option<Kind>,
    pub name: Option<String>,
    pub stdio: bool,
    pub pty: bool,
    /// A symbolic link to the pseudo-terminal.
    pub link: Option<PathBuf>,
    pub unix: Option<PathBuf>,
    /// Connect to the unix socket instead of listening on it.
    pub connect: bool,
    pub tcp: Option<String>,
    pub file: Option<PathBuf>,
    pub pipe: Option<PathBuf>,
    pub log: Option<ByteSize>,
    pub fd: Option<RawFd>,
    pub history: Option<ByteSize>,
    pub on_full: Option<OnFull>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The guest has a terminal on it: hvc0 and so on.
    Console,
}

/// What becomes of what the guest writes and nobody reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// The guest's writer waits.
    Wait,
    /// The oldest of it goes, and it is said how much that was.
    Drop,
}

impl OnFull {
    fn word(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Drop => "drop",
        }
    }
}

/// A port that can be opened.
#[derive(Debug, Clone, PartialEq)]
pub struct PortSpec {
    pub name: Option<String>,
    pub is_console: bool,
    pub place: Place,
    /// `None`: one client at a time, which gets every byte once.
    pub shared: Option<Sharing>,
}

/// Any number of clients see what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharing {
    /// Bytes shown to who attaches.
    pub history: u64,
    /// Bytes kept for who reads slowly; not less.
    pub capacity: u64,
    pub on_full: OnFull,
}

/// Where the other end is.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    Stdio,
    Pty { link: Option<PathBuf> },
    UnixListen(PathBuf),
    UnixConnect(PathBuf),
    Tcp(SocketAddr),
    File(PathBuf),
    Pipe(PathBuf),
    Log,
    Inherited(RawFd),
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PortError {
    #[error("it takes one of: stdio, pty, unix=PATH, tcp=ADDRESS:PORT, file=PATH, pipe=PATH, log=SIZE, fd=N")]
    OnePlace,
    #[error("'{0}' is for {1}")]
    For(&'static str, &'static str),
    #[error("name= is needed, for whoever is to find the port in the guest; or 'console' in front")]
    Nameless,
    #[error("name={0:?}: a name has 1 to {MAX_NAME_LEN} bytes of printable ASCII, without '/'")]
    Name(String),
    #[error("{key}={path}: a path has 1 to {MAX_PATH_LEN} bytes", path = .path.display())]
    Path { key: &'static str, path: PathBuf },
    #[error(
        "tcp={0}: an address of this host's own and a port are needed, such as 127.0.0.1:4444 or [::1]:4444"
    )]
    Tcp(String),
    #[error("{key}={size}: 1 byte to 64M are possible")]
    Size { key: &'static str, size: ByteSize },
}

/// Has whoever serves a console on `socket` look at the size of `terminal`: a byte with a descriptor is not typed.
///
/// # Errors
/// The socket takes nothing now, or never again.
pub fn send_terminal(socket: BorrowedFd<'_>, terminal: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [terminal];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags)?;
    Ok(())
}

/// Reads the value of `--port`.
pub fn parse(text: &str) -> Result<PortConfig, OptionError> {
    options::parse(text, Some("kind"))
}

impl PortConfig {
    pub fn validate(self) -> Result<PortSpec, PortError> {
        let is_console = self.kind == Some(Kind::Console);
        if let Some(name) = self.name.as_ref().filter(|name| !is_name(name)) {
            return Err(PortError::Name(name.clone()));
        }
        if !is_console && self.name.is_none() {
            return Err(PortError::Nameless);
        }
        let place = self.place()?;
        let shared = self.sharing(is_console)?;
        Ok(PortSpec { name: self.name, is_console, place, shared })
    }

    /// The text that [`parse`] makes this of.
    pub fn to_text(&self) -> String {
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let size = |size: ByteSize| size.0.to_string();
        let switch = |on: bool| on.then(|| "on".to_owned());
        let words = [
            ("name", self.name.clone()),
            ("stdio", switch(self.stdio)),
            ("pty", switch(self.pty)),
            ("link", self.link.as_ref().map(path)),
            ("unix", self.unix.as_ref().map(path)),
            ("connect", switch(self.connect)),
            ("tcp", self.tcp.clone()),
            ("file", self.file.as_ref().map(path)),
            ("pipe", self.pipe.as_ref().map(path)),
            ("log", self.log.map(size)),
            ("fd", self.fd.map(|fd| fd.to_string())),
            ("history", self.history.map(size)),
            ("on-full", self.on_full.map(|on_full| on_full.word().to_owned())),
        ];
        let words = words.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        let kind = self.kind.map(|_| "console".to_owned());
        let words: Vec<String> = kind.into_iter().chain(words).map(|word| word.replace(',', ",,")).collect();
        words.join(",")
    }

    fn place(&self) -> Result<Place, PortError> {
        let places = [
            self.stdio.then_some(Place::Stdio),
            self.pty.then(|| Place::Pty { link: self.link.clone() }),
            self.unix.as_ref().map(|path| match self.connect {
                true => Place::UnixConnect(path.clone()),
                false => Place::UnixListen(path.clone()),
            }),
            self.tcp.as_deref().map(loopback).transpose()?.map(Place::Tcp),
            self.file.clone().map(Place::File),
            self.pipe.clone().map(Place::Pipe),
            self.log.map(|_| Place::Log),
            self.fd.map(Place::Inherited),
        ];
        let mut given = places.into_iter().flatten();
        let (Some(place), None) = (given.next(), given.next()) else { return Err(PortError::OnePlace) };
        if self.connect && self.unix.is_none() {
            return Err(PortError::For("connect", "unix="));
        }
        if self.link.is_some() && !self.pty {
            return Err(PortError::For("link=", "pty"));
        }
        let paths = [("unix", &self.unix), ("file", &self.file), ("pipe", &self.pipe), ("link", &self.link)];
        for (key, path) in paths {
            if let Some(path) =
                path.as_ref().filter(|path| !(1..=MAX_PATH_LEN).contains(&path.as_os_str().len()))
            {
                return Err(PortError::Path { key, path: path.clone() });
            }
        }
        Ok(place)
    }

    /// A console is for people, who come and look what there was; other ports are for programs, which take turns.
    fn sharing(&self, is_console: bool) -> Result<Option<Sharing>, PortError> {
        for (key, size) in [("history", self.history), ("log", self.log)] {
            if let Some(size) = size.filter(|size| size.0 > MOST_HISTORY || key == "log" && size.0 == 0) {
                return Err(PortError::Size { key, size });
            }
        }
        if !is_console && self.history.is_none() && self.log.is_none() {
            return match self.on_full {
                Some(OnFull::Drop) => {
                    Err(PortError::For("on-full=drop", "consoles, logs, and ports with history="))
                }
                _ => Ok(None),
            };
        }
        let history = self.history.map_or(0, ByteSize::bytes);
        let capacity = self.log.map_or(LEAST_HISTORY, ByteSize::bytes).max(history);
        Ok(Some(Sharing { history, capacity, on_full: self.on_full.unwrap_or(OnFull::Drop) }))
    }
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

fn loopback(text: &str) -> Result<SocketAddr, PortError> {
    let address: Option<SocketAddr> = text.parse().ok();
    address.filter(|address| address.ip().is_loopback()).ok_or_else(|| PortError::Tcp(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<PortSpec, String> {
        parse(text).map_err(|error| error.to_string())?.validate().map_err(|error| error.to_string())
    }

    #[test]
    fn a_port_is_a_kind_a_name_and_a_place() {
        let console = spec("console,pty,link=/run/tty").unwrap();
        assert!(console.is_console && console.name.is_none());
        assert_eq!(console.place, Place::Pty { link: Some("/run/tty".into()) });
        let sharing = Sharing { history: 0, capacity: LEAST_HISTORY, on_full: OnFull::Drop };
        assert_eq!(console.shared, Some(sharing));
        let agent = spec("name=org.qemu.guest_agent.0,unix=/run/a=b").unwrap();
        assert_eq!(agent.place, Place::UnixListen("/run/a=b".into()));
        assert_eq!((agent.name.as_deref(), agent.shared), (Some("org.qemu.guest_agent.0"), None));
        assert_eq!(spec("name=a,unix=/x,connect").unwrap().place, Place::UnixConnect("/x".into()));
        let log = spec("name=a,log=1M,history=64K").unwrap();
        let sharing = Sharing { history: 64 << 10, capacity: 1 << 20, on_full: OnFull::Drop };
        assert_eq!((log.place, log.shared), (Place::Log, Some(sharing)));
        assert_eq!(spec("name=a,tcp=[::1]:70").unwrap().place, Place::Tcp("[::1]:70".parse().unwrap()));
        let sharing = spec("console,stdio,history=1M,on-full=wait").unwrap().shared.unwrap();
        assert_eq!((sharing.history, sharing.capacity, sharing.on_full), (1 << 20, 1 << 20, OnFull::Wait));
    }

    #[test]
    fn a_port_is_written_as_it_is_read() {
        for text in [
            "console,pty,link=/run/a,,b",
            "name=a,unix=/x,connect",
            "console,stdio,history=64K,on-full=wait",
            "name=a,tcp=127.0.0.1:1",
            "console,name=c,fd=4,on-full=drop",
            "name=f,file=/f",
            "name=p,pipe=/p",
            "name=l,log=1M",
        ] {
            let port = parse(text).unwrap();
            assert_eq!(parse(&port.to_text()), Ok(port), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_right() {
        for (text, wanted) in [
            ("console", "it takes one of"),
            ("console,pty,stdio", "it takes one of"),
            ("unix=/x", "name= is needed"),
            ("pty", "'pty' is not one of: console"),
            ("name=a b,pty", "a name has"),
            ("name=,pty", "a name has"),
            ("name=a,tcp=10.0.0.1:1", "an address of this host's own"),
            ("name=a,tcp=localhost", "an address of this host's own"),
            ("name=a,log=0", "1 byte to 64M"),
            ("console,pty,history=1G", "1 byte to 64M"),
            ("name=a,pty,connect", "'connect' is for unix="),
            ("name=a,unix=/x,link=/y", "'link=' is for pty"),
            ("name=a,unix=/x,on-full=drop", "consoles"),
            ("name=a,unix=/x,nmae=b", "did you mean 'name'"),
        ] {
            let said = spec(text).unwrap_err();
            assert!(said.contains(wanted), "{text}: {said}");
        }
    }
}
