//! The socket a daemon is reached by: one it listens on, or one it was started with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cleave_common::exit::{ExitCode, Failure};
use cleave_common::socket::{ListenError, MAX_PATH_LEN, SocketFile, listen};
use rustix::net::{AddressFamily, SocketType, sockopt};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("a daemon is already listening on {}: stop it, or choose another --socket-path", .0.display())]
    InUse(PathBuf),
    #[error("{} exists and is not a socket: choose another --socket-path", .0.display())]
    NotASocket(PathBuf),
    #[error("{} is another program's socket, of another kind (datagram or seqpacket): choose another --socket-path", .0.display())]
    OtherKind(PathBuf),
    #[error(
        "--socket-path has {0} bytes, and the path of a unix socket at most {MAX_PATH_LEN}: choose a shorter one"
    )]
    TooLong(usize),
    #[error("cannot listen on {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("--fd={fd} is not an open unix stream socket")]
    BadFd { fd: RawFd },
}

impl From<SocketError> for Failure {
    fn from(error: SocketError) -> Self {
        let code = match &error {
            SocketError::Listen { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Host
            }
            SocketError::InUse(_) => ExitCode::Host,
            _ => ExitCode::Usage,
        };
        Self::new(code, error)
    }
}

/// Where frontends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// Any number of frontends, one after the other.
    Listening(Listener),
    /// One frontend, whose end is the daemon's end.
    Connected(UnixStream),
}

/// A listening socket, and its file if it is ours to remove.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let (socket, file) = listen(path).map_err(|error| match error {
            ListenError::InUse => SocketError::InUse(path.to_owned()),
            ListenError::NotASocket => SocketError::NotASocket(path.to_owned()),
            ListenError::OtherKind => SocketError::OtherKind(path.to_owned()),
            ListenError::TooLong(length) => SocketError::TooLong(length),
            ListenError::Io(source) => SocketError::Listen { path: path.to_owned(), source },
        })?;
        Ok(Self { socket, file: Some(file) })
    }

    /// The file that is to be removed in the end.
    pub(crate) fn file_path(&self) -> Option<&Path> {
        self.file.as_ref().map(SocketFile::path)
    }

    /// The next frontend, if one is there.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Endpoint {
    /// As [`Listener::file_path`].
    pub(crate) fn socket_file(&self) -> Option<&Path> {
        match self {
            Self::Listening(listener) => listener.file_path(),
            Self::Connected(_) => None,
        }
    }

    /// Takes over descriptor `fd`, with which the process was started. One that listens is listened on.
    pub fn inherited(fd: RawFd) -> Result<Self, SocketError> {
        let owned = take_inherited(fd).ok_or(SocketError::BadFd { fd })?;
        let bad = |_| SocketError::BadFd { fd };
        let kind = (sockopt::socket_domain(&owned), sockopt::socket_type(&owned));
        if kind != (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM)) {
            return Err(SocketError::BadFd { fd });
        }
        rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).map_err(bad)?;
        if sockopt::socket_acceptconn(&owned).map_err(bad)? {
            let socket = UnixListener::from(owned);
            // A frontend that gives up between poll and accept must not make accept wait for the next one.
            socket.set_nonblocking(true).map_err(|_| SocketError::BadFd { fd })?;
            return Ok(Self::Listening(Listener { socket, file: None }));
        }
        Ok(Self::Connected(UnixStream::from(owned)))
    }
}

/// Closes every descriptor but the standard streams and those to `keep`: what whoever started this process left open by
/// mistake is nothing that a guest should be able to reach.
#[expect(unsafe_code, reason = "descriptors are numbers until somebody owns them")]
pub(crate) fn close_inherited(keep: &[RawFd]) {
    let close = |first: u32, last: u32| {
        if first <= last {
            // SAFETY: nothing in this process owns a descriptor yet. A kernel without this call closes none.
            unsafe { libc::close_range(first, last, 0) };
        }
    };
    let mut keep: Vec<u32> =
        keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        close(first, fd.saturating_sub(1));
        first = fd.saturating_add(1);
    }
    close(first, u32::MAX);
}

#[expect(unsafe_code, reason = "an inherited descriptor is a number until somebody owns it")]
pub(crate) fn take_inherited(fd: RawFd) -> Option<OwnedFd> {
    // 0 to 2 are the standard streams, which the process itself uses.
    if fd <= 2 {
        return None;
    }
    // SAFETY: only borrowed to ask the kernel whether it is open.
    let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok();
    // SAFETY: it is open, and was before any of our own: these are taken first in main, each once, so nothing owns it.
    open.then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
