//! Config space and feature bits of virtio-balloon (virtio 1.2, 5.5.3 and 5.5.4).

/// Device feature bits.
pub(crate) mod feature {
    pub(crate) const STATS_VQ: u64 = 1 << 1;
    pub(crate) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(crate) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(crate) const PAGE_POISON: u64 = 1 << 4;
    pub(crate) const REPORTING: u64 = 1 << 5;
}

/// The balloon's unit, whatever pages guest and host have.
pub(crate) const PAGE: u64 = 4096;

/// Where the fields are that a driver writes.
pub(crate) const ACTUAL: usize = 4;
pub(crate) const POISON_VAL: usize = 12;

const LEN: usize = 16;

/// Values of `free_page_hint_cmd_id` that are no hinting of their own.
pub(crate) const CMD_ID_STOP: u32 = 0;
pub(crate) const CMD_ID_DONE: u32 = 1;

/// What config space says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    /// Pages that the balloon is to have.
    pub(crate) num_pages: u32,
    /// Pages that it has, says the driver.
    pub(crate) actual: u32,
    pub(crate) free_page_hint_cmd_id: u32,
    /// What the guest's free pages are filled with, says the driver.
    pub(crate) poison_val: u32,
}

impl ConfigSpace {
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let fields = [self.num_pages, self.actual, self.free_page_hint_cmd_id, self.poison_val];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let config =
            ConfigSpace { num_pages: 0x0102_0304, actual: 5, free_page_hint_cmd_id: 6, poison_val: 0xaa };
        assert_eq!(config.bytes(), [4, 3, 2, 1, 5, 0, 0, 0, 6, 0, 0, 0, 0xaa, 0, 0, 0]);
        assert_eq!(config.bytes()[ACTUAL], 5);
        assert_eq!(config.bytes()[POISON_VAL], 0xaa);
    }
}
