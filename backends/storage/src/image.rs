//! A disk image as the host keeps it: a raw file, a block device, or a chain of qcow2 files on either.

mod topology;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, OFlags, SeekFrom, StatxFlags, fcntl_getfl, fcntl_setfl, fstatfs, ioctl_blkpbszget,
    ioctl_blksszget, seek, statx,
};
use rustix::io::Errno;
use tracing::warn;

use crate::lock::{self, LockError};
use crate::qcow2::{self, HeaderError, Mapped};
pub use topology::Topology;

/// Bytes in a sector, the unit of every disk interface here.
pub const SECTOR: u64 = 512;

/// Where written data is when a write completes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the host's page cache (O_DIRECT); the disk's own cache may still hold it until a flush.
    None,
    /// In the host's page cache until a flush.
    Writeback,
    /// On the disk: every write waits for it. Reads use the host's page cache.
    Writethrough,
}

/// What the bytes of an image's file mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's own.
    #[default]
    Raw,
    /// Tables that map the disk's clusters to the file's, or to a backing file's.
    Qcow2,
}

/// How to open an image.
#[derive(Debug, Clone)]
pub struct ImageOptions {
    pub path: PathBuf,
    pub format: ImageFormat,
    pub read_only: bool,
    pub cache: CacheMode,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot open disk {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("disk {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    #[error("disk {} is open for the wrong kind of access: it has to be for reading, and for writing unless it is read-only", .0.display())]
    Mode(PathBuf),
    #[error("disk {} cannot be used while this program runs, unless it is raw: only when it starts can it open what other files the image names", .0.display())]
    NotRaw(PathBuf),
    #[error("disk {} is empty: give it a size, as with 'truncate -s 10G'", .0.display())]
    Empty(PathBuf),
    #[error("disk {} is qcow2 of the size 0: give it one, as with 'qemu-img resize {} 10G'", .0.display(), .0.display())]
    VirtuallyEmpty(PathBuf),
    #[error("disk {} has {len} bytes, which is not a multiple of {unit}: its last sector would be cut off; extend it to {} bytes with 'truncate'", path.display(), len.next_multiple_of(*unit))]
    Size { path: PathBuf, len: u64, unit: u64 },
    #[error("disk {} has {len} bytes, which is not a multiple of {unit}: resize it to {} bytes with 'qemu-img resize'", path.display(), len.next_multiple_of(*unit))]
    VirtualSize { path: PathBuf, len: u64, unit: u64 },
    #[error("disk {} is on a file system without O_DIRECT: use --cache writeback", .0.display())]
    NoDirect(PathBuf),
    #[error("disk {} is in use", path.display())]
    Locked { path: PathBuf, source: LockError },
    #[error("cannot lock disk {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("disk {} {why}", path.display())]
    Header { path: PathBuf, why: HeaderError },
    #[error("disk {} cannot be used as qcow2; 'qemu-img check' may say more", path.display())]
    Format { path: PathBuf, source: io::Error },
    #[error("disk {} has clusters of {cluster} bytes, which are too small for --cache none on this file system: use --cache writeback", path.display())]
    Clusters { path: PathBuf, cluster: u64 },
    #[error("disk {} is qcow2, whose size does not change while it is in use: end the daemon, and use 'qemu-img resize'", .0.display())]
    Reload(PathBuf),
    #[error("the backing file of {} cannot be used", image.display())]
    Backing { image: PathBuf, source: Box<ImageError> },
    #[error("disk {0} needs its backing file {1}, which is not there: put it back, or say where it is now with 'qemu-img rebase -u -b PATH -F FORMAT {0}'", image.display(), path.display())]
    BackingMissing { image: PathBuf, path: PathBuf },
    #[error("disk {} has the backing file '{name}', which is no plain path: give it one with 'qemu-img rebase -u -b PATH -F FORMAT'", image.display())]
    BackingName { image: PathBuf, name: String },
    #[error("disk {} does not say what format its backing file '{name}' has, and guessing is not safe: name it with 'qemu-img rebase -u -b {name} -F raw' (or -F qcow2)", image.display())]
    BackingFormat { image: PathBuf, name: String },
    #[error("disk {} has the backing file '{name}' of the format '{format}': only raw and qcow2 are possible", image.display())]
    BackingFormatUnknown { image: PathBuf, name: String, format: String },
    #[error("disk {} has a backing file that leads back to it through {}", path.display(), image.display())]
    BackingLoop { path: PathBuf, image: PathBuf },
    #[error("disk {} has more than {most} backing files behind it: merge some with 'qemu-img commit' or 'qemu-img rebase'", path.display())]
    BackingDepth { path: PathBuf, most: usize },
}

impl ImageError {
    /// Whether the host stands in the way (permission, a lock) rather than the name or the file being wrong.
    pub fn is_hosts_fault(&self) -> bool {
        match self {
            Self::Open { source, .. } => !matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory
            ),
            Self::Locked { .. } | Self::Lock { .. } => true,
            Self::Backing { source, .. } => source.is_hosts_fault(),
            _ => false,
        }
    }
}

/// An open, locked image. The locks last as long as this lives.
#[derive(Debug)]
pub struct Image {
    /// Goes before the files do.
    mapped: Option<Mapped>,
    /// The image's own, then those of its backing files.
    files: Vec<HostImage>,
    path: PathBuf,
    /// It changes with [`Image::reload`] only.
    len: AtomicU64,
    read_only: bool,
    cache: CacheMode,
    geometry: Geometry,
    topology: Topology,
}

impl Image {
    /// Opens and locks the image: exclusively to write, shared to read. Backing files are only read.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let ImageOptions { path, read_only, cache, .. } = options;
        let (read_only, cache) = (*read_only, *cache);
        let (files, mapped) = match options.format {
            ImageFormat::Raw => {
                let file = HostImage::open(path, read_only, cache)?;
                warn_of_formats(path);
                (vec![file], None)
            }
            ImageFormat::Qcow2 => {
                let (files, mapped) = qcow2::open(path, read_only, cache)?;
                (files, Some(mapped))
            }
        };
        Self::of(files, mapped, options)
    }

    /// As [`Image::open`], of a file that somebody else has opened for us: for reading, and for writing unless it is only
    /// to be read. It has to be raw; the path of `options` is for messages.
    pub fn from_file(file: File, options: &ImageOptions) -> Result<Self, ImageError> {
        let ImageOptions { path, format, read_only, cache } = options;
        if *format != ImageFormat::Raw {
            return Err(ImageError::NotRaw(path.clone()));
        }
        let file = HostImage::of_file(file, path, *read_only, *cache)?;
        Self::of(vec![file], None, options)
    }

    fn of(files: Vec<HostImage>, mapped: Option<Mapped>, options: &ImageOptions) -> Result<Self, ImageError> {
        let (path, read_only, cache) = (options.path.clone(), options.read_only, options.cache);
        let geometry = files.iter().skip(1).fold(files[0].geometry, |all, file| all.with(file.geometry));
        let len = mapped.as_ref().map_or(files[0].len, Mapped::len);
        check_size(&path, len, geometry.logical_block, options.format)?;
        let topology = files[0].topology;
        Ok(Self { mapped, files, path, len: len.into(), read_only, cache, geometry, topology })
    }

    /// The file that holds the disk's bytes, or the first of those that do.
    pub fn file(&self) -> &File {
        &self.files[0].file
    }

    pub fn format(&self) -> ImageFormat {
        if self.mapped.is_some() { ImageFormat::Qcow2 } else { ImageFormat::Raw }
    }

    /// All files of the image, its own first.
    pub(crate) fn files(&self) -> impl Iterator<Item = &File> {
        self.files.iter().map(|file| &file.file)
    }

    /// How to find the disk's bytes in the files, unless they are the file's own.
    pub(crate) fn mapped(&self) -> Option<&Mapped> {
        self.mapped.as_ref()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes, a multiple of [`Image::logical_block`].
    #[expect(clippy::len_without_is_empty, reason = "an empty image is never opened")]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Looks at the image's size again: whether it has changed.
    ///
    /// # Errors
    /// What it is now is no size for a disk; nothing has changed then.
    pub fn reload(&self) -> Result<bool, ImageError> {
        if self.mapped.is_some() {
            return Err(ImageError::Reload(self.path.clone()));
        }
        let len = size(self.file()).map_err(|source| ImageError::Open { path: self.path.clone(), source })?;
        check_size(&self.path, len, self.geometry.logical_block, ImageFormat::Raw)?;
        Ok(self.len.swap(len, Ordering::Relaxed) != len)
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub fn cache(&self) -> CacheMode {
        self.cache
    }

    /// Smallest unit of I/O, in bytes: what a guest is to take for the logical block size.
    pub fn logical_block(&self) -> u32 {
        self.geometry.logical_block
    }

    /// Bytes; at least [`Image::logical_block`], and a multiple of it.
    pub fn physical_block(&self) -> u32 {
        self.geometry.physical_block
    }

    /// What the address of a buffer must be a multiple of; 1 where anything goes.
    pub fn memory_align(&self) -> u32 {
        self.geometry.memory_align
    }

    pub fn topology(&self) -> Topology {
        self.topology
    }
}

/// A device's size is where its end is; its metadata says 0.
fn size(file: &File) -> io::Result<u64> {
    Ok(seek(file, SeekFrom::End(0))?)
}

fn check_size(path: &Path, len: u64, logical_block: u32, format: ImageFormat) -> Result<(), ImageError> {
    let unit = u64::from(logical_block);
    match len {
        0 if format == ImageFormat::Qcow2 => Err(ImageError::VirtuallyEmpty(path.to_owned())),
        0 => Err(ImageError::Empty(path.to_owned())),
        len if !len.is_multiple_of(unit) && format == ImageFormat::Qcow2 => {
            Err(ImageError::VirtualSize { path: path.to_owned(), len, unit })
        }
        len if !len.is_multiple_of(unit) => Err(ImageError::Size { path: path.to_owned(), len, unit }),
        _ => Ok(()),
    }
}

/// One open, locked file or device.
#[derive(Debug)]
pub(crate) struct HostImage {
    pub(crate) file: File,
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) geometry: Geometry,
    topology: Topology,
}

impl HostImage {
    pub(crate) fn open(path: &Path, read_only: bool, cache: CacheMode) -> Result<Self, ImageError> {
        let opened = |source| ImageError::Open { path: path.to_owned(), source };
        let direct = cache == CacheMode::None;
        let meta = std::fs::metadata(path).map_err(opened)?;
        // Before it is opened: opening a FIFO waits, and a tape rewinds.
        check_kind(path, &meta)?;
        let flags = OFlags::CLOEXEC | if direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) if direct => ImageError::NoDirect(path.to_owned()),
                _ => opened(source),
            })?;
        Self::of_open(file, path, read_only, direct)
    }

    fn of_file(file: File, path: &Path, read_only: bool, cache: CacheMode) -> Result<Self, ImageError> {
        let opened = |source| ImageError::Open { path: path.to_owned(), source };
        let direct = cache == CacheMode::None;
        let flags = fcntl_getfl(&file).map_err(|errno| opened(errno.into()))?;
        let mode = flags & OFlags::ACCMODE;
        if mode != OFlags::RDWR && !(read_only && mode == OFlags::RDONLY) {
            return Err(ImageError::Mode(path.to_owned()));
        }
        let wanted = if direct { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
        if wanted != flags {
            fcntl_setfl(&file, wanted).map_err(|errno| match errno {
                Errno::INVAL if direct => ImageError::NoDirect(path.to_owned()),
                _ => opened(errno.into()),
            })?;
        }
        Self::of_open(file, path, read_only, direct)
    }

    fn of_open(file: File, path: &Path, read_only: bool, direct: bool) -> Result<Self, ImageError> {
        let opened = |source| ImageError::Open { path: path.to_owned(), source };
        let meta = file.metadata().map_err(opened)?;
        check_kind(path, &meta)?;
        let len = size(&file).map_err(opened)?;
        lock::lock(&file, read_only).map_err(|source| match source {
            LockError::Io(source) => ImageError::Lock { path: path.to_owned(), source },
            held => ImageError::Locked { path: path.to_owned(), source: held },
        })?;
        let is_device = meta.file_type().is_block_device();
        if meta.is_file() {
            serve_memory_at_once(&file).map_err(opened)?;
        }
        let geometry = Geometry::of(&file, is_device, direct).map_err(opened)?;
        let topology = if is_device { Topology::of_device(&file) } else { Topology::default() };
        Ok(Self { file, len, geometry, topology })
    }
}

fn check_kind(path: &Path, meta: &Metadata) -> Result<(), ImageError> {
    match meta.is_file() || meta.file_type().is_block_device() {
        true => Ok(()),
        false => Err(ImageError::Kind(path.to_owned())),
    }
}

/// tmpfs does not tell io_uring that it hardly ever waits, so that the kernel hands each request to a worker thread, which
/// takes many times as long as the copy that it is about. A file that is O_NONBLOCK is tried at once; reads and writes mind
/// that flag in no other way. On other file systems without such a word the worker is what keeps a queue from waiting.
fn serve_memory_at_once(file: &File) -> io::Result<()> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    if fstatfs(file)?.f_type == TMPFS_MAGIC {
        fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// A raw disk's first bytes are its guest's, so that this is worth a word and no more. Through another descriptor, which
/// needs no aligned buffer.
fn warn_of_formats(path: &Path) {
    let mut magic = [0; 4];
    if File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_err() {
        return;
    }
    let disk = path.display();
    if magic == qcow2::MAGIC {
        warn!(
            "disk {disk} begins like a qcow2 image and is served as raw: --format qcow2 serves what is in it"
        );
    } else if let Some(name) = qcow2::name_of(magic) {
        warn!(
            "disk {disk} begins like {name} and is served as raw: 'qemu-img convert -O raw' makes a disk of what is in it"
        );
    }
}

impl Drop for HostImage {
    fn drop(&mut self) {
        lock::unlock(&self.file);
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) logical_block: u32,
    physical_block: u32,
    memory_align: u32,
}

impl Geometry {
    /// Without O_DIRECT every offset and every buffer will do, whatever the disk below is like; the guest is told of
    /// its physical blocks all the same.
    fn of(file: &File, is_device: bool, direct: bool) -> io::Result<Self> {
        let sector = SECTOR as u32;
        let (device_logical, physical) = if is_device {
            (ioctl_blksszget(file)?, ioctl_blkpbszget(file)?)
        } else {
            // Files are stored in blocks of the file system; writing less makes it read first.
            (sector, rustix::fs::fstat(file)?.st_blksize.clamp(512, 4096) as u32)
        };
        let (logical, memory) = if direct {
            let (offset, memory) = direct_alignment(file).unwrap_or((device_logical, 512));
            (offset.max(device_logical), memory)
        } else {
            (device_logical, 1)
        };
        let logical = if logical.is_power_of_two() { logical.max(sector) } else { sector };
        let physical = if physical.is_power_of_two() { physical.max(logical) } else { logical };
        Ok(Self { logical_block: logical, physical_block: physical, memory_align: memory.max(1) })
    }

    /// What suits both.
    fn with(self, other: Self) -> Self {
        let logical_block = self.logical_block.max(other.logical_block);
        Self {
            logical_block,
            physical_block: self.physical_block.max(logical_block),
            memory_align: self.memory_align.max(other.memory_align),
        }
    }
}

/// Offset and memory alignment of O_DIRECT on this file, where the kernel (6.1) and the file system say.
fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // STATX_DIOALIGN, which rustix has no name for.
    let dio_align = StatxFlags::from_bits_retain(0x2000);
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, dio_align).ok()?;
    let said = stat.stx_mask & dio_align.bits() != 0 && stat.stx_dio_offset_align != 0;
    said.then_some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
}

#[cfg(test)]
mod tests;
