//! What the host has: its RAM and its pools of huge pages, from proc(5) and sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use super::MemoryError;

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Bytes of the host's RAM.
pub(crate) fn memory_total() -> Result<u64, MemoryError> {
    meminfo("MemTotal")
}

/// Bytes that can be had without swapping.
pub(crate) fn memory_available() -> Result<u64, MemoryError> {
    meminfo("MemAvailable")
}

/// A field of /proc/meminfo, in bytes.
fn meminfo(field: &str) -> Result<u64, MemoryError> {
    let path = "/proc/meminfo";
    let failed = |error| MemoryError::HostFigures(format!("{field} in {path}"), error);
    let text = fs::read_to_string(path).map_err(failed)?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse().ok()
        })
        .map(|kib: u64| kib << 10)
        .ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))
}

/// One pool of huge pages.
#[derive(Debug, Clone)]
pub(crate) struct HugePages {
    /// Bytes of one page.
    pub size: u64,
    /// Pages in the pool, used or not.
    pub total: u64,
    /// Pages neither used nor promised to anyone.
    pub free: u64,
    path: PathBuf,
}

impl HugePages {
    /// The pool of `size`, or of the host's default size.
    pub(super) fn of(size: Option<u64>) -> Result<Self, MemoryError> {
        let size = match size {
            Some(size) => size,
            None => meminfo("Hugepagesize")?,
        };
        let pools = Self::all();
        let has: Vec<_> = pools.iter().map(|pool| super::error::readable(pool.size)).collect();
        pools
            .into_iter()
            .find(|pool| pool.size == size)
            .ok_or_else(|| MemoryError::NoSuchPageSize(size, has.join(", ")))
    }

    /// Every pool this host has, smallest pages first.
    pub(crate) fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir(POOLS) else { return Vec::new() };
        let mut pools: Vec<_> = entries.flatten().filter_map(|entry| Self::read(entry.path())).collect();
        pools.sort_by_key(|pool| pool.size);
        pools
    }

    fn read(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let figure = |file: &str| fs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok();
        let free = figure("free_hugepages")?.saturating_sub(figure("resv_hugepages")?);
        Some(Self { size: kib << 10, total: figure("nr_hugepages")?, free, path: path.clone() })
    }

    pub(super) fn require(&self, needed: u64) -> Result<(), MemoryError> {
        if self.free >= needed {
            return Ok(());
        }
        Err(MemoryError::TooFewHugePages {
            page_size: self.size,
            place: String::new(),
            needed,
            free: self.free,
            total: self.total + (needed - self.free),
            path: self.control().display().to_string(),
        })
    }

    /// The file that takes the number of pages the pool is to have.
    pub(crate) fn control(&self) -> PathBuf {
        Path::join(&self.path, "nr_hugepages")
    }
}
