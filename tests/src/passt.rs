//! passt, for what talks to it: one that a test plays, and a real one that is newer than Debian 12's.
//!
//! The one that is played is a program, `fake-passt`, that hands its socket to the test, so that everything about it is
//! real but what it says.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::cache::{self, Cache};
use crate::debian::Apt;
use crate::driver::{PATIENCE, binary};
use crate::error::{Context, Result};

/// A place where passts that are started turn up.
pub struct FakePasst {
    directory: tempfile::TempDir,
    started: Receiver<Played>,
    silent: Arc<AtomicBool>,
}

/// One that was started.
pub struct Played {
    pub arguments: String,
    /// The first frame: the one that only shows when passt reads. Empty while passts are silent.
    pub first: Vec<u8>,
    /// Frames, each behind its length.
    pub stream: UnixStream,
    control: UnixStream,
}

impl FakePasst {
    /// # Panics
    /// There is no room for files, or `fake-passt` is not built.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let program = binary("fake-passt").expect("fake-passt is built");
        let script = format!("#!/bin/sh\nexec {} {} \"$@\"\n", program.display(), socket.display());
        let path = directory.path().join("passt");
        std::fs::write(&path, script).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a program");
        let (sender, started) = channel();
        let silent = Arc::new(AtomicBool::new(false));
        let is_silent = silent.clone();
        thread::spawn(move || accept(&listener, &sender, &is_silent));
        Self { directory, started, silent }
    }

    /// For `--passt`.
    pub fn program(&self) -> PathBuf {
        self.directory.path().join("passt")
    }

    /// From now on those that are started do not read even their first frame, or do again.
    pub fn be_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::SeqCst);
    }

    /// The next one that is started.
    ///
    /// # Panics
    /// There is none.
    pub fn next(&self) -> Played {
        self.next_within(PATIENCE).expect("passt is started")
    }

    pub fn next_within(&self, patience: Duration) -> Option<Played> {
        match self.started.recv_timeout(patience) {
            Ok(played) => Some(played),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("nobody listens for passts"),
        }
    }
}

impl Default for FakePasst {
    fn default() -> Self {
        Self::new()
    }
}

fn accept(listener: &UnixListener, started: &Sender<Played>, silent: &AtomicBool) {
    for control in listener.incoming().flatten() {
        let Ok((arguments, stream)) = take(&control) else { continue };
        let mut played = Played { arguments, first: Vec::new(), stream, control };
        if !silent.load(Ordering::SeqCst) {
            match played.read_frame() {
                Ok(frame) => played.first = frame,
                Err(_) => continue,
            }
        }
        if started.send(played).is_err() {
            return;
        }
    }
}

fn take(control: &UnixStream) -> io::Result<(String, UnixStream)> {
    let mut bytes = [0; 4096];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let len =
        recvmsg(control, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    let socket = socket.ok_or(io::ErrorKind::InvalidData)?;
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok((String::from_utf8_lossy(&bytes[..len]).into_owned(), stream))
}

impl Played {
    /// # Errors
    /// None comes, or only a part of one.
    pub fn read_frame(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame)?;
        Ok(frame)
    }

    /// # Errors
    /// Nobody takes it.
    pub fn write_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        self.stream.write_all(&in_stream(frame))
    }

    /// Ends it, with this code.
    ///
    /// # Errors
    /// It has ended.
    pub fn end(&mut self, code: u8) -> io::Result<()> {
        self.control.write_all(&[code])
    }
}

/// A directory with Debian 13's passt, which serves vhost-user, with the C library it needs: `passt` starts it, wherever the
/// directory is copied to.
///
/// # Errors
/// It cannot be fetched.
pub fn newer(cache: &Cache) -> Result<PathBuf> {
    cache.entry("passt", &cache::key(&[NEWER, STARTER, "1"]), |place| {
        let apt = Apt::of_release(cache, NEWER)?;
        eprintln!("lab: fetching passt of {NEWER} (4 MB)");
        let root = place.join("root");
        ["passt", "libc6"].iter().try_for_each(|package| apt.unpack(package, &root))?;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let files = [LOADER, "libc.so.6"].map(|name| (libraries.join(name), name));
        for (from, name) in files.into_iter().chain([(root.join("usr/bin/passt"), "program")]) {
            std::fs::copy(&from, place.join(name)).context(|| format!("copy {}", from.display()))?;
        }
        std::fs::remove_dir_all(&root).context(|| "remove what is not needed of passt")?;
        let starter = place.join("passt");
        std::fs::write(&starter, STARTER).context(|| "write a starter")?;
        std::fs::set_permissions(&starter, std::fs::Permissions::from_mode(0o755))
            .context(|| "make it executable")
    })
}

const NEWER: &str = "trixie";
const LOADER: &str = "ld-linux-x86-64.so.2";
const STARTER: &str = r#"#!/bin/sh
here=${0%/*}
exec "$here/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$here" --argv0 passt "$here/program" "$@"
"#;

/// A frame behind its length.
pub fn in_stream(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}
