//! What the kernel says of each mapping of a process (proc_pid_smaps(5)), of which smaps_rollup is the sum.

use crate::memory;

/// A file, whatever it is called: device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FileId {
    /// Major and minor number.
    pub device: (u32, u32),
    pub inode: u64,
}

/// One mapping. Sizes are in bytes; those that smaps counts are 0 where only maps was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Bytes of addresses.
    pub size: u64,
    pub file: FileId,
    path: String,
    /// What of it this process has in its page tables, huge pages of the pool included.
    pub mapped: u64,
    /// As much of that in huge pages, of whatever kind.
    pub huge: u64,
    /// This process's share of what it has mapped.
    pub pss: u64,
    /// For a shared mapping of memory: what of the file's range is swapped out, whoever had it mapped.
    pub swap: u64,
}

impl Mapping {
    /// Whether it is the memory of a machine of ours.
    pub fn is_guest_memory(&self) -> bool {
        let name = self.path.strip_suffix(" (deleted)").unwrap_or(&self.path);
        let name = name.strip_prefix("/memfd:").or_else(|| name.rsplit('/').next()).unwrap_or(name);
        let rest = name.strip_prefix(memory::FILE_NAME);
        self.path.ends_with(" (deleted)") && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// Reads the text of maps or of smaps. Lines that are neither are left out: a later kernel may have more of them.
pub(super) fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(mapping) = head(line) {
            mappings.push(mapping);
        } else if let (Some(mapping), Some((key, bytes))) = (mappings.last_mut(), figure(line)) {
            match key {
                "Rss" => add(&mut mapping.mapped, bytes),
                "Pss" => add(&mut mapping.pss, bytes),
                "Swap" => add(&mut mapping.swap, bytes),
                "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => add(&mut mapping.huge, bytes),
                // Rss leaves them out.
                "Shared_Hugetlb" | "Private_Hugetlb" => {
                    add(&mut mapping.mapped, bytes);
                    add(&mut mapping.huge, bytes);
                }
                _ => {}
            }
        }
    }
    mappings
}

fn add(figure: &mut u64, bytes: u64) {
    *figure = figure.saturating_add(bytes);
}

/// `7f00-7f10 rw-s 00000000 00:01 1234    /memfd:cleave-ram (deleted)`
fn head(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let (word, after) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
        rest = after;
        word
    };
    let (start, end) = word().split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let size = hex(end)?.checked_sub(hex(start)?)?;
    let _permissions = word();
    let _offset = word();
    let (major, minor) = word().split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let device = (number(major)?, number(minor)?);
    let inode = word().parse().ok()?;
    let path = rest.trim_start().to_owned();
    let file = FileId { device, inode };
    Some(Mapping { size, file, path, mapped: 0, huge: 0, pss: 0, swap: 0 })
}

/// `Rss:        12 kB`
fn figure(line: &str) -> Option<(&str, u64)> {
    let (key, value) = line.split_once(':')?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((key, kib.checked_mul(1 << 10)?))
}
