//! The frontend's side of dirty logging (vhost-user, "Migration").

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use cleave_common::vhost_user::features::virtio;
use cleave_common::vhost_user::{Flags, FrontendRequest as Request, LogBase, Payload, VringAddr};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::{BlockDriver, DriverError, Frontend, PATIENCE, Result, USER_BASE};

/// One bit for each 4 KiB of guest-physical address space from 0.
pub struct DirtyLog {
    pub base: LogBase,
    pub fd: OwnedFd,
}

impl DirtyLog {
    /// For addresses below `end`, in a sealed memfd.
    pub fn new(end: u64) -> Result<Self> {
        let base = LogBase { size: end.div_ceil(4096 * 8), offset: 0 };
        let make = || {
            let fd = memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&fd, base.size)?;
            fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
            Ok(fd)
        };
        let fd = make().map_err(|errno: rustix::io::Errno| DriverError::io("a log")(errno.into()))?;
        Ok(Self { base, fd })
    }

    /// The pages that were written since the last call, by their addresses.
    pub fn take(&self) -> Result<Vec<u64>> {
        let mut bits = vec![0; self.base.size as usize];
        let failed = |errno: rustix::io::Errno| DriverError::io("the log")(errno.into());
        rustix::io::pread(&self.fd, &mut bits, 0).map_err(failed)?;
        rustix::io::pwrite(&self.fd, &vec![0; bits.len()], 0).map_err(failed)?;
        let set = (0..8 * bits.len()).filter(|page| bits[page / 8] & 1 << (page % 8) != 0);
        Ok(set.map(|page| 4096 * page as u64).collect())
    }
}

impl Frontend {
    /// SET_LOG_BASE, which is always answered.
    pub fn set_log_base(&mut self, log: &DirtyLog) -> Result<()> {
        let deadline = Some(Instant::now() + PATIENCE);
        let request = Request::SetLogBase;
        self.channel.send(request, Flags::REQUEST, &log.base.encode(), &[log.fd.as_fd()], deadline)?;
        self.answer(request).map(drop)
    }
}

impl BlockDriver {
    /// Switches the logging of all that is written, as a frontend does under running rings. The used ring of queue 0 is
    /// logged at `used` if that is given.
    pub fn set_logging(&mut self, on: bool, used: Option<u64>) -> Result<()> {
        let features = self.negotiated.acked | if on { virtio::LOG_ALL } else { 0 };
        self.frontend.tell(Request::SetFeatures, &features, &[])?;
        let queue = &self.queues[0];
        let addr = VringAddr {
            index: 0,
            flags: used.is_some().into(),
            descriptor: USER_BASE + queue.descriptors,
            used: USER_BASE + queue.used,
            available: USER_BASE + queue.available,
            log: used.unwrap_or(0),
        };
        self.frontend.tell(Request::SetVringAddr, &addr, &[])
    }
}
