//! `--memory`: how much, what it is made of, and where on the host it is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use cleave_common::cpus::{CpuList, CpuListError};
use cleave_common::options;
use cleave_common::size::ByteSize;
use serde::{Deserialize, Deserializer};

/// `--memory SIZE` or `--memory size=2G,backing=memfd|hugetlbfs,page-size=2M,...`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MemoryConfig {
    pub size: ByteSize,
    /// memfd if absent, or hugetlbfs where `mem_path` is given.
    pub backing: Option<Backing>,
    /// Huge page size, for `backing=hugetlbfs`; the host's default or the mount's if absent.
    pub page_size: Option<ByteSize>,
    /// A mounted hugetlbfs.
    pub mem_path: Option<PathBuf>,
    /// Transparent huge pages; as `advise` if absent, but without a word where the host has none.
    pub thp: Option<Thp>,
    /// Take every page from the host before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// How many threads do that at most.
    pub prefault_threads: Option<u16>,
    /// NUMA nodes of the host that all of it comes from.
    pub host_node: Option<HostNodes>,
    /// Whether it is in core dumps.
    #[serde(default = "on")]
    pub dump: bool,
    /// Whether KSM may merge it: what people try first, so the refusal says what to do instead.
    #[serde(default)]
    pub merge: bool,
}

/// The file that guest memory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    #[default]
    Memfd,
    Hugetlbfs,
}

/// Whether a memfd is in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Thp {
    /// It has to be: a host that gives none is an error.
    Always,
    /// Not where that can be helped.
    Never,
    /// As far as the host gives them.
    Advise,
}

/// Numbers of the host's NUMA nodes; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNodes(CpuList);

impl HostNodes {
    pub fn nodes(&self) -> &[usize] {
        self.0.cpus()
    }
}

/// Nodes are written as CPUs are.
impl FromStr for HostNodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|error| match error {
            CpuListError::NotAList(text) => {
                format!("'{text}' is no list of the host's NUMA nodes: write it as 0 or 0-1")
            }
            CpuListError::TooHigh(node) => format!("no host has a NUMA node {node}"),
        })
    }
}

impl fmt::Display for HostNodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for HostNodes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::from_word(deserializer)
    }
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum MemoryConfigError {
    #[error("size={0}: a machine needs at least {min}", min = MemoryConfig::MIN)]
    TooSmall(ByteSize),
    #[error("size={size}: must be a multiple of {unit}")]
    Uneven { size: ByteSize, unit: ByteSize },
    #[error("page-size={0} goes with backing=hugetlbfs")]
    PageSizeWithoutHugetlbfs(ByteSize),
    #[error("page-size={0}: x86-64 has huge pages of 2M and 1G")]
    PageSize(ByteSize),
    #[error("mem-path= names a hugetlbfs, and backing=memfd needs none: leave one of them out")]
    MemPathOfMemfd,
    #[error("mem-path=: the path is empty")]
    EmptyMemPath,
    #[error("thp= is about memfd: hugetlbfs has huge pages always; leave one of them out")]
    ThpOfHugetlbfs,
    #[error("prefault-threads={0}: 1 to {max} threads are possible", max = MemoryConfig::MAX_THREADS)]
    Threads(u16),
    #[error("prefault-threads= goes with prefault=on")]
    ThreadsWithoutPrefault,
    #[error(
        "merge=on: KSM merges private anonymous pages only, and guest memory is a file that daemons share; to give guests more than the host has, use a balloon, free page reporting or swap on the host"
    )]
    Merge,
}

impl MemoryConfig {
    /// Below this no stock kernel starts.
    const MIN: ByteSize = ByteSize(16 << 20);
    const PAGE: ByteSize = ByteSize(4 << 10);
    const HUGE_PAGES: [ByteSize; 2] = [ByteSize(2 << 20), ByteSize(1 << 30)];
    pub const MAX_THREADS: u16 = 64;

    pub fn backing(&self) -> Backing {
        let default = if self.mem_path.is_some() { Backing::Hugetlbfs } else { Backing::Memfd };
        self.backing.unwrap_or(default)
    }

    pub(super) fn validate(&self) -> Result<(), MemoryConfigError> {
        if self.size < Self::MIN {
            return Err(MemoryConfigError::TooSmall(self.size));
        }
        if self.merge {
            return Err(MemoryConfigError::Merge);
        }
        self.check_threads()?;
        let unit = match self.backing() {
            Backing::Memfd => self.check_memfd().map(|()| Self::PAGE)?,
            Backing::Hugetlbfs => self.check_hugetlbfs()?,
        };
        match self.size.bytes().is_multiple_of(unit.bytes()) {
            true => Ok(()),
            false => Err(MemoryConfigError::Uneven { size: self.size, unit }),
        }
    }

    fn check_memfd(&self) -> Result<(), MemoryConfigError> {
        match (&self.mem_path, self.page_size) {
            (Some(_), _) => Err(MemoryConfigError::MemPathOfMemfd),
            (None, Some(size)) => Err(MemoryConfigError::PageSizeWithoutHugetlbfs(size)),
            (None, None) => Ok(()),
        }
    }

    /// The page size, or the least it can be.
    fn check_hugetlbfs(&self) -> Result<ByteSize, MemoryConfigError> {
        if self.thp.is_some() {
            return Err(MemoryConfigError::ThpOfHugetlbfs);
        }
        if self.mem_path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(MemoryConfigError::EmptyMemPath);
        }
        match self.page_size {
            None => Ok(Self::HUGE_PAGES[0]),
            Some(size) if Self::HUGE_PAGES.contains(&size) => Ok(size),
            Some(size) => Err(MemoryConfigError::PageSize(size)),
        }
    }

    fn check_threads(&self) -> Result<(), MemoryConfigError> {
        match self.prefault_threads {
            Some(threads) if !(1..=Self::MAX_THREADS).contains(&threads) => {
                Err(MemoryConfigError::Threads(threads))
            }
            Some(_) if !self.prefault => Err(MemoryConfigError::ThreadsWithoutPrefault),
            _ => Ok(()),
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize(512 << 20),
            backing: None,
            page_size: None,
            mem_path: None,
            thp: None,
            prefault: false,
            prefault_threads: None,
            host_node: None,
            dump: true,
            merge: false,
        }
    }
}

fn on() -> bool {
    true
}

/// In a file: `memory = "2G"` or a table.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<MemoryConfig>, D::Error> {
    options::table_or_text(deserializer, Some("size")).map(Some)
}
