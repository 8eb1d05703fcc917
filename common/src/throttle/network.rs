//! Rate limits of a network device.

use std::fmt;

use serde::Deserialize;

use super::{Limit, Row, Text, ThrottleError};
use crate::size::ByteSize;

/// Limits as given. A rate that is absent, or 0, is no limit.
///
/// Rates are packets (`pps-`) or bytes (`bps-`) a second, of what the guest receives (`rx`) or sends (`tx`). `-max` is the
/// rate of a burst; it may last `-max-length` seconds (1 unless given). Bytes are those of Ethernet frames. A frame that is
/// to be segmented counts as the packets that it becomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    deny_unknown_fields,
    default,
    expecting = "a table of limits, as in { bps-rx = \"10M\" }"
)]
pub struct NetThrottleConfig {
    pub pps_rx: Option<u64>,
    pub pps_tx: Option<u64>,
    pub bps_rx: Option<ByteSize>,
    pub bps_tx: Option<ByteSize>,
    pub pps_rx_max: Option<u64>,
    pub pps_tx_max: Option<u64>,
    pub bps_rx_max: Option<ByteSize>,
    pub bps_tx_max: Option<ByteSize>,
    pub pps_rx_max_length: Option<u64>,
    pub pps_tx_max_length: Option<u64>,
    pub bps_rx_max_length: Option<u64>,
    pub bps_tx_max_length: Option<u64>,
}

/// The limits of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DirectionLimits {
    pub packets: Option<Limit>,
    pub bytes: Option<Limit>,
}

impl NetThrottleConfig {
    /// Whether there is no limit at all.
    pub fn is_empty(&self) -> bool {
        self.rows().iter().all(|row| row.limit().is_none())
    }

    /// # Errors
    /// The limits contradict each other: the first thing found.
    pub fn validate(&self) -> Result<(), ThrottleError> {
        self.rows().iter().try_for_each(Row::validate)
    }

    /// Of what the guest receives.
    pub fn rx(&self) -> DirectionLimits {
        let [packets, _, bytes, _] = self.rows().map(|row| row.limit());
        DirectionLimits { packets, bytes }
    }

    /// Of what the guest sends.
    pub fn tx(&self) -> DirectionLimits {
        let [_, packets, _, bytes] = self.rows().map(|row| row.limit());
        DirectionLimits { packets, bytes }
    }

    fn rows(&self) -> [Row; 4] {
        let bytes = |size: Option<ByteSize>| size.map(ByteSize::bytes);
        [
            Row::new("pps-rx", self.pps_rx, self.pps_rx_max, self.pps_rx_max_length),
            Row::new("pps-tx", self.pps_tx, self.pps_tx_max, self.pps_tx_max_length),
            Row::new("bps-rx", bytes(self.bps_rx), bytes(self.bps_rx_max), self.bps_rx_max_length),
            Row::new("bps-tx", bytes(self.bps_tx), bytes(self.bps_tx_max), self.bps_tx_max_length),
        ]
    }
}

/// The text that reads back as the same limits.
impl fmt::Display for NetThrottleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Text::of(&self.rows()).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn throttle(text: &str) -> NetThrottleConfig {
        options::parse(text, None).unwrap()
    }

    #[test]
    fn text_and_limits() {
        let text = "pps-rx=1000,bps-tx=1M,bps-tx-max=8M,bps-tx-max-length=5,bps-rx=0";
        let config = throttle(text);
        config.validate().unwrap();
        let limit = |rate, burst_rate, burst_seconds| Some(Limit { rate, burst_rate, burst_seconds });
        assert_eq!(config.rx(), DirectionLimits { packets: limit(1000, 0, 1), bytes: None });
        assert_eq!(config.tx(), DirectionLimits { packets: None, bytes: limit(1 << 20, 8 << 20, 5) });
        assert_eq!(throttle(&config.to_string()), config);
        assert!(!config.is_empty() && throttle("").is_empty() && throttle("pps-tx=0").is_empty());
    }

    #[test]
    fn contradictions_are_refused() {
        use ThrottleError as E;
        for (text, error) in [
            ("bps-rx-max=1", E::BurstWithoutRate("bps-rx")),
            ("pps-tx=9,pps-tx-max=8", E::SlowBurst { name: "pps-tx", max: 8, rate: 9 }),
            ("pps-tx=9,pps-tx-max-length=8", E::LengthWithoutBurst("pps-tx")),
        ] {
            assert_eq!(throttle(text).validate(), Err(error), "{text}");
        }
        let error = options::parse::<NetThrottleConfig>("bps-rxx=1", None).unwrap_err().to_string();
        assert!(error.contains("did you mean 'bps-rx'"), "{error}");
    }
}
