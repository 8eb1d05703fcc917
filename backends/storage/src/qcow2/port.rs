//! One queue's way to an image: where bytes are, and the jobs that its thread does not do itself.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::Thread;

use imago::{Mapping, ShallowMapping};
use rustix::event::{EventfdFlags, eventfd};

use super::worker::{Buffers, Job, Work};
use super::{Shared, lock};

/// Where the next bytes of a request are, and how many of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In one of the image's files, at this offset. [`Port::left`] is owed when the I/O is over.
    File { file: u32, offset: u64, len: u64 },
    /// Nowhere: they are zeros.
    Zeros { len: u64 },
    /// Only the worker can get or put them. A write has its entry among the pending already.
    Worker { len: u64, pending: Option<u64> },
    /// Ask again when the port's descriptor is readable.
    Later,
}

pub(crate) struct Port {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    worker: Thread,
    /// I/O on the files, of this queue's ring.
    in_flight: AtomicUsize,
    done: Mutex<Vec<(u16, io::Result<()>)>>,
    event: OwnedFd,
}

/// Without what is shared, which has its ports.
impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Port {
    pub(super) fn new(shared: Arc<Shared>, jobs: mpsc::Sender<Job>, worker: Thread) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (in_flight, done) = (AtomicUsize::new(0), Mutex::default());
        Ok(Self { shared, jobs, worker, in_flight, done, event })
    }

    /// Readable when jobs are done, or the gate has opened.
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Where `len` bytes at `offset` of the disk are, or the first of them.
    pub(crate) fn locate_read(&self, offset: u64, len: u64) -> io::Result<Place> {
        if !self.enter() {
            return Ok(Place::Later);
        }
        let place = self.place_read(offset, len);
        if !matches!(place, Ok(Place::File { .. })) {
            self.left();
        }
        place
    }

    fn place_read(&self, offset: u64, len: u64) -> io::Result<Place> {
        let (mapping, len) = mapping(&self.shared, offset, len)?;
        Ok(match mapping {
            Mapping::Raw { storage, offset, .. } if self.suits_ring(offset, len) => {
                Place::File { file: storage.index(), offset, len }
            }
            Mapping::Zero { .. } => Place::Zeros { len },
            _ => Place::Worker { len, pending: None },
        })
    }

    /// Where `len` bytes at `offset` of the disk can be written in place, or the first of them.
    pub(crate) fn locate_write(&self, offset: u64, len: u64) -> io::Result<Place> {
        if !self.enter() {
            return Ok(Place::Later);
        }
        let place = self.place_write(offset, len);
        if !matches!(place, Ok(Place::File { .. })) {
            self.left();
        }
        place
    }

    /// The order matters: a mapping that is seen was made by a job that was pending then, so that a look at the
    /// pending *after* it tells whether the tables that have it are in the file.
    fn place_write(&self, offset: u64, len: u64) -> io::Result<Place> {
        let (in_place, _) = self.in_place(offset, len)?;
        if let Some(place) = in_place
            && self.shared.pending_count.load(Ordering::SeqCst) == 0
        {
            return Ok(place);
        }
        // Under the lock nobody begins or ends a job: what is decided for the cluster, all decide.
        let mut pending = lock(&self.shared.pending);
        let (in_place, run) = self.in_place(offset, len)?;
        let Some(place) = in_place else {
            return Ok(self.to_worker(&mut pending, self.clusters(offset, run), run));
        };
        if !pending.overlaps(&self.clusters(offset, run)) {
            return Ok(place);
        }
        // One cluster, of which is known whether a ring may write it.
        let size = self.shared.cluster_size;
        let len = run.min(size - offset % size);
        let clusters = self.clusters(offset, len);
        if pending.overlaps(&clusters) {
            return Ok(self.to_worker(&mut pending, clusters, len));
        }
        Ok(match place {
            Place::File { file, offset, .. } => Place::File { file, offset, len },
            other => other,
        })
    }

    fn to_worker(&self, pending: &mut super::Pending, clusters: Range<u64>, len: u64) -> Place {
        let id = pending.add(clusters);
        self.shared.pending_count.store(pending.len(), Ordering::SeqCst);
        Place::Worker { len, pending: Some(id) }
    }

    /// Where bytes can be overwritten as they are, if they can; and how many are alike, all of one L2 table.
    fn in_place(&self, offset: u64, len: u64) -> io::Result<(Option<Place>, u64)> {
        let (mapping, len) = self.shared.access.get_shallow_mapping(offset, len)?;
        let place = match mapping {
            _ if len == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            ShallowMapping::Raw { offset, writable: true, .. } => Some(Place::File { file: 0, offset, len }),
            _ => None,
        };
        Ok((place, len))
    }

    fn clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let size = self.shared.cluster_size;
        offset / size * size..(offset + len).next_multiple_of(size)
    }

    /// Whether O_DIRECT takes it. The end of a raw backing file is anywhere.
    fn suits_ring(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.shared.block)
    }

    /// Whether a durable write may be done in place: the tables that lead to it are durable.
    pub(crate) fn tables_are_durable(&self) -> bool {
        !self.shared.undurable.load(Ordering::SeqCst)
    }

    /// Counts I/O on the files, unless the gate is closed.
    fn enter(&self) -> bool {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        if self.shared.gate_closed.load(Ordering::SeqCst) {
            self.left();
            return false;
        }
        true
    }

    /// I/O on a file is over.
    pub(crate) fn left(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1
            && self.shared.gate_closed.load(Ordering::SeqCst)
        {
            self.worker.unpark();
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Has the worker do `work` on `len` bytes that the disk is told about and not given.
    pub(crate) fn send_range(self: &Arc<Self>, tag: u16, work: Work, offset: u64, len: u64) {
        let mut pending = lock(&self.shared.pending);
        let id = pending.add(self.clusters(offset, len));
        self.shared.pending_count.store(pending.len(), Ordering::SeqCst);
        drop(pending);
        self.send(tag, work, offset, Buffers(Vec::new()), Some(id));
    }

    /// Has the worker do `work`. [`Port::take_done`] gives `tag` when it is done.
    pub(crate) fn send(
        self: &Arc<Self>,
        tag: u16,
        work: Work,
        offset: u64,
        buffers: Buffers,
        pending: Option<u64>,
    ) {
        let job = Job { port: self.clone(), tag, work, offset, buffers, pending };
        if let Err(mpsc::SendError(job)) = self.jobs.send(job) {
            // There is a worker as long as there is an image, which the engine holds; unless it panicked.
            job.port.finish(job.tag, Err(io::ErrorKind::BrokenPipe.into()));
        }
    }

    pub(super) fn finish(&self, tag: u16, result: io::Result<()>) {
        let mut done = lock(&self.done);
        let is_first = done.is_empty();
        done.push((tag, result));
        drop(done);
        if is_first {
            self.signal();
        }
    }

    pub(super) fn signal(&self) {
        // It fails only when it is readable already, and more so than anybody counts.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Jobs that are done since the last call.
    pub(crate) fn take_done(&self) -> Vec<(u16, io::Result<()>)> {
        std::mem::take(&mut *lock(&self.done))
    }

    /// The queue is gone.
    pub(crate) fn close(self: &Arc<Self>) {
        lock(&self.shared.ports).retain(|port| !Arc::ptr_eq(port, self));
    }
}

/// Where the disk's bytes at `offset` are, and how many from there on.
fn mapping(shared: &Shared, offset: u64, len: u64) -> io::Result<(Mapping<'_, super::HostFile>, u64)> {
    let (mapping, len) = shared.access.get_mapping(offset, len)?;
    if len == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((mapping, len))
}
