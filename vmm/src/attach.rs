//! `cleave console`: this terminal at a machine's console, until it is detached.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::exit::{ExitCode, Failure};
use cleave_common::port;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};

use crate::bus::Caught;
use crate::legacy::terminal::Terminal;

/// Ctrl-].
const DETACH: u8 = 0x1d;

#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("cannot attach to {path}: does a machine have --console unix= there, and does it run?")]
    Connect { path: String, source: io::Error },
    #[error("the connection is lost")]
    Lost(#[source] io::Error),
}

/// Copies between standard input and output and the console at `path`, until Ctrl-] is typed, or one of them ends.
pub fn attach(path: &Path) -> Result<(), Failure> {
    let console = connect(path).map_err(|source| {
        Failure::device(AttachError::Connect { path: path.display().to_string(), source })
    })?;
    let mut terminal = Terminal::take().map_err(Failure::host)?;
    let mut resized = Caught::of(&[SIGWINCH]).map_err(Failure::host)?;
    let mut ended = Caught::of(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::host)?;
    if terminal.is_some() {
        eprintln!("cleave: attached to {}; Ctrl-] detaches", path.display());
    }
    let mut typing = true;
    let mut tell_size = terminal.is_some();
    loop {
        if std::mem::take(&mut tell_size) {
            // A console that takes nothing now is told at the next change.
            let _ = port::send_terminal(console.as_fd(), rustix::stdio::stdin());
        }
        let [input, output] = wait(&console, terminal.as_ref(), &resized, &ended, typing);
        if let Some(terminal) = &mut terminal {
            terminal.serve();
        }
        tell_size = resized.take() > 0 && terminal.is_some();
        if ended.take() > 0 {
            break;
        }
        if output && !print(&console)? {
            break;
        }
        if input && terminal.as_ref().is_none_or(Terminal::is_ours) {
            match type_into(&console, io::stdin().is_terminal())? {
                Typed::More => {}
                Typed::End => typing = false,
                Typed::Detached => break,
            }
        }
    }
    drop(terminal);
    eprintln!("\ncleave: detached from {}", path.display());
    Ok(())
}

/// Nobody listening at a socket that is there may mean that its daemon is just being started again.
fn connect(path: &Path) -> io::Result<UnixStream> {
    const RESTART: Duration = Duration::from_secs(3);
    let deadline = Instant::now() + RESTART;
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

/// Waits for something; whether it is input, output.
fn wait(
    console: &UnixStream,
    terminal: Option<&Terminal>,
    resized: &Caught,
    ended: &Caught,
    typing: bool,
) -> [bool; 2] {
    let keys = if typing { PollFlags::IN } else { PollFlags::empty() };
    let mut fds = vec![
        PollFd::from_borrowed_fd(rustix::stdio::stdin(), keys),
        PollFd::new(console, PollFlags::IN),
        PollFd::new(resized, PollFlags::IN),
        PollFd::new(ended, PollFlags::IN),
    ];
    let signals = terminal.map(Terminal::fds).into_iter().flatten();
    fds.extend(signals.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    // A signal or a failure only means one look too many.
    let _ = poll(&mut fds, None);
    [typing && !fds[0].revents().is_empty(), !fds[1].revents().is_empty()]
}

/// `false`: the console has ended.
fn print(mut console: &UnixStream) -> Result<bool, Failure> {
    let mut chunk = [0; 4096];
    match io::Read::read(&mut console, &mut chunk) {
        Ok(0) => Ok(false),
        Ok(count) => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&chunk[..count]).and_then(|()| stdout.flush()).map_err(Failure::host)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(Failure::new(ExitCode::Device, AttachError::Lost(error))),
    }
}

enum Typed {
    More,
    /// Standard input has ended.
    End,
    Detached,
}

fn type_into(mut console: &UnixStream, has_keys: bool) -> Result<Typed, Failure> {
    let mut chunk = [0; 256];
    let count = match rustix::io::read(rustix::stdio::stdin(), &mut chunk) {
        Ok(0) => return Ok(Typed::End),
        Ok(count) => count,
        Err(Errno::INTR | Errno::AGAIN) => return Ok(Typed::More),
        Err(errno) => return Err(Failure::host(io::Error::from(errno))),
    };
    let keys = &chunk[..count];
    let detach = keys.iter().position(|key| has_keys && *key == DETACH);
    let keys = &keys[..detach.unwrap_or(count)];
    console.write_all(keys).map_err(|error| Failure::new(ExitCode::Device, AttachError::Lost(error)))?;
    Ok(if detach.is_some() { Typed::Detached } else { Typed::More })
}
