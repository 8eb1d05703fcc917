//! Opens what `--port` names, before there is a sandbox.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cleave_common::exit::Failure;
use cleave_common::port::Place;
use cleave_common::socket::{self, ListenError, SocketFile};
use rustix::fs::{FileType, Mode, OFlags, fstat};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};

use super::{Ends, Kind, Source};
use crate::terminal::Terminal;

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("--port unix={}", path.display())]
    Listen { path: PathBuf, source: ListenError },
    #[error("--port {what}")]
    Io { what: String, source: io::Error },
    #[error("--port link={}: it exists and is not a symbolic link; it is left alone", .0.display())]
    NotALink(PathBuf),
    #[error("--port pipe={}: it exists and is not a FIFO; it is left alone", .0.display())]
    NotAFifo(PathBuf),
    #[error("a listening socket is needed for such a port")]
    NoListener,
    #[error("--port fd={0}: it is not open, or is given twice")]
    NotOpen(i32),
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Io { .. } => Self::host(error),
            _ => Self::usage(error),
        }
    }
}

/// A port's other end, and what is to be done when it is over.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) source: Source,
    /// Removed with this.
    pub(crate) file: Option<NamedFile>,
    /// Given back with this.
    pub(crate) terminal: Option<Terminal>,
}

/// A file by which the port is found.
#[derive(Debug)]
pub(crate) enum NamedFile {
    Socket(SocketFile),
    /// By its device and inode.
    Link {
        path: PathBuf,
        id: (u64, u64),
    },
}

impl NamedFile {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Socket(file) => file.path(),
            Self::Link { path, .. } => path,
        }
    }
}

impl Drop for NamedFile {
    fn drop(&mut self) {
        if let Self::Link { path, id } = self
            && fs::symlink_metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == *id)
        {
            let _ = fs::remove_file(path);
        }
    }
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> OpenError {
    let what = what.into();
    move |error| OpenError::Io { what, source: error.into() }
}

/// `inherited`: the descriptor of `fd=N`, if it is open.
pub(crate) fn open(place: &Place, inherited: Option<OwnedFd>) -> Result<Opened, OpenError> {
    let plain = |source| Opened { source, file: None, terminal: None };
    Ok(match place {
        Place::Stdio => stdio()?,
        Place::Pty { link } => pty(link.as_deref())?,
        Place::UnixListen(path) => {
            let (listener, file) =
                socket::listen(path).map_err(|source| OpenError::Listen { path: path.clone(), source })?;
            Opened { file: Some(NamedFile::Socket(file)), ..plain(Source::Listen(listener.into())) }
        }
        Place::UnixConnect(path) => plain(Source::Connect(path.clone())),
        Place::Tcp(address) => {
            let listener = TcpListener::bind(address).map_err(failed(format!("tcp={address}")))?;
            listener.set_nonblocking(true).map_err(failed(format!("tcp={address}")))?;
            plain(Source::Listen(listener.into()))
        }
        Place::File(path) => {
            // A FIFO without a reader is refused this way; otherwise its opening would wait for one.
            let flags = OFlags::NONBLOCK.bits() as i32;
            let file =
                OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(flags).open(path);
            let file: OwnedFd = file.map_err(failed(format!("file={}", path.display())))?.into();
            plain(file_end(file))
        }
        Place::Pipe(path) => plain(pipe(path)?),
        Place::Log => plain(Source::Fixed(None)),
        Place::Inherited(number) => plain(fd(inherited.ok_or(OpenError::NotOpen(*number))?, *number)?),
    })
}

fn kind_of(fd: BorrowedFd<'_>) -> Kind {
    match fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::Socket) => Kind::Socket,
        Ok(FileType::RegularFile) => Kind::File,
        _ => Kind::Other,
    }
}

/// The same file opened once more where that is possible, so that it can be read and written without waiting while others
/// who have it wait as they like.
fn unblocked(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    if matches!(kind_of(fd), Kind::Other) {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(again) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok(again);
        }
        // It may be somebody else's (su).
        let own = fd.try_clone_to_owned()?;
        rustix::io::ioctl_fionbio(&own, true)?;
        return Ok(own);
    }
    fd.try_clone_to_owned()
}

fn stdio() -> Result<Opened, OpenError> {
    let (stdin, stdout) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    let input = unblocked(stdin, OFlags::RDONLY).map_err(failed("stdio"))?;
    let output = unblocked(stdout, OFlags::WRONLY).map_err(failed("stdio"))?;
    let terminal = isatty(stdin).then(Terminal::take).transpose().map_err(failed("stdio"))?;
    let ends = Ends { kind: kind_of(output.as_fd()), input: Some(input), output: Some(output) };
    Ok(Opened { source: Source::Fixed(Some(ends)), file: None, terminal })
}

fn pty(link: Option<&Path>) -> Result<Opened, OpenError> {
    let what = || failed::<rustix::io::Errno>("pty");
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(what())?;
    grantpt(&master).map_err(what())?;
    unlockpt(&master).map_err(what())?;
    let path = ptsname(&master, Vec::new()).map_err(what())?.to_string_lossy().into_owned();
    let slave: OwnedFd = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits() as i32)
        .open(&path)
        .map_err(failed("pty"))?
        .into();
    // The guest has its own line discipline: no echo of what it prints back into it.
    let mut raw = tcgetattr(&slave).map_err(what())?;
    raw.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &raw).map_err(what())?;
    rustix::io::ioctl_fionbio(&master, true).map_err(what())?;
    let file = link.map(|link| point(link, Path::new(&path))).transpose()?;
    match link {
        Some(link) => eprintln!("cleave-serial: a port is at {path}, and at {}", link.display()),
        None => eprintln!("cleave-serial: a port is at {path}"),
    }
    Ok(Opened { source: pty_ends(master, slave)?, file, terminal: None })
}

pub(super) fn pty_ends(master: OwnedFd, slave: OwnedFd) -> Result<Source, OpenError> {
    let output = master.try_clone().map_err(failed("pty"))?;
    Ok(Source::Fixed(Some(Ends { input: Some(master), output: Some(output), kind: Kind::Pty { slave } })))
}

pub(super) fn file_end(file: OwnedFd) -> Source {
    Source::Fixed(Some(Ends { input: None, kind: kind_of(file.as_fd()), output: Some(file) }))
}

/// A listening socket from elsewhere.
pub(super) fn listener(fd: OwnedFd) -> Result<Source, OpenError> {
    let listens = rustix::net::sockopt::socket_acceptconn(&fd).unwrap_or(false);
    if !listens {
        return Err(OpenError::NoListener);
    }
    rustix::io::ioctl_fionbio(&fd, true).map_err(failed("a listening socket"))?;
    Ok(Source::Listen(fd))
}

/// Makes `link` lead to `target`, in place of one that led elsewhere.
fn point(link: &Path, target: &Path) -> Result<NamedFile, OpenError> {
    match fs::symlink_metadata(link) {
        Ok(found) if !found.file_type().is_symlink() => return Err(OpenError::NotALink(link.to_owned())),
        Ok(_) => fs::remove_file(link).map_err(failed(format!("link={}", link.display())))?,
        Err(_) => {}
    }
    let what = || failed::<io::Error>(format!("link={}", link.display()));
    std::os::unix::fs::symlink(target, link).map_err(what())?;
    let found = fs::symlink_metadata(link).map_err(what())?;
    Ok(NamedFile::Link { path: link.to_owned(), id: (found.dev(), found.ino()) })
}

/// PATH.in and PATH.out, made where they are not. Both are opened to read and write: so they do not wait for their other
/// side, and do not hang up with it.
fn pipe(path: &Path) -> Result<Source, OpenError> {
    let end = |suffix: &str| {
        let mut path = path.as_os_str().to_owned();
        path.push(suffix);
        let path = PathBuf::from(path);
        let what = format!("pipe={}", path.display());
        match rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(failed(what)(errno)),
        }
        if !fs::metadata(&path).is_ok_and(|found| found.file_type().is_fifo()) {
            return Err(OpenError::NotAFifo(path));
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::empty()).map_err(failed(what))
    };
    let ends = Ends { input: Some(end(".in")?), output: Some(end(".out")?), kind: Kind::Other };
    Ok(Source::Fixed(Some(ends)))
}

/// A descriptor from whoever started this program: a listening socket, or an open end.
fn fd(fd: OwnedFd, number: i32) -> Result<Source, OpenError> {
    let what = || failed::<io::Error>(format!("fd={number}"));
    if rustix::net::sockopt::socket_acceptconn(&fd).unwrap_or(false) {
        return listener(fd);
    }
    let kind = kind_of(fd.as_fd());
    let fd = unblocked(fd.as_fd(), OFlags::RDWR).map_err(what())?;
    let output = fd.try_clone().map_err(what())?;
    Ok(Source::Fixed(Some(Ends { input: Some(fd), output: Some(output), kind })))
}
