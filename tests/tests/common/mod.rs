//! What the tests of cleave-block share.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::path::Path;

use cleave_common::vhost_user::VringState;
use cleave_tests::cache::target_directory;
use cleave_tests::driver::{Daemon, DriverError};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use tempfile::NamedTempFile;

pub const MIB: u64 = 1 << 20;

/// A disk of `len` bytes with known content, on the file system that holds the build (not on a tmpfs).
pub fn disk(len: u64) -> NamedTempFile {
    let place = target_directory().join("tmp");
    fs::create_dir_all(&place).unwrap();
    disk_in(&place, len)
}

/// As [`disk`], in the directory `place`.
pub fn disk_in(place: &Path, len: u64) -> NamedTempFile {
    let mut file = tempfile::Builder::new().prefix("disk").tempfile_in(place).unwrap();
    file.write_all(&pattern(0, len as usize)).unwrap();
    file
}

/// A file system in memory with room for `size` bytes; unmounted when dropped.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Gives it room for `size` bytes in all.
    pub fn resize(&self, size: u64) {
        let options = format!("size={size}");
        mount_remount(self.path(), MountFlags::empty(), options.as_str()).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// # Panics
/// This process may not mount: run it as root.
pub fn tmpfs(size: u64) -> Tmpfs {
    let place = tempfile::tempdir().unwrap();
    let options = CString::new(format!("size={size}")).unwrap();
    mount("tmpfs", place.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str())).unwrap_or_else(
        |errno| panic!("cannot mount a tmpfs, which this test needs: run it as root ({errno})"),
    );
    Tmpfs(place)
}

/// Bytes that differ from place to place, and with `seed`.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// cleave-block on `image`.
pub fn start(image: &NamedTempFile, args: &[&str]) -> Daemon {
    let path = image.path().to_str().unwrap();
    let args: Vec<&str> = ["--blk-file", path].into_iter().chain(args.iter().copied()).collect();
    Daemon::start("cleave-block", &args).unwrap()
}

pub fn refused<T: std::fmt::Debug>(outcome: Result<T, DriverError>) {
    assert!(matches!(outcome, Err(DriverError::Refused(_))), "{outcome:?}");
}

pub fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}
