//! The socket a daemon is reached by: one it listens on, or one it was started with.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cleave_common::exit::{ExitCode, Failure};
use rustix::net::{AddressFamily, sockopt};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("a daemon is already listening on {}: stop it, or choose another --socket-path", .0.display())]
    InUse(PathBuf),
    #[error("{} exists and is not a socket: choose another --socket-path", .0.display())]
    NotASocket(PathBuf),
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

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that another daemon's socket of the same path is left alone.
    id: (u64, u64),
}

impl Listener {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) if is_alive(path).map_err(failed)? => return Err(SocketError::InUse(path.to_owned())),
            Ok(_) => fs::remove_file(path).map_err(failed)?,
        }
        let socket = UnixListener::bind(path).map_err(failed)?;
        let meta = fs::symlink_metadata(path).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), id: (meta.dev(), meta.ino()) };
        Self::over(socket, Some(file)).map_err(failed)
    }

    fn over(socket: UnixListener, file: Option<SocketFile>) -> io::Result<Self> {
        // A frontend that gives up between poll and accept must not make accept wait for the next one.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file })
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

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.file = None;
    }
}

/// Whether somebody listens on the socket at `path`. The probe does not wait for a full backlog.
fn is_alive(path: &Path) -> io::Result<bool> {
    use rustix::net::{SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl Endpoint {
    /// The file that is to be removed in the end.
    pub(crate) fn socket_file(&self) -> Option<&Path> {
        match self {
            Self::Listening(Listener { file: Some(file), .. }) => Some(&file.path),
            _ => None,
        }
    }

    /// Takes over descriptor `fd`, with which the process was started. One that listens is listened on.
    pub fn inherited(fd: RawFd) -> Result<Self, SocketError> {
        let owned = take_inherited(fd).ok_or(SocketError::BadFd { fd })?;
        let bad = |_| SocketError::BadFd { fd };
        if sockopt::socket_domain(&owned).ok() != Some(AddressFamily::UNIX) {
            return Err(SocketError::BadFd { fd });
        }
        rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).map_err(bad)?;
        if sockopt::socket_acceptconn(&owned).map_err(bad)? {
            let listener = Listener::over(UnixListener::from(owned), None);
            return listener.map(Self::Listening).map_err(|_| SocketError::BadFd { fd });
        }
        Ok(Self::Connected(UnixStream::from(owned)))
    }
}

/// Closes every descriptor but the standard streams and `keep`: what whoever started this process left open by mistake is
/// nothing that a guest should be able to reach.
#[expect(unsafe_code, reason = "descriptors are numbers until somebody owns them")]
pub(crate) fn close_inherited(keep: Option<RawFd>) {
    let close = |first: u32, last: u32| {
        if first <= last {
            // SAFETY: nothing in this process owns a descriptor yet. A kernel without this call closes none.
            unsafe { libc::close_range(first, last, 0) };
        }
    };
    match keep.and_then(|keep| u32::try_from(keep).ok()).filter(|keep| *keep > 2) {
        Some(keep) => {
            close(3, keep - 1);
            close(keep.saturating_add(1), u32::MAX);
        }
        None => close(3, u32::MAX),
    }
}

#[expect(unsafe_code, reason = "an inherited descriptor is a number until somebody owns it")]
fn take_inherited(fd: RawFd) -> Option<OwnedFd> {
    // 0 to 2 are the standard streams, which the process itself uses.
    if fd <= 2 {
        return None;
    }
    // SAFETY: only borrowed to ask the kernel whether it is open.
    let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok();
    // SAFETY: it is open, and was before any of our own: `--fd` is read first in main, so nothing here owns it.
    open.then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
