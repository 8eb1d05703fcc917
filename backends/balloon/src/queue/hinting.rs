//! The hinting queue: numbers that begin and end a hinting, and between them free pages (virtio 1.2, 5.5.6.5).

use cleave_runtime::Chain;
use vm_memory::Address;

use super::{Requests, Ring, gather};
use crate::pages::Run;
use crate::shared::Shared;

pub(crate) struct Hinted<'s>(pub(crate) &'s Shared);

impl Requests for Hinted<'_> {
    fn serve(&mut self, ring: &mut Ring, chain: &Chain) -> u32 {
        if !chain.readable().is_empty() {
            let mut bytes = [0; 4];
            match gather(ring.vring.memory(), chain.readable(), &mut bytes) {
                Some(read) if read.len() == 4 => {
                    self.0.with_hints(|hints| hints.said(u32::from_le_bytes(bytes)));
                }
                _ => ring.complain(&"the number of a hinting is cut off, or outside of memory"),
            }
        }
        let runs = chain.writable().iter();
        let runs = runs.filter_map(|segment| Run::new(segment.addr.raw_value(), segment.len.into()));
        self.0.with_hints(|hints| runs.for_each(|run| hints.hint(run)));
        0
    }
}
