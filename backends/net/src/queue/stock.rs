//! The buffers for frames that a driver has made available: fetched ahead, used in order (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! Frames that come at once can be given to the driver together: each time it is told, the lines of memory that tell it
//! change hands. Whoever fills buffers says when no more are to come for now ([`Stock::give`]).
//!
//! Invariants: chains are used in the order in which they were fetched, so that unused ones can be given back; with
//! mergeable buffers a frame uses as many as it fills, all at once; otherwise one.

use std::collections::VecDeque;

use cleave_runtime::{Chain, Vring};

use super::{QueueError, Ring};
use crate::buffers::{GuestBuffers, MAX_BUFFERS};
use crate::config_space::{HEADER_LEN, feature, header_len};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// How many buffers, or how many bytes in them, are given together: more where a frame takes more.
const TOGETHER: usize = 16;
const TOGETHER_BYTES: usize = 64 << 10;

/// A chain that waits for a frame.
#[derive(Debug, Clone, Copy)]
struct Fetched {
    head: u16,
    /// Of [`Stock::buffers`].
    entries: usize,
    /// Bytes.
    len: usize,
}

pub(crate) struct Stock {
    /// Bytes before each frame.
    header: usize,
    mergeable: bool,
    /// The driver knows nothing of checksums: none of the header's flags is for it.
    no_flags: bool,
    chain: Chain,
    fetched: VecDeque<Fetched>,
    /// By head: it is fetched.
    is_fetched: Vec<bool>,
    /// A chain that is no buffer, fetched last: it is given back when those before it are used.
    unusable: Option<u16>,
    /// Of all that are fetched.
    pub(crate) buffers: GuestBuffers,
    /// Buffers of whole frames that are filled, and not used yet; bytes in them.
    used: Vec<(u16, u32)>,
    used_bytes: usize,
}

impl Stock {
    /// Of a driver with these features.
    pub(crate) fn new(vring: &Vring, features: u64) -> Self {
        Self {
            header: header_len(features).into(),
            mergeable: features & feature::MRG_RXBUF != 0,
            no_flags: features & feature::GUEST_CSUM == 0,
            chain: Chain::default(),
            fetched: VecDeque::new(),
            is_fetched: vec![false; vring.size().into()],
            unusable: None,
            buffers: GuestBuffers::new(vring.memory().clone()),
            used: Vec::with_capacity(TOGETHER),
            used_bytes: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.fetched.is_empty()
    }

    /// Fetches chains until they have room for `wanted` bytes; fewer, if there are not as many.
    pub(crate) fn fetch(&mut self, ring: &mut Ring, wanted: usize) -> Result<(), QueueError> {
        // Bounded, however fast the driver makes available what is no buffer.
        for _ in 0..=ring.vring.size() {
            if let Some(head) = self.unusable.filter(|_| self.fetched.is_empty()) {
                self.unusable = None;
                self.is_fetched[usize::from(head)] = false;
                self.used.push((head, 0));
            }
            let enough = self.buffers.len() >= wanted || !self.mergeable && !self.fetched.is_empty();
            if enough || self.is_full() {
                return Ok(());
            }
            let Some(head) = ring.vring.next_head()? else { return Ok(()) };
            if std::mem::replace(&mut self.is_fetched[usize::from(head)], true) {
                ring.vring.unfetch(1);
                return Err(QueueError::HeadTwice(head));
            }
            match self.add(ring, head) {
                Ok(fetched) => self.fetched.push_back(fetched),
                Err(what) => {
                    ring.complain(&what);
                    self.unusable = Some(head);
                }
            }
        }
        Ok(())
    }

    /// No more chains can be fetched before some are used.
    fn is_full(&self) -> bool {
        self.unusable.is_some() || self.buffers.entries() > MAX_BUFFERS / 2
    }

    fn add(&mut self, ring: &Ring, head: u16) -> Result<Fetched, String> {
        ring.vring.read_chain(head, &mut self.chain).map_err(|error| error.to_string())?;
        if !self.chain.readable().is_empty() {
            return Err("a buffer for frames has parts that the device may only read".to_owned());
        }
        let before = self.buffers.len();
        let entries = self.buffers.push(self.chain.writable()).map_err(|error| error.to_string())?;
        let len = self.buffers.len() - before;
        if len < self.header {
            self.buffers.drop_last(entries);
            return Err(format!("a buffer of {len} bytes has no room for a header"));
        }
        Ok(Fetched { head, entries, len })
    }

    /// What does not fit now will never fit.
    pub(crate) fn is_all_there_can_be(&self, ring: &Ring) -> bool {
        let single = !self.mergeable && !self.fetched.is_empty();
        single || self.is_full() || self.fetched.len() == usize::from(ring.vring.size())
    }

    /// A frame of `len` bytes, with its header, is in the first buffers: the driver gets it with the next that are given.
    pub(crate) fn use_up(&mut self, len: usize) {
        let (mut left, mut entries, mut count) = (len, 0, 0);
        while let Some(fetched) = self.fetched.pop_front_if(|_| left != 0) {
            let part = left.min(fetched.len);
            left -= part;
            entries += fetched.entries;
            self.is_fetched[usize::from(fetched.head)] = false;
            // A frame has 68 KiB at most.
            self.used.push((fetched.head, part as u32));
            count += 1;
        }
        self.finish_header(count);
        self.buffers.consume(entries);
        self.used_bytes += len;
    }

    /// There are as many frames as are to be given together.
    pub(crate) fn is_due(&self) -> bool {
        self.used.len() >= TOGETHER || self.used_bytes >= TOGETHER_BYTES
    }

    /// Gives the driver all that is used up.
    pub(crate) fn give(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        self.used_bytes = 0;
        let given = ring.vring.push_used_together(&self.used);
        self.used.clear();
        Ok(given?)
    }

    /// Completes the header of the frame that is in the first `count` buffers: whoever wrote it has left what it does not know.
    fn finish_header(&self, count: u16) {
        if self.header == usize::from(HEADER_LEN) {
            self.buffers.write_at(NUM_BUFFERS, &count.to_le_bytes());
        }
        if self.no_flags {
            self.buffers.write_at(0, &[0]);
        }
    }

    /// Gives back what is fetched and not used, before a stop.
    pub(crate) fn give_back(&mut self, ring: &mut Ring) {
        // Unusable ones and these are all that a queue of at most 32768 entries has.
        ring.vring.unfetch((self.fetched.len() + usize::from(self.unusable.is_some())) as u16);
    }
}
