//! The Internet's checksum (RFC 1071): the sum of 16-bit words in one's complement.

/// The sum of bytes that start at an even place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes; of an odd count only the last time, for a zero is thought behind them.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        // Four bytes a step: a carry out of the lower half is folded back in the end. The sum of a frame fits many times.
        let (words, rest) = bytes.as_chunks::<4>();
        self.0 += words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        self.0 += u64::from(u32::from_be_bytes(last));
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    pub(crate) fn plus_number(self, number: u32) -> Self {
        Self(self.0 + u64::from(number))
    }

    /// The checksum that makes the whole sum up to zero. One that is zero is written as its other form, for UDP takes zero
    /// for none.
    pub(crate) fn checksum(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        match !(sum as u16) {
            0 => 0xffff,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(bytes: &[u8]) -> Sum {
        let mut sum = Sum::default();
        sum.add(bytes);
        sum
    }

    #[test]
    fn the_example_of_the_rfc() {
        // RFC 1071, 3: the sum is ddf2.
        assert_eq!(of(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]).checksum(), !0xddf2);
        assert_eq!(of(&[]).checksum(), 0xffff);
        assert_eq!(of(&[0xff, 0xff]).checksum(), 0xffff);
    }

    proptest! {
        #[test]
        fn it_is_the_sum_of_words(bytes in prop::collection::vec(any::<u8>(), 0..2000), at in 0usize..1000) {
            let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)));
            let simple = words.fold(0, |sum, word| { let sum = sum + word; (sum & 0xffff) + (sum >> 16) });
            let expected = if simple == 0xffff { 0xffff } else { !(simple as u16) };
            prop_assert_eq!(of(&bytes).checksum(), expected);
            let at = (2 * at).min(bytes.len() & !1);
            prop_assert_eq!(of(&bytes[..at]).plus(of(&bytes[at..])).checksum(), expected);
        }
    }
}
