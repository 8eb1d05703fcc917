//! What the tests of cleave-block share.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::fs;
use std::io::Write;

use cleave_common::vhost_user::VringState;
use cleave_tests::cache::target_directory;
use cleave_tests::driver::{Daemon, DriverError};
use tempfile::NamedTempFile;

pub const MIB: u64 = 1 << 20;

/// A disk of `len` bytes with known content, on the file system that holds the build (not on a tmpfs).
pub fn disk(len: u64) -> NamedTempFile {
    let place = target_directory().join("tmp");
    fs::create_dir_all(&place).unwrap();
    let mut file = tempfile::Builder::new().prefix("disk").tempfile_in(place).unwrap();
    file.write_all(&pattern(0, len as usize)).unwrap();
    file
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
