//! Image files, their locks, and asynchronous I/O on them. Nothing here knows of virtio or of guests: an [`Engine`]
//! moves bytes between [`Image`]s and memory that its caller vouches for; [`Waiting`] keeps what may not go yet.

mod admission;
mod bounce;
mod engine;
mod image;
mod lock;
mod qcow2;
mod throttle;
mod waiting;

pub use admission::{Admission, Nudges, Waited};
pub use engine::{DiskId, Engine, EngineError, Event, Range, RangeOp, Transfer, WatchId};
pub use image::{CacheMode, Image, ImageError, ImageFormat, ImageOptions, Topology};
pub use qcow2::HeaderError;
pub use throttle::{Direction, Throttle, Turn};
pub use waiting::Waiting;
