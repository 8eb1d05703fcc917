//! What the device below says of I/O that it likes.
#![expect(unsafe_code, reason = "these ioctls have no safe wrapper")]

use std::fs::File;
use std::os::fd::AsRawFd;

/// How I/O is best cut, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Topology {
    /// Smallest I/O without a penalty (a RAID's chunk); 0 if not known.
    pub min_io: u32,
    /// Best size of large I/O (a RAID's stripe); 0 if not known.
    pub opt_io: u32,
    /// Where the first physical block starts.
    pub alignment_offset: u32,
}

impl Topology {
    /// Of a block device; whatever it does not say is 0.
    pub(super) fn of_device(file: &File) -> Self {
        // linux/fs.h
        const BLKIOMIN: libc::Ioctl = 0x1278;
        const BLKIOOPT: libc::Ioctl = 0x1279;
        const BLKALIGNOFF: libc::Ioctl = 0x127a;
        let ask = |request: libc::Ioctl| {
            let mut value: libc::c_int = 0;
            // SAFETY: the requests write one int, or unsigned int, to where they are told; the file is open.
            let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
            // An offset of -1 means that it is misaligned in some way that no offset describes.
            if answer == 0 { u32::try_from(value).unwrap_or(0) } else { 0 }
        };
        Self { min_io: ask(BLKIOMIN), opt_io: ask(BLKIOOPT), alignment_offset: ask(BLKALIGNOFF) }
    }
}
