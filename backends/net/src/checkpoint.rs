//! What every frame of a port passes, whichever way it goes: rate limits, and the capture.

use std::time::Duration;

use cleave_common::throttle::NetThrottleConfig;

use crate::buffers::GuestBuffers;
use crate::limits::{Direction, Limits};
use crate::pcap::Capture;

/// Where the header says how a frame is to be segmented (virtio 1.2, 5.1.6.1): `gso_type`, `hdr_len`, `gso_size`.
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;

#[derive(Debug, Default)]
pub(crate) struct Checkpoint {
    limits: Limits,
    capture: Option<Capture>,
}

impl Checkpoint {
    pub(crate) fn new(throttle: &NetThrottleConfig, capture: Option<Capture>) -> Self {
        Self { limits: Limits::new(throttle), capture }
    }

    /// How long the next frame has to wait; `None`: it may pass.
    pub(crate) fn wait(&self, direction: Direction) -> Option<Duration> {
        self.limits.of(direction)?.wait()
    }

    /// The frame that is in the first `len` bytes of `buffers`, behind a header of `header` bytes, has passed.
    pub(crate) fn passed(&self, direction: Direction, buffers: &GuestBuffers, header: usize, len: usize) {
        if let Some(limiter) = self.limits.of(direction) {
            let bytes = len - header;
            limiter.passed(if limiter.counts_packets() { packets(buffers, bytes) } else { 1 }, bytes);
        }
        if let Some(capture) = &self.capture {
            capture.frame(buffers, header, len - header);
        }
    }

    /// How the capture is, for a person.
    pub(crate) fn report(&self) -> Option<String> {
        self.capture.as_ref().map(Capture::report)
    }
}

/// How many packets the frame of so many bytes becomes.
fn packets(buffers: &GuestBuffers, bytes: usize) -> u32 {
    let mut header = [0; GSO_SIZE + 2];
    buffers.read_at(0, &mut header);
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    match word(GSO_SIZE) {
        size if header[GSO_TYPE] != 0 && size != 0 => {
            bytes.saturating_sub(word(HDR_LEN)).div_ceil(size).max(1) as u32
        }
        _ => 1,
    }
}
