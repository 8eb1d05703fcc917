//! The images of an engine: they come and go while requests on others are in flight.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use io_uring::types;

use super::Engine;
use super::mapped::Mapping;
use super::range::Support;
use super::transfer::Slot;
use crate::image::{CacheMode, Image};
use crate::qcow2::Mapped;

/// One of an engine's images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskId(pub(super) u16);

impl DiskId {
    /// The one that the engine was made with.
    pub const FIRST: Self = Self(0);
}

/// An image, and what the engine knows of it.
pub(super) struct Disk {
    /// On an image whose bytes are where its tables say. It goes before the image does.
    pub(super) mapping: Option<Mapping>,
    pub(super) support: Support,
    pub(super) image: Arc<Image>,
}

impl Engine {
    /// Requests can be made for `image` from now on.
    ///
    /// # Errors
    /// The kernel has no descriptor, or does not say what the image's file is.
    pub fn attach(&mut self, image: Arc<Image>) -> io::Result<DiskId> {
        let is_device = image.file().metadata()?.file_type().is_block_device();
        let support = Support::new(fd_of(image.file()), is_device);
        let port = image.mapped().map(Mapped::port).transpose()?;
        let mapping = port.map(|port| {
            let watch = self.watch(port.event_fd());
            Mapping::new(port, image.files().map(fd_of).collect(), watch)
        });
        let at = self.disks.iter().position(Option::is_none).unwrap_or(self.disks.len());
        if at == self.disks.len() {
            self.disks.push(None);
        }
        self.disks[at] = Some(Disk { mapping, support, image });
        Ok(DiskId(at as u16))
    }

    /// Lets go of an image.
    ///
    /// # Panics
    /// When a request on it is in flight or parked.
    pub fn detach(&mut self, disk: DiskId) {
        let busy = self.slots.iter().any(|slot| slot.is_busy() && slot.disk() == disk);
        assert!(!busy, "requests are in flight on an image that is detached");
        let gone = self.disks.get_mut(usize::from(disk.0)).and_then(Option::take);
        if let Some(Mapping { watch, .. }) = gone.as_ref().and_then(|disk| disk.mapping.as_ref()) {
            self.unwatch(*watch);
        }
    }

    /// Requests that begin from now on are for `disk`.
    pub fn select(&mut self, disk: DiskId) {
        self.selected = disk;
    }

    /// What buffers for the selected image must be aligned to: address, length.
    pub(super) fn alignment(&self) -> (usize, usize) {
        let selected = self.disks.get(usize::from(self.selected.0)).and_then(Option::as_ref);
        match selected.map(|disk| &disk.image) {
            Some(image) if image.cache() == CacheMode::None => {
                (image.memory_align() as usize, image.logical_block() as usize)
            }
            _ => (1, 1),
        }
    }
}

/// The image that the request of `slot` is for.
pub(super) fn disk_of<'d>(disks: &'d mut [Option<Disk>], slot: &Slot) -> &'d mut Disk {
    let disk = disks.get_mut(usize::from(slot.disk().0)).and_then(Option::as_mut);
    disk.expect("an image stays attached while requests for it are in flight")
}

/// How the kernel is told of a file of an image, which is open as long as the engine is there.
fn fd_of(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}
