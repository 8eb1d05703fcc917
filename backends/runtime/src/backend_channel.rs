//! The socket on which a backend may speak first (vhost-user, "Back-end communication").
//!
//! Invariant: nobody waits for it. What it has no room for is not sent: the frontend has as much to read already, and finds
//! the present state when it does.

use std::os::fd::OwnedFd;

use cleave_common::vhost_user::{BackendRequest, Flags, Header};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tracing::warn;

/// The frontend's SET_BACKEND_REQ_FD, as long as it works.
#[derive(Debug, Default)]
pub(crate) struct BackendChannel(Option<OwnedFd>);

impl BackendChannel {
    /// `None`: `fd` is no socket.
    pub(crate) fn over(fd: OwnedFd) -> Option<Self> {
        let is_socket =
            fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
        is_socket.then_some(Self(Some(fd)))
    }

    /// BACKEND_CONFIG_CHANGE_MSG: config space is to be read again. It has no payload, and no answer is asked for.
    pub(crate) fn config_changed(&mut self) {
        let Some(fd) = &self.0 else { return };
        let header =
            Header { request: BackendRequest::ConfigChangeMsg.into(), flags: Flags::REQUEST, size: 0 }
                .encode();
        let problem = match send(fd, &header, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == header.len() => return,
            // It has been told already.
            Err(Errno::AGAIN) => return,
            Ok(sent) => format!("it took {sent} bytes of {}", header.len()),
            Err(errno) => errno.to_string(),
        };
        warn!("the frontend is not told of changes any more: {problem}");
        self.0 = None;
    }
}
