//! What is said of a guest's mistakes: a few of them, for a guest can make any number.

use std::fmt::Display;

use tracing::{debug, warn};

use crate::vring::QueueIndex;

/// Most that are shown of one ring, from its start to its stop.
const SHOWN: u32 = 8;

/// Of one ring.
#[derive(Debug, Default)]
pub struct Complaints(u32);

impl Complaints {
    pub fn add(&mut self, queue: QueueIndex, what: &dyn Display) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..SHOWN => warn!("{queue}: {what}"),
            SHOWN => warn!("{queue}: {what} (and more, which are not shown)"),
            _ => debug!("{queue}: {what}"),
        }
    }
}
