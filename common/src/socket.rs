//! A unix socket to listen on, whose file is ours: one that nobody listens on any more is replaced, and what is somebody
//! else's is left alone.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The longest path of a unix socket in bytes: sun_path with its NUL is 108 (unix(7)).
pub const MAX_PATH_LEN: usize = 107;

/// Why nobody can listen at a path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("a program is already listening there")]
    InUse,
    #[error("it exists and is not a socket; it is left alone")]
    NotASocket,
    #[error("a program has a socket of another kind there (datagram or seqpacket); it is left alone")]
    OtherKind,
    #[error("the path has {0} bytes, and that of a unix socket at most {MAX_PATH_LEN}")]
    TooLong(usize),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A socket's file, removed when this is dropped unless it is another one by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl SocketFile {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Listens on `path`, without ever waiting. The listener does not block.
///
/// # Errors
/// When somebody listens there, when it is no socket, and when the system refuses.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let length = path.as_os_str().len();
    if length > MAX_PATH_LEN {
        return Err(ListenError::TooLong(length));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket),
        Ok(_) if is_alive(path)? => return Err(ListenError::InUse),
        Ok(_) => fs::remove_file(path)?,
    }
    let listener = UnixListener::bind(path)?;
    // A peer that gives up between poll and accept must not make accept wait for the next one.
    listener.set_nonblocking(true)?;
    let found = fs::symlink_metadata(path)?;
    Ok((listener, SocketFile { path: path.to_owned(), id: (found.dev(), found.ino()) }))
}

/// Whether somebody listens on the socket at `path`. The probe does not wait for a full backlog.
fn is_alive(path: &Path) -> Result<bool, ListenError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
    match connect(&probe, &SocketAddrUnix::new(path).map_err(io::Error::from)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(Errno::PROTOTYPE) => Err(ListenError::OtherKind),
        Err(errno) => Err(io::Error::from(errno).into()),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.id) {
            // Somebody may have removed it just now: then there is nothing to tidy.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced_and_any_other_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(ListenError::InUse)));

        // A backlog that is full: a connect that waited would wait here for ever.
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting: Vec<_> = (0..2)
            .map(|_| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let peer = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
                let _ = connect(&peer, &SocketAddrUnix::new(&path).unwrap());
                peer
            })
            .collect();
        assert!(matches!(listen(&path), Err(ListenError::InUse)));

        fs::remove_file(&path).unwrap();
        let (_other, others) = listen(&path).unwrap();
        drop(file);
        assert!(path.exists(), "it is another one's by now");
        drop(others);
        assert!(!path.exists());
        fs::write(&path, "text").unwrap();
        assert!(matches!(listen(&path), Err(ListenError::NotASocket)));

        let datagrams = directory.path().join("b.sock");
        let _other = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
        assert!(matches!(listen(&datagrams), Err(ListenError::OtherKind)));
        assert!(datagrams.exists());
        let long = directory.path().join("x".repeat(MAX_PATH_LEN));
        assert!(matches!(listen(&long), Err(ListenError::TooLong(length)) if length > MAX_PATH_LEN));
    }
}
