//! The thread that does what takes more than moving data: see the module's invariants.
#![expect(unsafe_code, reason = "jobs move data to and from memory their caller vouches for")]

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use imago::ShallowMapping;
use imago::io_buffers::{IoVector, IoVectorMut};

use super::{HostFile, Port, Shared, lock};

/// Most jobs that share one write-back of the tables.
const MAX_BATCH: usize = 64;

/// What a job does with its buffers and the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    Write {
        durable: bool,
    },
    /// The next `len` bytes are wanted no more. It has no buffers.
    Discard {
        len: u64,
    },
    /// The next `len` bytes are to read as zeros. It has no buffers.
    Zeroes {
        len: u64,
        /// Their clusters may be given up.
        unmap: bool,
        durable: bool,
    },
}

impl Work {
    fn changes_tables(self) -> bool {
        !matches!(self, Self::Read)
    }

    fn is_durable(self) -> bool {
        matches!(self, Self::Write { durable: true } | Self::Zeroes { durable: true, .. })
    }
}

/// Memory of a request. It stays mapped until the job is done, by the word of [`crate::Engine::transfer`]'s caller.
#[derive(Debug)]
pub(crate) struct Buffers(pub(crate) Vec<libc::iovec>);

// SAFETY: these are addresses of memory that is shared by nature, with a guest; whose it is at what time, the request's
// state says: the job's, until it is done.
unsafe impl Send for Buffers {}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) port: Arc<Port>,
    pub(super) tag: u16,
    pub(super) work: Work,
    /// Bytes from the disk's start.
    pub(super) offset: u64,
    pub(super) buffers: Buffers,
    /// Its entry among the pending.
    pub(super) pending: Option<u64>,
}

/// Works until the image and its queues are gone.
pub(super) fn run(shared: &Shared, inbox: &mpsc::Receiver<Job>) {
    while let Ok(first) = inbox.recv() {
        let jobs = std::iter::once(first).chain(inbox.try_iter().take(MAX_BATCH - 1));
        let (mut written, mut durable) = (Vec::new(), false);
        for job in jobs {
            let result = job.run(shared);
            if job.work.changes_tables() {
                durable |= job.work.is_durable();
                written.push((job, result));
            } else {
                job.port.finish(job.tag, result);
            }
        }
        if !written.is_empty() {
            end_batch(shared, written, durable);
        }
    }
}

/// Writes back the tables, and only then completes the writes that changed them. One that failed may have changed them
/// too.
fn end_batch(shared: &Shared, written: Vec<(Job, io::Result<()>)>, durable: bool) {
    let written_back = write_back(shared, durable);
    let mut pending = lock(&shared.pending);
    if written_back.is_ok() {
        pending.remove_failed();
    }
    for (job, _) in &written {
        match (job.pending, &written_back) {
            (Some(id), Ok(())) => pending.remove(id),
            // A write in place to its clusters would not be safe yet.
            (Some(id), Err(_)) => pending.fail(id),
            (None, _) => {}
        }
    }
    shared.pending_count.store(pending.len(), Ordering::SeqCst);
    drop(pending);
    for (job, result) in written {
        let result = result.and_then(|()| written_back.as_ref().map_err(copy).copied());
        job.port.finish(job.tag, result);
    }
}

fn write_back(shared: &Shared, durable: bool) -> io::Result<()> {
    shared.undurable.store(true, Ordering::SeqCst);
    shared.access.flush()?;
    if durable {
        shared.access.sync()?;
        shared.undurable.store(false, Ordering::SeqCst);
    }
    Ok(())
}

/// The same error for each job of a batch.
fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

impl Job {
    fn run(&self, shared: &Shared) -> io::Result<()> {
        match self.work {
            Work::Read => {
                // SAFETY: the memory is mapped and ours until the job is done. That a guest may change it meanwhile
                // matters to nobody: it is bytes that only the kernel and copies look at.
                let slices = self.buffers.0.iter().map(|buffer| unsafe {
                    std::slice::from_raw_parts_mut(buffer.iov_base.cast::<u8>(), buffer.iov_len)
                });
                let slices: Vec<_> = slices.map(IoSliceMut::new).collect();
                shared.access.readv(IoVectorMut::from(slices), self.offset)
            }
            Work::Write { .. } => match self.gives_up(shared)? {
                GivesUp::Nothing => self.write(shared),
                GivesUp::Compressed => self.write(shared).and_then(|()| shared.access.flush()),
                GivesUp::Shared => {
                    exclusively(shared, || self.write(shared).and_then(|()| shared.access.flush()))
                }
            },
            Work::Discard { len } => self.by_run(shared, len, |mapping, offset, len| match mapping {
                ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } => {
                    // SAFETY: nobody relies on a mapping while no ring has I/O; the worker itself holds none.
                    match unsafe { shared.access.discard_to_any_unsafe(offset, len) } {
                        // It is a hint.
                        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                        other => other,
                    }
                }
                // What is in a backing file, or nowhere, takes no place here.
                _ => Ok(()),
            }),
            Work::Zeroes { len, unmap, .. } => {
                self.by_run(shared, len, |mapping, offset, len| match mapping {
                    ShallowMapping::Zero { .. } => Ok(()),
                    _ => zero(shared, offset, len, unmap),
                })
            }
        }
    }

    /// Calls `work` for each part of `len` bytes that is of one kind, while no ring has I/O on the files.
    fn by_run(
        &self,
        shared: &Shared,
        len: u64,
        work: impl Fn(&ShallowMapping<'_, HostFile>, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut at, mut left) = (self.offset, len);
        while left > 0 {
            let (mapping, run) = shared.access.get_shallow_mapping(at, left)?;
            if run == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            exclusively(shared, || work(&mapping, at, run).and_then(|()| shared.access.flush()))?;
            at += run;
            left -= run;
        }
        Ok(())
    }

    fn write(&self, shared: &Shared) -> io::Result<()> {
        // SAFETY: as for a read.
        let slices = self.buffers.0.iter().map(|buffer| unsafe {
            std::slice::from_raw_parts(buffer.iov_base.cast::<u8>(), buffer.iov_len)
        });
        let slices: Vec<_> = slices.map(IoSlice::new).collect();
        shared.access.writev(IoVector::from(slices), self.offset)
    }

    fn gives_up(&self, shared: &Shared) -> io::Result<GivesUp> {
        let mut gives_up = GivesUp::Nothing;
        let mut at = self.offset;
        let mut left: u64 = self.buffers.0.iter().map(|buffer| buffer.iov_len as u64).sum();
        while left > 0 {
            let (mapping, len) = shared.access.get_shallow_mapping(at, left)?;
            match mapping {
                ShallowMapping::Raw { writable: false, .. } => return Ok(GivesUp::Shared),
                ShallowMapping::Special { .. } => gives_up = GivesUp::Compressed,
                _ => {}
            }
            if len == 0 {
                break;
            }
            at += len;
            left = left.saturating_sub(len);
        }
        Ok(gives_up)
    }
}

/// The clusters that a write replaces. The tables are written back right after it: imago would take one of them for a
/// new table before the file has forgotten what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GivesUp {
    Nothing,
    /// Only the worker reads them.
    Compressed,
    /// With a snapshot. Rings may be reading them.
    Shared,
}

/// Zero clusters where the image can have them (version 3), and zeros where it cannot.
fn zero(shared: &Shared, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let outcome = if unmap {
        // SAFETY: nobody relies on a mapping while no ring has I/O; the worker itself holds none.
        unsafe { shared.access.discard_to_zero_unsafe(offset, len) }
    } else {
        shared.access.write_zeroes(offset, len)
    };
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zeros(shared, offset, len),
        other => other,
    }
}

fn write_zeros(shared: &Shared, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeros = vec![0; len.min(1 << 20) as usize];
    while len > 0 {
        let now = len.min(zeros.len() as u64);
        shared.access.write(&zeros[..now as usize], offset)?;
        offset += now;
        len -= now;
    }
    Ok(())
}

/// Does `work` while no ring has I/O on the files.
fn exclusively<T>(shared: &Shared, work: impl FnOnce() -> T) -> T {
    shared.gate_closed.store(true, Ordering::SeqCst);
    let ports = lock(&shared.ports).clone();
    while !ports.iter().all(|port| port.is_idle()) {
        std::thread::park();
    }
    let outcome = work();
    shared.gate_closed.store(false, Ordering::SeqCst);
    for port in lock(&shared.ports).iter() {
        port.signal();
    }
    outcome
}
