//! A thread that starts one device's daemons after the first: to look for a program and to execute it can take as long as
//! the file system likes that has it, and nobody else is to wait for that.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::{Daemon, DaemonError, spawn};
use crate::plan::DaemonSpec;

/// Stack in bytes: there may be 31 of these threads, and they call nothing deep.
const STACK: usize = 256 << 10;

/// The thread. It ends with the process: a daemon dies with the thread that started it.
#[derive(Debug, Clone)]
pub struct Spawner(Sender<DaemonSpec>);

impl Spawner {
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        device: &str,
        report: impl Fn(Result<(Daemon, UnixStream), DaemonError>) + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, wanted) = channel::<DaemonSpec>();
        thread::Builder::new().name(format!("spawn-{device}")).stack_size(STACK).spawn(move || {
            wanted.iter().for_each(|spec| report(spawn(&spec)));
            loop {
                thread::park();
            }
        })?;
        Ok(Self(sender))
    }

    /// Has a daemon started; `report` tells what came of it.
    pub fn spawn(&self, spec: DaemonSpec) {
        // The thread takes them as long as there is this end.
        let _ = self.0.send(spec);
    }
}
