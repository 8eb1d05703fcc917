//! Units made of what options say: images opened, names checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cleave_common::exit::{ExitCode, Failure};
use cleave_scsi::{ConfigError, Disk, Identity, Medium, Unit, Unmap, WriteCache};
use cleave_storage::{CacheMode, Image, ImageError, ImageFormat, ImageOptions};

use crate::address::Address;
use crate::config::{KindConfig, LunConfig, UnitConfig};

/// Bytes of a block of a CD-ROM.
pub(crate) const CD_BLOCK: u32 = 2048;

/// Why there is no unit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnitError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("unit {address}: {source}")]
    Config { address: Address, source: ConfigError },
    #[error("the CD-ROM image {} cannot be used: {source}", path.display())]
    Medium { path: PathBuf, source: ConfigError },
}

impl From<UnitError> for Failure {
    fn from(error: UnitError) -> Self {
        match error {
            UnitError::Image(image) if image.is_hosts_fault() => Self::new(ExitCode::Host, image),
            other => Self::usage(other),
        }
    }
}

/// Opens images: one that several plans name is opened, and locked, once.
#[derive(Default)]
pub(crate) struct Opener(HashMap<(PathBuf, bool), Arc<Image>>);

impl Opener {
    fn open(&mut self, options: ImageOptions) -> Result<Arc<Image>, ImageError> {
        let key = (options.path.clone(), options.read_only);
        if let Some(image) = self.0.get(&key) {
            return Ok(image.clone());
        }
        let image = Arc::new(Image::open(&options)?);
        self.0.insert(key, image.clone());
        Ok(image)
    }

    /// The image of a disk, or of a medium in a drive.
    pub(crate) fn disk(&mut self, config: &LunConfig) -> Result<Arc<Image>, ImageError> {
        self.open(disk_options(config))
    }

    pub(crate) fn cdrom(&mut self, path: &Path) -> Result<Arc<Image>, ImageError> {
        self.open(cdrom_options(path))
    }
}

pub(crate) fn disk_options(config: &LunConfig) -> ImageOptions {
    ImageOptions {
        path: config.disk.clone(),
        format: config.format.into(),
        read_only: config.readonly,
        cache: config.cache.into(),
    }
}

pub(crate) fn cdrom_options(path: &Path) -> ImageOptions {
    ImageOptions {
        path: path.to_owned(),
        format: ImageFormat::Raw,
        read_only: true,
        cache: CacheMode::Writeback,
    }
}

/// The medium that `image` is in a drive. A block at its end that is cut off is left out.
pub(crate) fn cd_medium(image: &Image) -> Medium {
    Medium { blocks: image.len() / u64::from(CD_BLOCK), read_only: true }
}

/// The unit that `config` asks for, with `image` in it.
pub(crate) fn make(config: &UnitConfig, image: Option<&Image>) -> Result<Unit, UnitError> {
    let refused = |source| UnitError::Config { address: config.address, source };
    match (&config.kind, image) {
        (KindConfig::Disk(disk), image) => {
            let product = disk.product.as_deref().unwrap_or("VIRTUAL-DISK");
            let identity = Identity::new(product, &disk.serial, disk.wwn).map_err(refused)?;
            let described = describe(image, disk.readonly);
            let medium = image.map(|image| Medium {
                blocks: image.len() / u64::from(described.block_size),
                read_only: image.is_read_only(),
            });
            Unit::disk(identity, described, medium).map_err(refused)
        }
        (KindConfig::Cdrom(cdrom), image) => {
            let identity = Identity::new("VIRTUAL-DVD-ROM", &cdrom.serial, cdrom.wwn).map_err(refused)?;
            let medium = image.map(cd_medium);
            Unit::cd(identity, medium).map_err(|source| match cdrom.path.clone() {
                Some(path) => UnitError::Medium { path, source },
                None => refused(source),
            })
        }
    }
}

fn describe(image: Option<&Image>, read_only: bool) -> Disk {
    let block_size = image.map_or(512, Image::logical_block);
    let mut disk = Disk::new(block_size);
    let Some(image) = image else { return disk };
    let topology = image.topology();
    let physical = image.physical_block() / block_size;
    disk.physical_exponent = physical.ilog2() as u8;
    disk.lowest_aligned = ((topology.alignment_offset / block_size) % physical) as u16;
    disk.optimal_granularity = u16::try_from(topology.min_io / block_size).unwrap_or(0);
    disk.optimal_transfer = topology.opt_io / block_size;
    let enabled = image.cache() != CacheMode::Writethrough;
    disk.write_cache = WriteCache { enabled, switchable: enabled };
    // A file that shrinks by holes reads as zeroes there; what a device does is its own affair.
    disk.unmap = (!read_only).then_some(Unmap { granularity: physical, reads_zeroes: false });
    disk
}
