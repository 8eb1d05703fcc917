//! A passt that a test plays: it hands its socket and its arguments to whoever listens at PATH, and ends with the code that
//! comes back, or with 0 when that one goes.
//!
//!     fake-passt PATH [ARGUMENTS OF PASST]... --fd N
#![expect(unsafe_code, reason = "an inherited descriptor is a number until somebody owns it")]

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some((path, [arguments @ .., option, fd])) = words.split_first() else { return ExitCode::from(2) };
    let Some(fd) = fd.parse::<RawFd>().ok().filter(|fd| option == "--fd" && *fd > 2) else {
        return ExitCode::from(2);
    };
    // SAFETY: it was inherited, and nothing here owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match hand_over(path, &arguments.join(" "), socket) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("fake-passt: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hand_over(path: &str, arguments: &str, socket: OwnedFd) -> io::Result<u8> {
    let mut test = UnixStream::connect(path)?;
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    let sockets = [socket.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
    sendmsg(&test, &[IoSlice::new(arguments.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    drop(socket);
    eprintln!("fake-passt: handed over");
    let mut code = [0];
    test.read_exact(&mut code).or_else(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Ok(()),
        _ => Err(error),
    })?;
    Ok(code[0])
}
