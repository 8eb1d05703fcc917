//! The memory of a daemon that waits.
#![expect(unsafe_code, reason = "unmapping pages of the program's own text")]

use std::ffi::c_void;
use std::fs;

use rustix::mm::{Advice, madvise};

/// Where the program's own code is mapped, executable.
#[derive(Debug)]
pub(crate) struct Text {
    start: usize,
    end: usize,
}

impl Text {
    /// As `/proc` says, which is out of reach once there is a sandbox.
    pub(crate) fn of_this_program() -> Option<Self> {
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        let exe = fs::read_link("/proc/self/exe").ok()?;
        let line = maps
            .lines()
            .find(|line| line.contains(" r-xp ") && line.ends_with(exe.to_str().unwrap_or("\0")))?;
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let text =
            Self { start: usize::from_str_radix(start, 16).ok()?, end: usize::from_str_radix(end, 16).ok()? };
        let ours = Self::of_this_program as *const () as usize;
        (text.start..text.end).contains(&ours).then_some(text)
    }

    /// Unmaps it: start-up has touched nearly all (the command line alone is most of it) and serving needs little. What
    /// runs from now on comes back from the page cache by itself, in microseconds.
    pub(crate) fn drop_startup_code(&self) {
        // SAFETY: the range is a private mapping of the program's file that is executable and not writable, so no page of
        // it differs from the file; a page that is needed is mapped again from there.
        let _ = unsafe { madvise(self.start as *mut c_void, self.end - self.start, Advice::LinuxDontNeed) };
    }
}
