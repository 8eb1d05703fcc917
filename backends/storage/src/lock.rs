//! Open-file-description locks, so that two programs do not write one disk, and who holds one that is in the way.
//!
//! Who writes locks all bytes of the file, which also meets the byte locks that QEMU takes on its images, and lets QEMU see
//! ours. Who reads locks those bytes by which QEMU's readers say that they do, and that nobody is to write (QEMU's
//! block/file-posix.c: byte 100 and so on say what is done, byte 200 and so on what others must not do):
//! so readers of both kinds get along, and writers of neither kind with them.
#![expect(unsafe_code, reason = "F_OFD_SETLK has no safe wrapper")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("locked by {}", holder.as_deref().unwrap_or("another program"))]
    Held { holder: Option<String> },
    #[error(transparent)]
    Io(io::Error),
}

/// How long a lock without a visible owner is waited for. A process that was killed leaves its lock behind until the
/// kernel has ended its requests, which happens after the process is gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a reader locks: it reads (100), and others are neither to write (201) nor to resize (203).
const READER: [Bytes; 3] = [Bytes::one(100), Bytes::one(201), Bytes::one(203)];
/// What somebody has locked who writes (101) or resizes (103).
const WRITER: [Bytes; 2] = [Bytes::one(101), Bytes::one(103)];

/// A part of a file.
#[derive(Debug, Clone, Copy)]
struct Bytes {
    start: i64,
    /// 0: to the end, wherever that will be.
    len: i64,
}

impl Bytes {
    const ALL: Self = Self { start: 0, len: 0 };

    const fn one(start: i64) -> Self {
        Self { start, len: 1 }
    }

    fn flock(self, kind: i32) -> libc::flock {
        libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: self.start,
            l_len: self.len,
            l_pid: 0,
        }
    }
}

/// Takes the lock for as long as `file` is open: shared to read, exclusive to write.
pub(crate) fn lock(file: &File, shared: bool) -> Result<(), LockError> {
    let deadline = Instant::now() + PATIENCE;
    if shared {
        outlast_the_dead(file, deadline).map_err(LockError::Io)?;
    }
    while !try_lock(file, shared).map_err(LockError::Io)? {
        let holder = holder(file);
        if holder.is_some() || Instant::now() > deadline {
            return Err(LockError::Held { holder });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A lock to read does not keep another reader out, yet the reads of one that was killed may still land in memory that
/// its successor serves. Waits while there is a lock that nobody visible has, and not after `deadline`: it may be a
/// reader's whom we may not look at. One that runs beside a dead one hides it.
fn outlast_the_dead(file: &File, deadline: Instant) -> io::Result<()> {
    while is_locked(file, Bytes::ALL)? && owner(file, None).is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Whether anybody else has a lock on any of `bytes`, of either kind.
fn is_locked(file: &File, bytes: Bytes) -> io::Result<bool> {
    let mut lock = bytes.flock(libc::F_WRLCK);
    // SAFETY: the descriptor is open for the call, and `lock` is a valid flock that may be written.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(lock.l_type != libc::F_UNLCK as i16),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `false`: somebody has a lock that excludes ours.
fn try_lock(file: &File, shared: bool) -> io::Result<bool> {
    if !shared {
        return set_lock(file, libc::F_WRLCK, Bytes::ALL);
    }
    for bytes in READER {
        if !set_lock(file, libc::F_RDLCK, bytes)? {
            return Ok(false);
        }
    }
    // Those who come later look for our locks as we look for theirs: after having taken their own.
    for bytes in WRITER {
        if is_locked(file, bytes)? {
            unlock(file);
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives the lock back at once: closing the file does so only when the last reference is gone, and a ring being taken
/// apart keeps one for a while.
pub(crate) fn unlock(file: &File) {
    // Nothing can be done about a failure but what follows anyway, closing the file.
    let _ = set_lock(file, libc::F_UNLCK, Bytes::ALL);
}

/// `false`: somebody has a lock that excludes it.
fn set_lock(file: &File, kind: i32, bytes: Bytes) -> io::Result<bool> {
    let lock = bytes.flock(kind);
    // SAFETY: the descriptor is open for the call, and `lock` is a valid flock that is only read.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            error => Err(error),
        },
    }
}

fn holder(file: &File) -> Option<String> {
    let pid = owner(file, Some(std::process::id()))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("{} (process {pid})", name.trim()))
}

/// Looks through the open files of every process we may look at: the kernel gives no process for this kind of lock.
fn owner(file: &File, but: Option<u32>) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let mut pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| Some(*pid) != but && holds(*pid, &meta))
}

/// Whether a process has a lock on this very file. The device number beside a lock is not always the file's: on an
/// overlay it is another.
fn holds(pid: u32, file: &fs::Metadata) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    fds.flatten().any(|entry| {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let target = format!("/proc/{pid}/fd/{}", entry.file_name().display());
        info.lines().any(|line| line.starts_with("lock:"))
            && fs::metadata(target).is_ok_and(|it| (it.dev(), it.ino()) == (file.dev(), file.ino()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_waits_for_a_lock_without_an_owner_and_for_no_other_reader() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(4096).unwrap();
        let (first, second) = (path.reopen().unwrap(), path.reopen().unwrap());
        lock(&first, true).unwrap();
        let start = Instant::now();
        lock(&second, true).unwrap();
        assert!(start.elapsed() < PATIENCE / 2, "a live reader delays: {:?}", start.elapsed());
        unlock(&second);

        // SAFETY: a new mapping; it keeps the open file, and its lock, when no descriptor does.
        let mapping = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, first.as_raw_fd(), 0)
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        drop(first);
        let mapping = mapping.expose_provenance();
        let undone = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            // SAFETY: nobody uses the mapping.
            unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(mapping), 4096) }
        });
        let start = Instant::now();
        lock(&second, true).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(290) && start.elapsed() < PATIENCE);
        assert_eq!(undone.join().unwrap(), 0);
    }
}
