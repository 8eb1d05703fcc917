//! What a console has printed last: a ring of bytes, counted from the first one ever printed.
//!
//! Invariants: never more than its capacity is kept, and the newest of it; a place is a count of bytes since the
//! beginning, so that whoever reads knows how much it has missed.

use std::collections::VecDeque;

#[derive(Debug)]
pub(crate) struct History {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// The place behind the last byte.
    end: u64,
}

impl History {
    /// For `capacity` bytes, at least one. Memory is taken as it is needed.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), capacity: capacity.max(1), end: 0 }
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity as u64
    }

    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// The place of the oldest byte that is there.
    pub(crate) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Adds bytes, in place of the oldest ones where there is no room.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        let newest = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + newest.len()).saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        self.bytes.extend(newest);
    }

    /// The bytes from `place` on, which is not before [`History::start`], in two parts.
    pub(crate) fn from(&self, place: u64) -> [&[u8]; 2] {
        let skip = place.saturating_sub(self.start()) as usize;
        let (first, second) = self.bytes.as_slices();
        let of_second = skip.saturating_sub(first.len()).min(second.len());
        [&first[skip.min(first.len())..], &second[of_second..]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(history: &History, place: u64) -> String {
        String::from_utf8(history.from(place).concat()).unwrap()
    }

    #[test]
    fn the_newest_bytes_are_kept_with_their_places() {
        let mut history = History::new(8);
        assert_eq!((history.start(), history.end(), text(&history, 0)), (0, 0, String::new()));
        history.push(b"abc");
        assert_eq!((history.start(), text(&history, 0), text(&history, 2)), (0, "abc".into(), "c".into()));
        history.push(b"defghij");
        assert_eq!((history.start(), history.end(), text(&history, 2)), (2, 10, "cdefghij".into()));
        assert_eq!(
            (text(&history, 9), text(&history, 10), text(&history, 99)),
            ("j".into(), "".into(), "".into())
        );
        history.push(b"0123456789");
        assert_eq!((history.start(), history.end(), text(&history, 12)), (12, 20, "23456789".into()));
    }

    #[test]
    fn parts_meet_wherever_the_ring_turns() {
        let mut history = History::new(7);
        for round in 0..50_u8 {
            history.push(&[round; 3]);
            let all = history.from(history.start()).concat();
            for place in history.start()..=history.end() {
                assert_eq!(history.from(place).concat(), all[(place - history.start()) as usize..]);
            }
        }
    }
}
