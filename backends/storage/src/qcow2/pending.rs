//! What the worker has been told to write and has not finished: whole clusters of the disk.

use std::ops::Range;

/// Bytes of the disk, by job.
#[derive(Debug, Default)]
pub(super) struct Pending {
    entries: Vec<(u64, Range<u64>)>,
    /// Of `entries`: their job is over, but its tables could not be written back yet.
    failed: Vec<u64>,
    next: u64,
}

impl Pending {
    pub(super) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.entries.iter().any(|(_, other)| other.start < range.end && range.start < other.end)
    }

    /// The entry's id.
    pub(super) fn add(&mut self, range: Range<u64>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.entries.push((id, range));
        id
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.entries.retain(|(other, _)| *other != id);
    }

    /// Keeps an entry until the tables are written back after all. One is enough for a place that fails again and again.
    pub(super) fn fail(&mut self, id: u64) {
        let range = self.entries.iter().find(|(other, _)| *other == id).map(|(_, range)| range.clone());
        let known =
            |(other, at): &(u64, Range<u64>)| self.failed.contains(other) && Some(at) == range.as_ref();
        if self.entries.iter().any(known) {
            self.remove(id);
        } else {
            self.failed.push(id);
        }
    }

    /// All tables are written back.
    pub(super) fn remove_failed(&mut self) {
        let failed = std::mem::take(&mut self.failed);
        self.entries.retain(|(id, _)| !failed.contains(id));
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
