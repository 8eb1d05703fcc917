//! The reporting queue: free pages, which the guest leaves alone until their request is used (virtio 1.2, 5.5.6.7).

use cleave_runtime::Chain;
use vm_memory::Address;

use super::pages::complain;
use super::{Requests, Ring};
use crate::host::Outcome;
use crate::pages::Run;
use crate::shared::Shared;

pub(crate) struct Reports<'s>(pub(crate) &'s Shared);

impl Requests for Reports<'_> {
    fn serve(&mut self, ring: &mut Ring, chain: &Chain) -> u32 {
        // The guest relies on it that its free pages keep what they are filled with; a hole is zeros.
        if self.0.is_poisoned() {
            return 0;
        }
        let mut outcome = Outcome::default();
        let mut host = self.0.host();
        for segment in chain.writable() {
            if let Some(run) = Run::new(segment.addr.raw_value(), segment.len.into()) {
                host.report(run, &mut outcome);
            }
        }
        drop(host);
        self.0.counters.reported(&outcome);
        complain(ring, &outcome);
        0
    }
}
