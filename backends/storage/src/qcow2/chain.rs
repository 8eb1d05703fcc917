//! Opening a qcow2 image and the files behind it.
//!
//! The names of backing files come from the images, which come from anybody: only plain paths are followed, to files
//! and block devices, a bounded number of them, and none twice. What a file is, its image says, or it is refused: a guest
//! that writes a qcow2 header to its raw disk must not have it taken for one.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::check;
use super::header::{Backing, Header, HeaderError};
use super::host_file::HostFile;
use crate::image::{CacheMode, HostImage, ImageError};

/// Most files behind an image.
const MAX_BACKING: usize = 64;

/// O_DIRECT moves whole pages past the page cache that has the tables: a cluster shares no page with another.
const PAGE: u64 = 4096;

/// Most bytes of L1 tables of a chain, which are held in memory.
const MAX_L1_BYTES: u64 = 128 << 20;

/// One file, and how the one above it reads it.
struct Layer {
    path: PathBuf,
    /// The tables, and what imago moves by itself.
    buffered: File,
    /// `None`: raw.
    header: Option<Header>,
}

/// The image and everything behind it: the files the disk's bytes are in, and the way from the one to the other.
pub(super) struct Chain {
    pub(super) files: Vec<HostImage>,
    pub(super) access: FormatAccess<HostFile>,
    pub(super) cluster_size: u64,
}

pub(super) fn open(path: &Path, read_only: bool, cache: CacheMode) -> Result<Chain, ImageError> {
    let mut files = Vec::new();
    let mut layers = Vec::new();
    let mut seen = HashSet::new();
    let mut l1_bytes = 0;
    let mut next = Some((path.to_owned(), true));
    while let Some((path, is_qcow2)) = next.take() {
        let at = layers.len();
        let outcome = open_layer(&path, is_qcow2, read_only || at > 0, cache, &mut seen, &layers);
        let (file, layer) = outcome.map_err(|error| match layers.last() {
            Some(layer) => of_backing(&layer.path, error),
            None => error,
        })?;
        if let Some(backing) = layer.header.as_ref().and_then(|header| header.backing.as_ref()) {
            if layers.len() == MAX_BACKING {
                return Err(ImageError::BackingDepth { path: layers[0].path.clone(), most: MAX_BACKING });
            }
            next = Some(resolve(&path, backing)?);
        }
        l1_bytes += layer.header.as_ref().map_or(0, |header| u64::from(header.l1_entries) * 8);
        if l1_bytes > MAX_L1_BYTES {
            let why = HeaderError::Damaged(format!("L1 tables of {l1_bytes} bytes in its chain"));
            return Err(ImageError::Header { path, why });
        }
        files.push(file);
        layers.push(layer);
    }
    let cluster_size = layers[0].header.as_ref().map_or(PAGE, Header::cluster_size);
    let access = assemble(layers, read_only)?;
    Ok(Chain { files, access, cluster_size })
}

/// What is wrong with the file behind `image`.
fn of_backing(image: &Path, error: ImageError) -> ImageError {
    let image = image.to_owned();
    match error {
        ImageError::Open { path, source } if source.kind() == io::ErrorKind::NotFound => {
            ImageError::BackingMissing { image, path }
        }
        ImageError::BackingLoop { .. } => error,
        error => ImageError::Backing { image, source: Box::new(error) },
    }
}

fn open_layer(
    path: &Path,
    is_qcow2: bool,
    read_only: bool,
    cache: CacheMode,
    seen: &mut HashSet<(u64, u64)>,
    above: &[Layer],
) -> Result<(HostImage, Layer), ImageError> {
    let opened = |source| ImageError::Open { path: path.to_owned(), source };
    let meta = std::fs::metadata(path).map_err(opened)?;
    if !seen.insert((meta.dev(), meta.ino())) {
        let image = above.last().map_or_else(PathBuf::new, |layer| layer.path.clone());
        return Err(ImageError::BackingLoop { path: path.to_owned(), image });
    }
    let file = HostImage::open(path, read_only, cache)?;
    let buffered = if cache == CacheMode::None {
        let buffered = File::options().read(true).write(!read_only).open(path).map_err(opened)?;
        let (ours, other) = (file.file.metadata().map_err(opened)?, buffered.metadata().map_err(opened)?);
        if (ours.dev(), ours.ino()) != (other.dev(), other.ino()) {
            return Err(opened(io::Error::other("it was replaced while it was opened")));
        }
        buffered
    } else {
        file.file.try_clone().map_err(opened)?
    };
    let header = if is_qcow2 {
        let header = read_header(&buffered, path, file.len)?;
        if cache == CacheMode::None && header.cluster_size() < PAGE.max(file.geometry.logical_block.into()) {
            return Err(ImageError::Clusters { path: path.to_owned(), cluster: header.cluster_size() });
        }
        check::tables(&buffered, &header, file.len, !read_only)
            .map_err(|why| ImageError::Header { path: path.to_owned(), why })?;
        Some(header)
    } else {
        None
    };
    Ok((file, Layer { path: path.to_owned(), buffered, header }))
}

fn read_header(file: &File, path: &Path, len: u64) -> Result<Header, ImageError> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(Header::MAX_LEN)];
    file.read_exact_at(&mut bytes, 0).map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
    Header::parse(&bytes, len).map_err(|why| ImageError::Header { path: path.to_owned(), why })
}

/// Where the backing file is, and whether it is qcow2.
fn resolve(image: &Path, backing: &Backing) -> Result<(PathBuf, bool), ImageError> {
    let (image_path, name) = (image.to_owned(), backing.name.clone());
    // As QEMU sees it: what stands before a colon in the first component is a protocol, as in json:, nbd: or file:.
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(ImageError::BackingName { image: image_path, name });
    }
    let is_qcow2 = match backing.format.as_deref() {
        Some("qcow2") => true,
        Some("raw" | "file" | "host_device") => false,
        Some(format) => {
            let format = format.to_owned();
            return Err(ImageError::BackingFormatUnknown { image: image_path, name, format });
        }
        None => return Err(ImageError::BackingFormat { image: image_path, name }),
    };
    let beside = image.parent().unwrap_or(Path::new(""));
    Ok((beside.join(&name), is_qcow2))
}

/// From the last file up to the image.
fn assemble(layers: Vec<Layer>, read_only: bool) -> Result<FormatAccess<HostFile>, ImageError> {
    let mut below: Option<FormatAccess<HostFile>> = None;
    for (index, layer) in layers.into_iter().enumerate().rev() {
        let Layer { path, buffered, header } = layer;
        let failed = |source| ImageError::Format { path: path.clone(), source };
        let writable = index == 0 && !read_only;
        let number = index as u32;
        let access = match &header {
            None => {
                let raw = Raw::open_image(HostFile::raw(buffered, number), writable).map_err(failed)?;
                FormatAccess::new(raw)
            }
            Some(header) => {
                let file = HostFile::qcow2(buffered, number, header, writable).map_err(failed)?;
                let mut qcow2 = Qcow2::<HostFile>::open_image(file, writable).map_err(failed)?;
                qcow2.set_data_file(None);
                qcow2.set_backing(below.take());
                FormatAccess::new(qcow2)
            }
        };
        below = Some(access);
    }
    // There is a first layer: the image itself.
    below.ok_or_else(|| ImageError::Kind(PathBuf::new()))
}
