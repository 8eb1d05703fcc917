//! What the keeper tells the daemon: one message each, and the socket of a passt that serves with it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Bytes of a message.
const MAX_LEN: usize = 1024;
/// Bytes before the text.
const FIXED: usize = 5;

const SERVING: u8 = 1;
const ENDED: u8 = 2;
const FAILED: u8 = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Report {
    /// There is a passt that serves: the message has its socket.
    Serving { pid: u32 },
    /// It has ended, with this wait status; with its last words, if it never served.
    Ended { status: i32, said: String },
    /// It cannot even be started: the system's error.
    Failed(i32),
}

/// What was found on the control socket.
#[derive(Debug)]
pub(super) enum Received {
    Report(Report, Option<OwnedFd>),
    Nothing,
    /// The keeper is no more.
    Gone,
}

impl Report {
    fn encode(&self) -> Vec<u8> {
        let (kind, number, text) = match self {
            Self::Serving { pid } => (SERVING, pid.cast_signed(), ""),
            Self::Ended { status, said } => (ENDED, *status, said.as_str()),
            Self::Failed(errno) => (FAILED, *errno, ""),
        };
        let mut bytes = vec![kind];
        bytes.extend(number.to_le_bytes());
        bytes.extend(text.bytes().take(MAX_LEN - FIXED));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (fixed, text) = bytes.split_first_chunk::<FIXED>()?;
        let [kind, number @ ..] = *fixed;
        let number = i32::from_le_bytes(number);
        match kind {
            SERVING => Some(Self::Serving { pid: number.cast_unsigned() }),
            ENDED => Some(Self::Ended { status: number, said: String::from_utf8_lossy(text).into_owned() }),
            FAILED => Some(Self::Failed(number)),
            _ => None,
        }
    }
}

pub(super) fn send(control: &OwnedFd, report: &Report, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    let sockets: Vec<BorrowedFd<'_>> = socket.into_iter().collect();
    if !sockets.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(control, &[IoSlice::new(&report.encode())], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next one. Whether it waits for one is the socket's to say.
pub(super) fn receive(control: &OwnedFd) -> io::Result<Received> {
    let mut bytes = [0; MAX_LEN];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let len = loop {
        match recvmsg(control, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET) => return Ok(Received::Gone),
            received => break received?.bytes,
        }
    };
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    if len == 0 {
        return Ok(Received::Gone);
    }
    match Report::decode(&bytes[..len]) {
        Some(report) => Ok(Received::Report(report, socket)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn reports_arrive_one_by_one_with_their_sockets() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let ((to, from), (socket, other)) = (pair(), pair());
        assert!(matches!(receive(&from), Ok(Received::Nothing)));
        let said = "Failed to bind".to_owned();
        let reports =
            [Report::Serving { pid: u32::MAX }, Report::Ended { status: 256, said }, Report::Failed(2)];
        for report in &reports {
            let socket = matches!(report, Report::Serving { .. }).then(|| socket.as_fd());
            send(&to, report, socket).unwrap();
        }
        for report in &reports {
            let Ok(Received::Report(received, socket)) = receive(&from) else {
                panic!("{report:?} is missing")
            };
            assert_eq!(received, *report);
            assert_eq!(socket.is_some(), matches!(report, Report::Serving { .. }));
            if let Some(socket) = socket {
                rustix::io::write(&socket, b"x").unwrap();
                assert_eq!(rustix::io::read(&other, &mut [0; 2]), Ok(1), "it is the same one");
            }
        }
        let long = Report::Ended { status: 0, said: "x".repeat(5000) };
        send(&to, &long, None).unwrap();
        assert!(
            matches!(receive(&from), Ok(Received::Report(Report::Ended { said, .. }, None)) if said.len() == 1019)
        );
        rustix::io::write(&to, b"abc").unwrap();
        assert!(receive(&from).is_err());
        drop(to);
        assert!(matches!(receive(&from), Ok(Received::Gone)));
    }
}
