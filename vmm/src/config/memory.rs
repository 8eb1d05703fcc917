//! `--memory`: how much, and what it is made of.

use cleave_common::options;
use cleave_common::size::ByteSize;
use serde::{Deserialize, Deserializer};

/// `--memory SIZE` or `--memory size=2G,backing=memfd|hugetlbfs,page-size=2M,prefault=on`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MemoryConfig {
    pub size: ByteSize,
    #[serde(default)]
    pub backing: Backing,
    /// Huge page size, for `backing=hugetlbfs`; the host's default if absent.
    pub page_size: Option<ByteSize>,
    /// Take every page from the host before the guest starts.
    #[serde(default)]
    pub prefault: bool,
}

/// The file that guest memory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    #[default]
    Memfd,
    Hugetlbfs,
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
}

impl MemoryConfig {
    /// Below this no stock kernel starts.
    const MIN: ByteSize = ByteSize(16 << 20);
    const PAGE: ByteSize = ByteSize(4 << 10);
    const HUGE_PAGES: [ByteSize; 2] = [ByteSize(2 << 20), ByteSize(1 << 30)];

    pub(super) fn validate(&self) -> Result<(), MemoryConfigError> {
        if self.size < Self::MIN {
            return Err(MemoryConfigError::TooSmall(self.size));
        }
        let unit = match (self.backing, self.page_size) {
            (Backing::Memfd, Some(size)) => return Err(MemoryConfigError::PageSizeWithoutHugetlbfs(size)),
            (Backing::Memfd, None) => Self::PAGE,
            (Backing::Hugetlbfs, None) => Self::HUGE_PAGES[0],
            (Backing::Hugetlbfs, Some(size)) if Self::HUGE_PAGES.contains(&size) => size,
            (Backing::Hugetlbfs, Some(size)) => return Err(MemoryConfigError::PageSize(size)),
        };
        match self.size.bytes().is_multiple_of(unit.bytes()) {
            true => Ok(()),
            false => Err(MemoryConfigError::Uneven { size: self.size, unit }),
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: ByteSize(512 << 20), backing: Backing::Memfd, page_size: None, prefault: false }
    }
}

/// In a file: `memory = "2G"` or a table.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<MemoryConfig>, D::Error> {
    options::table_or_text(deserializer, Some("size")).map(Some)
}
