//! What a guest says of its memory (virtio 1.2, 5.5.6.3).

use serde::ser::{Serialize, SerializeMap, Serializer};

/// Bytes of an entry: a tag of 16 bits, a value of 64, not aligned.
const ENTRY: usize = 10;

/// Most bytes of one answer: several times what is defined.
pub(crate) const MOST: usize = 64 * ENTRY;

/// By tag. Sizes are in bytes, the others are counts since the guest started.
const NAMES: [&str; 16] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free",
    "total",
    "available",
    "caches",
    "hugetlb-allocations",
    "hugetlb-failures",
    "oom-kills",
    "allocation-stalls",
    "async-scanned",
    "direct-scanned",
    "async-reclaimed",
    "direct-reclaimed",
];

const FREE: usize = 4;
const AVAILABLE: usize = 6;

/// By tag; `None` is what the guest does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// What is no whole entry, or of a tag nobody knows, is passed over; so is a value of all ones, which is none.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for entry in bytes.chunks_exact(ENTRY) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let value = entry[2..].try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
            if let Some(place) = statistics.0.get_mut(usize::from(tag)).filter(|_| value != u64::MAX) {
                *place = Some(value);
            }
        }
        statistics
    }

    /// Bytes that the guest could use without swapping; a guest that does not say has at least what is free.
    pub(crate) fn available(&self) -> Option<u64> {
        self.0[AVAILABLE].or(self.0[FREE])
    }
}

impl Serialize for Statistics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in NAMES.iter().zip(self.0) {
            if let Some(value) = value {
                map.serialize_entry(name, &value)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn what_is_known_is_read_and_the_rest_passed_over() {
        let bytes =
            [entry(5, 1 << 30), entry(4, 77), entry(999, 1), entry(0, u64::MAX), entry(16, 1), vec![6, 0, 1]];
        let statistics = Statistics::read(&bytes.concat());
        assert_eq!(
            serde_json::to_value(&statistics).unwrap(),
            serde_json::json!({"free": 77, "total": 1 << 30})
        );
        assert_eq!(statistics.available(), Some(77));
        assert_eq!(Statistics::read(&entry(6, 5)).available(), Some(5));
        assert_eq!(Statistics::read(&[]).available(), None);
    }
}
