//! The record of requests in flight (vhost-user, "Inflight I/O tracking"): memory that the daemon keeps it in, whose file
//! we hold so that a successor can go on where the daemon ended.
//!
//! ```text
//!   start: GET_INFLIGHT_FD ──> Inflight ──SET_INFLIGHT_FD──> the daemon, and after it each successor
//!                                 └── dropped at a stop or a reset: the next start gets a fresh one
//! ```
//!
//! Invariants: we never map the region, because whoever holds its file may truncate it under us; we read it only to
//! tell people how much is done again, and only from a file that the kernel keeps in memory, whose reading cannot wait.

use std::os::fd::{AsFd, OwnedFd};

use cleave_common::vhost_user::features::protocol;
use cleave_common::vhost_user::{FrontendRequest, Inflight as Description, Malformed};
use rustix::fs::{fcntl_get_seals, fstat};
use rustix::io::pread;

use super::SessionError;
use super::wire::{Limit, Wire};

/// Bytes before a queue's states: features, version, desc_num, last_batch_head, used_idx.
const HEADER: u64 = 16;
/// Bytes of one descriptor's state: inflight, padding, next, counter.
const STATE: u64 = 16;
/// Most bytes that one queue's part may have: daemons round up to pages, at most to huge ones.
const MAX_STRIDE: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    #[error(
        "its record of requests in flight ({size} bytes at {offset}) is not one for {queues} queues of {queue_size}"
    )]
    Size { size: u64, offset: u64, queues: u16, queue_size: u16 },
    #[error("the file of its record of requests in flight is not memory (a memfd)")]
    NotMemory,
    #[error("the file of its record of requests in flight has {has} bytes, {needs} are announced")]
    TooShort { has: u64, needs: u64 },
    #[error("its record of requests in flight came without its file")]
    File(#[source] Malformed),
}

/// The region of one device, from its start to its stop.
#[derive(Debug)]
pub(super) struct Inflight {
    file: OwnedFd,
    description: Description,
}

impl Inflight {
    /// Asks a daemon that negotiated it for a fresh region; `None` if it keeps no record after all.
    ///
    /// # Errors
    /// When the daemon does not answer, or its answer cannot be used.
    pub(super) fn obtain(
        wire: &mut Wire,
        queues: u16,
        queue_size: u16,
        limit: Limit,
    ) -> Result<Option<Self>, SessionError> {
        const REQUEST: FrontendRequest = FrontendRequest::GetInflightFd;
        if !wire.has(protocol::INFLIGHT_SHMFD) {
            return Ok(None);
        }
        let asked = Description { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size };
        let mut answer = wire.ask_raw(REQUEST, &asked, limit)?;
        let told: Description =
            answer.payload().map_err(|source| SessionError::Malformed { request: REQUEST, source })?;
        // How libvhost-user says that it has none.
        if told.mmap_size == 0 {
            return Ok(None);
        }
        let file = answer.single_fd().map_err(InflightError::File)?;
        // What it says of the queues is what it was told; some leave it out.
        let description = Description { num_queues: queues, queue_size, ..told };
        Ok(Some(Self::check(file, description)?))
    }

    fn check(file: OwnedFd, description: Description) -> Result<Self, InflightError> {
        let Description { mmap_size: size, mmap_offset: offset, num_queues, queue_size } = description;
        let queues = u64::from(num_queues.max(1));
        let stride = size / queues;
        let end = offset.checked_add(size);
        let (Some(needs), true) =
            (end, (HEADER + STATE * u64::from(queue_size)..=MAX_STRIDE).contains(&stride))
        else {
            return Err(InflightError::Size { size, offset, queues: num_queues, queue_size });
        };
        // Only files in memory have seals. This comes before anything else is asked of the file: another file system
        // (FUSE) could let us wait for the answer.
        fcntl_get_seals(&file).map_err(|_| InflightError::NotMemory)?;
        let has = fstat(&file).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        if has < needs {
            return Err(InflightError::TooShort { has, needs });
        }
        Ok(Self { file, description })
    }

    /// Gives the region to a daemon, before its vrings.
    pub(super) fn give(&self, wire: &mut Wire, limit: Limit) -> Result<(), SessionError> {
        wire.tell(FrontendRequest::SetInflightFd, &self.description, &[self.file.as_fd()], limit)
    }

    /// How many requests of this queue a successor will do again, by the daemon's own account: what is marked in flight,
    /// less the last batch if it reached the used ring, whose index is `used` now, before its marks were removed.
    pub(super) fn count(&self, queue: u8, used: u16) -> u64 {
        let Description { mmap_size, mmap_offset, num_queues, queue_size } = self.description;
        if u16::from(queue) >= num_queues {
            return 0;
        }
        let at = mmap_offset + mmap_size / u64::from(num_queues) * u64::from(queue);
        let mut bytes = vec![0; (HEADER + STATE * u64::from(queue_size)) as usize];
        // Truncated since, it reads as if nothing were in flight; this is only what people are told.
        let got = pread(&self.file, &mut bytes, at).unwrap_or(0);
        bytes.truncate(got);
        let Some((header, states)) = bytes.split_at_checked(HEADER as usize) else { return 0 };
        let marked = states.chunks_exact(STATE as usize).filter(|state| state[0] == 1).count() as u64;
        let used_idx = u16::from_le_bytes([header[14], header[15]]);
        marked.saturating_sub(u64::from(used.wrapping_sub(used_idx)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::pwrite;

    use super::*;

    fn memory(len: u64) -> OwnedFd {
        let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    fn description(mmap_size: u64, mmap_offset: u64) -> Description {
        Description { mmap_size, mmap_offset, num_queues: 2, queue_size: 256 }
    }

    #[test]
    fn a_region_has_room_for_every_state_and_a_file_that_holds_it() {
        let least = 2 * (16 + 16 * 256);
        for (size, offset, file_len) in
            [(least, 0, least), (least, 4096, 4096 + least), (4 << 20, 0, 4 << 20)]
        {
            Inflight::check(memory(file_len), description(size, offset)).unwrap();
        }
        let error = |file_len, size, offset| {
            Inflight::check(memory(file_len), description(size, offset)).unwrap_err().to_string()
        };
        for (size, offset) in [(least - 1, 0), (u64::MAX, 0), (least, u64::MAX), (16 << 20, 0)] {
            assert!(error(least, size, offset).contains("not one for 2 queues of 256"), "{size} {offset}");
        }
        assert!(error(least, least, 1).contains("has 8224 bytes, 8225 are announced"));
        let file = File::open("/dev/null").unwrap().into();
        let error = Inflight::check(file, description(least, 0)).unwrap_err();
        assert!(matches!(error, InflightError::NotMemory));
    }

    #[test]
    fn what_is_done_again_is_counted_without_the_batch_that_was_complete() {
        let stride = 8192;
        let file = memory(2 * stride);
        let in_flight = |queue: u64, head: u64| {
            pwrite(&file, &[1], queue * stride + 16 + 16 * head).unwrap();
        };
        [3, 7, 255].into_iter().for_each(|head| in_flight(1, head));
        pwrite(&file, &0xffff_u16.to_le_bytes(), stride + 14).unwrap();
        let region = Inflight::check(file.try_clone().unwrap(), description(2 * stride, 0)).unwrap();
        assert_eq!(region.count(0, 0), 0);
        assert_eq!(region.count(1, 0xffff), 3);
        assert_eq!(region.count(1, 1), 1, "two of them are in the used ring");
        assert_eq!(region.count(1, 100), 0);
        assert_eq!(region.count(2, 0), 0);
        ftruncate(&file, 0).unwrap();
        assert_eq!(region.count(1, 0xffff), 0, "a daemon may truncate it under us");
    }
}
