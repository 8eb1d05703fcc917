//! The memory of a daemon that waits.
#![expect(unsafe_code, reason = "unmapping pages of the program's own text")]

use std::ffi::c_void;
use std::fs;

use rustix::mm::{Advice, madvise};

/// Unmaps the program's text, of which start-up has touched nearly all (the command line alone is most of it) and serving
/// needs little: what runs from now on comes back from the page cache by itself, in microseconds.
pub(crate) fn drop_startup_code() {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    let Some((start, end)) = own_text(&maps) else { return };
    let ours = drop_startup_code as *const () as usize;
    if !(start..end).contains(&ours) {
        return;
    }
    // SAFETY: the range is a private mapping of the program's file that is executable and not writable, so no page of it
    // differs from the file; a page that is needed is mapped again from there.
    let _ = unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxDontNeed) };
}

/// The mapping of the program that is executable.
fn own_text(maps: &str) -> Option<(usize, usize)> {
    let exe = fs::read_link("/proc/self/exe").ok()?;
    let line =
        maps.lines().find(|line| line.contains(" r-xp ") && line.ends_with(exe.to_str().unwrap_or("\0")))?;
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}
