//! Image files, their locks, and asynchronous I/O on them. Nothing here knows of virtio or of guests: an [`Engine`]
//! moves bytes between an [`Image`] and memory that its caller vouches for.

mod bounce;
mod engine;
mod image;
mod lock;
mod qcow2;

pub use engine::{Engine, EngineError, Event, Range, RangeOp, Transfer, WatchId};
pub use image::{CacheMode, Image, ImageError, ImageFormat, ImageOptions, Topology};
pub use qcow2::HeaderError;
