//! Open-file-description locks, so that two programs do not write one disk, and who holds one that is in the way.
//!
//! The lock is on all bytes of the file: it also meets the byte locks that QEMU takes on its images, and lets QEMU see ours.
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
/// kernel has taken apart its io_uring, which happens after the process is gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// Takes the lock for as long as `file` is open: shared to read, exclusive to write.
pub(crate) fn lock(file: &File, shared: bool) -> Result<(), LockError> {
    let deadline = Instant::now() + PATIENCE;
    while !try_lock(file, shared).map_err(LockError::Io)? {
        let holder = holder(file);
        if holder.is_some() || Instant::now() > deadline {
            return Err(LockError::Held { holder });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// `false`: somebody has a lock that excludes ours.
fn try_lock(file: &File, shared: bool) -> io::Result<bool> {
    match set_lock(file, if shared { libc::F_RDLCK } else { libc::F_WRLCK }) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives the lock back at once: closing the file does so only when the last reference is gone, and a ring being taken
/// apart keeps one for a while.
pub(crate) fn unlock(file: &File) {
    // Nothing can be done about a failure but what follows anyway, closing the file.
    let _ = set_lock(file, libc::F_UNLCK);
}

fn set_lock(file: &File, kind: i32) -> io::Result<()> {
    let whole =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open for the call, and `whole` is a valid flock that is only read.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks through the open files of every process we may look at: the kernel gives no process for this kind of lock.
fn holder(file: &File) -> Option<String> {
    let meta = file.metadata().ok()?;
    let own = std::process::id();
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pid = pids.filter(|pid: &u32| *pid != own).find(|pid| holds(*pid, &meta))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("{} (process {pid})", name.trim()))
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
