//! qcow2 images: where a disk's bytes are in the files of a chain, and how writes find a place.
//!
//! ```text
//!   a queue's thread                                the image's worker
//!   locate: in a file, as is -----> io_uring
//!           zeros ----------------> memset
//!           anything else --------> pending, job -> imago: read, decompress, allocate, copy, write
//!                                                   all jobs that wait: done, then one write-back of the tables
//!   completion <----------------------------------- no longer pending, done
//! ```
//!
//! imago knows the tables. A queue's thread only ever asks it where something is, and moves the data itself; whatever
//! changes a table, or takes more than moving data, is a job of the one worker.
//!
//! Invariants:
//! 1. A write completes only when all that leads to its data is in the file: data, then refcounts, then L2 entries. A
//!    process that dies at any moment leaves clusters that nobody refers to, and nothing worse.
//! 2. A cluster is written by the rings or by the worker, never by both at one time: what the worker has to write is
//!    *pending* from before the job is sent until the tables are written back, and a write to a pending cluster
//!    becomes a job as well. That is also what keeps a write in place from completing before the entry that an earlier
//!    one made for its cluster is in the file.
//! 3. A cluster that is given up is given to somebody else only when no ring has I/O on it: the worker closes the
//!    *gate*, waits until all rings have finished, gives it up, and opens the gate. Requests that meet a closed gate wait.

mod chain;
mod check;
mod header;
mod host_file;
mod pending;
mod port;
mod worker;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use imago::FormatAccess;

use crate::image::{CacheMode, HostImage, ImageError};
pub use header::HeaderError;
pub(crate) use header::{MAGIC, name_of};
use host_file::HostFile;
use pending::Pending;
pub(crate) use port::{Place, Port};
pub(crate) use worker::{Buffers, Work};

/// What the queues' threads and the worker share.
#[derive(Debug)]
struct Shared {
    access: FormatAccess<HostFile>,
    cluster_size: u64,
    /// What offsets and lengths of a ring's I/O on the files are multiples of.
    block: u64,
    pending: Mutex<Pending>,
    /// Entries of `pending`.
    pending_count: AtomicUsize,
    /// Closed: no ring starts I/O on the files.
    gate_closed: AtomicBool,
    /// Tables were written back since they were last made durable.
    undurable: AtomicBool,
    ports: Mutex<Vec<Arc<Port>>>,
}

/// An open image whose bytes are where its tables say.
#[derive(Debug)]
pub(crate) struct Mapped {
    shared: Arc<Shared>,
    worker: Mutex<Option<Worker>>,
}

#[derive(Debug)]
struct Worker {
    jobs: mpsc::Sender<worker::Job>,
    thread: JoinHandle<()>,
}

/// Opens the chain behind `path`.
pub(crate) fn open(
    path: &Path,
    read_only: bool,
    cache: CacheMode,
) -> Result<(Vec<HostImage>, Mapped), ImageError> {
    let chain::Chain { files, access, cluster_size } = chain::open(path, read_only, cache)?;
    let block = match cache {
        CacheMode::None => files.iter().map(|file| file.geometry.logical_block).max().unwrap_or(1),
        CacheMode::Writeback | CacheMode::Writethrough => 1,
    };
    let shared = Arc::new(Shared {
        access,
        cluster_size,
        block: u64::from(block),
        pending: Mutex::default(),
        pending_count: AtomicUsize::new(0),
        gate_closed: AtomicBool::new(false),
        undurable: AtomicBool::new(false),
        ports: Mutex::default(),
    });
    Ok((files, Mapped { shared, worker: Mutex::default() }))
}

impl Mapped {
    /// Bytes of the disk.
    pub(crate) fn len(&self) -> u64 {
        self.shared.access.size()
    }

    /// A queue's way to the image. The first one starts the worker: a thread has the confinement of the one that starts
    /// it, and a daemon confines itself after it has opened the image.
    pub(crate) fn port(&self) -> io::Result<Arc<Port>> {
        let mut worker = lock(&self.worker);
        let worker = match &mut *worker {
            Some(worker) => worker,
            none => none.insert(Worker::start(&self.shared)?),
        };
        let (jobs, thread) = (worker.jobs.clone(), worker.thread.thread().clone());
        let port = Arc::new(Port::new(self.shared.clone(), jobs, thread)?);
        lock(&self.shared.ports).push(port.clone());
        Ok(port)
    }
}

impl Worker {
    fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let shared = shared.clone();
        let thread = thread::Builder::new().name("qcow2".to_owned()).spawn(move || {
            // Of the thread that starts it, whose I/O rings need it.
            let _ = ready.send(cleave_common::sandbox::drop_memory_lock());
            worker::run(&shared, &inbox);
        })?;
        // What a thread calls while it starts, the filter of system calls that comes next does not allow.
        started.recv().map_err(io::Error::other)??;
        Ok(Self { jobs, thread })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        lock(&self.shared.ports).clear();
        if let Some(Worker { jobs, thread }) = lock(&self.worker).take() {
            drop(jobs);
            let _ = thread.join();
        }
    }
}

/// A thread that panicked ends the process in release builds; elsewhere what it left is whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
