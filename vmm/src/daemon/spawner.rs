//! A thread that starts one device's daemons after the first: to look for a program and to execute it can take as long as
//! the file system likes that has it, and nobody else is to wait for that.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::{Daemon, DaemonError, spawn};
use crate::plan::DaemonSpec;

/// Stack in bytes: there may be 31 of these threads, and they call nothing deep.
const STACK: usize = 256 << 10;

/// The thread. It ends with the process: a daemon dies with the thread that started it.
#[derive(Debug, Clone)]
pub struct Spawner(Sender<Wanted>);

/// A daemon to start, and the file it keeps its state in.
type Wanted = (DaemonSpec, Option<Arc<OwnedFd>>);

impl Spawner {
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        device: &str,
        report: impl Fn(Result<(Daemon, UnixStream), DaemonError>) + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, wanted) = channel::<Wanted>();
        thread::Builder::new().name(format!("spawn-{device}")).stack_size(STACK).spawn(move || {
            wanted.iter().for_each(|(spec, state)| report(spawn(&spec, state.as_deref())));
            loop {
                thread::park();
            }
        })?;
        Ok(Self(sender))
    }

    /// Has a daemon started; `report` tells what came of it.
    pub fn spawn(&self, spec: DaemonSpec, state: Option<Arc<OwnedFd>>) {
        // The thread takes them as long as there is this end.
        let _ = self.0.send((spec, state));
    }
}
