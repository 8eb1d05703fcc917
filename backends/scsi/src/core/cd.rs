//! Commands of CD-ROM and DVD drives (MMC-6). A medium has one session with one data track.

pub(crate) mod configuration;
pub(crate) mod disc;
pub(crate) mod event;
pub(crate) mod toc;

use crate::config::Medium;

/// Blocks of a CD of 80 minutes, 75 a second: what has more is a DVD.
const CD_BLOCKS: u64 = 80 * 60 * 75;

/// Blocks before the first that is addressed: two seconds.
const PREGAP: u64 = 150;

fn is_dvd(medium: Medium) -> bool {
    medium.blocks > CD_BLOCKS
}

/// The number of a block, as far as MMC can say it.
fn address(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(u32::MAX)
}

/// Minute, second, frame (MMC-6, MSF addresses), as far as that can say it.
fn minute_second_frame(block: u64) -> [u8; 3] {
    let frames = block + PREGAP;
    let minute = frames / (75 * 60);
    match u8::try_from(minute) {
        Ok(minute) => [minute, (frames / 75 % 60) as u8, (frames % 75) as u8],
        Err(_) => [255, 59, 74],
    }
}
