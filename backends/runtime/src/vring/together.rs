//! For devices that use several chains for one thing (virtio 1.2, 5.1.6.4), in the order in which they fetch them.
//!
//! In the region of requests in flight the chains of one call are a batch: all are on its list before the used index
//! moves, and the region's own index moves when none of them is in flight any more. Wherever this process dies, all of them
//! were used or none.

use super::{RingError, SplitRing, Vring};

impl Vring {
    /// Gives chains back to the guest, which sees all of them or none; with each goes the count of bytes written to it.
    pub fn push_used_together(&mut self, used: &[(u16, u32)]) -> Result<(), RingError> {
        let Some((last, others)) = used.split_last() else { return Ok(()) };
        let before = self.ring.next_used();
        if let Some(log) = &mut self.log {
            used.iter().for_each(|(head, _)| log.chain_written(&self.memory, &self.ring, *head));
        }
        if let Some(inflight) = &mut self.inflight {
            used.iter().try_for_each(|(head, _)| inflight.before_used(*head))?;
        }
        for (head, len) in used {
            let element = self.ring.put_used(*head, *len);
            if let Some(log) = &self.log {
                log.used_ring_written(element, SplitRing::ELEMENT_LEN);
            }
        }
        self.ring.publish_used();
        if let Some(inflight) = &mut self.inflight {
            // The index stays where it was until the last one: until then the whole batch is known to be one.
            others.iter().try_for_each(|(head, _)| inflight.after_used(*head, before))?;
            inflight.after_used(last.0, self.ring.next_used())?;
        }
        if let Some(log) = &self.log {
            log.used_ring_written(0, SplitRing::HEADER_LEN);
        }
        Ok(())
    }

    /// Gives back the last `count` heads fetched, none of which has been pushed, before a stop: whoever serves the ring
    /// next fetches them again.
    pub fn unfetch(&mut self, count: u16) {
        // Where the frontend keeps what is in flight, they come again from there.
        if self.inflight.is_none() {
            self.ring.rewind(count);
        }
    }

    /// Whether this ring is at its beginning. As a rule nobody has served it then since its driver set it up; but it may
    /// have been taken away before its first chain was used, or have come round.
    pub fn is_fresh(&self) -> bool {
        self.ring.next_avail() == 0 && self.ring.next_used() == 0 && self.resubmit.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use cleave_common::vhost_user::Inflight;

    use crate::vring::{Found, InflightArea, QueueIndex};

    #[test]
    fn wherever_it_dies_all_of_a_batch_were_used_or_none() {
        // 0: before the used index moved; then after so many of the region's own steps.
        for steps in 0..=4 {
            let wanted = Inflight { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: 16 };
            let (made, fd) = InflightArea::create(wanted, 1, 0).unwrap();
            let queue = || {
                let area = InflightArea::map(made, fd.try_clone().unwrap(), 1).unwrap();
                area.queue(QueueIndex(0)).unwrap()
            };
            let mut first = queue();
            first.attach(16, 65534).unwrap();
            for head in [4, 7, 1, 0] {
                first.fetched(head).unwrap();
            }
            let batch = [4, 7, 1];
            batch.iter().for_each(|head| first.before_used(*head).unwrap());
            for (step, head) in (2..).zip(batch).take_while(|(step, _)| *step <= steps) {
                first.after_used(head, if step == 4 { 1 } else { 65534 }).unwrap();
            }
            let (used_idx, left) = if steps == 0 { (65534, vec![4, 7, 1, 0]) } else { (1, vec![0]) };
            assert_eq!(queue().attach(16, used_idx).unwrap(), Found::Used(left), "{steps}");
        }
    }
}
