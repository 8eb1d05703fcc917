//! Rate limits of a disk, under the names and with the meaning that QEMU's `throttling.` options have; and of a network
//! device, after their pattern; and the buckets that keep them.

mod bucket;
mod network;

use std::fmt;

use serde::Deserialize;

use crate::size::ByteSize;
pub use bucket::{Bucket, NANO};
pub use network::{DirectionLimits, NetThrottleConfig};

/// Upper bound of every rate, as in QEMU: sums of such numbers, in billionths, fit into 128 bits for years.
const MAX_RATE: u64 = 1_000_000_000_000_000;

/// Limits as given. A rate that is absent, or 0, is no limit.
///
/// Rates are requests (`iops-`) or bytes (`bps-`) a second. `-max` is the rate of a burst; it may last `-max-length`
/// seconds (1 unless given). With `iops-size`, a request of more bytes counts as several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    deny_unknown_fields,
    default,
    expecting = "a table of limits, as in { iops-total = 500 }"
)]
pub struct ThrottleConfig {
    pub iops_total: Option<u64>,
    pub iops_read: Option<u64>,
    pub iops_write: Option<u64>,
    pub bps_total: Option<ByteSize>,
    pub bps_read: Option<ByteSize>,
    pub bps_write: Option<ByteSize>,
    pub iops_total_max: Option<u64>,
    pub iops_read_max: Option<u64>,
    pub iops_write_max: Option<u64>,
    pub bps_total_max: Option<ByteSize>,
    pub bps_read_max: Option<ByteSize>,
    pub bps_write_max: Option<ByteSize>,
    pub iops_total_max_length: Option<u64>,
    pub iops_read_max_length: Option<u64>,
    pub iops_write_max_length: Option<u64>,
    pub bps_total_max_length: Option<u64>,
    pub bps_read_max_length: Option<u64>,
    pub bps_write_max_length: Option<u64>,
    pub iops_size: Option<ByteSize>,
}

/// Limits that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ThrottleError {
    #[error("{0}-total cannot be given together with {0}-read or {0}-write: leave one of them out")]
    TotalAndPart(&'static str),
    #[error("{0}-max needs a rate for when the burst is over: give {0} too")]
    BurstWithoutRate(&'static str),
    #[error("{name}-max={max} is less than {name}={rate}: a burst is faster than the rate")]
    SlowBurst { name: &'static str, max: u64, rate: u64 },
    #[error("{0}-max-length is how long a burst may last: give {0}-max too, and at least 1 second")]
    LengthWithoutBurst(&'static str),
    #[error("{name}: {value} is more than {MAX_RATE}")]
    TooLarge { name: &'static str, value: u64 },
    #[error("iops-size says what counts as one request: give an iops limit too")]
    SizeWithoutIops,
}

/// One limit: so many units a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Units a second; not 0.
    pub rate: u64,
    /// Units a second during a burst; 0 if there are none.
    pub burst_rate: u64,
    /// Seconds; at least 1.
    pub burst_seconds: u64,
}

/// The limits of one kind of unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub total: Option<Limit>,
    pub read: Option<Limit>,
    pub write: Option<Limit>,
}

struct Row {
    name: &'static str,
    rate: Option<u64>,
    max: Option<u64>,
    length: Option<u64>,
}

impl ThrottleConfig {
    /// Whether there is no limit at all.
    pub fn is_empty(&self) -> bool {
        self.rows().iter().all(|row| row.limit().is_none())
    }

    /// # Errors
    /// The limits contradict each other: the first thing found.
    pub fn validate(&self) -> Result<(), ThrottleError> {
        let rows = self.rows();
        rows.iter().try_for_each(Row::validate)?;
        for (name, rows) in [("iops", &rows[..3]), ("bps", &rows[3..])] {
            let given = |row: &Row| row.rate.unwrap_or(0) != 0;
            if given(&rows[0]) && (given(&rows[1]) || given(&rows[2])) {
                return Err(ThrottleError::TotalAndPart(name));
            }
        }
        if self.iops_size() != 0 && rows[..3].iter().all(|row| row.limit().is_none()) {
            return Err(ThrottleError::SizeWithoutIops);
        }
        Ok(())
    }

    /// Limits of requests.
    pub fn iops(&self) -> Limits {
        let [total, read, write, ..] = self.rows().map(|row| row.limit());
        Limits { total, read, write }
    }

    /// Limits of bytes.
    pub fn bps(&self) -> Limits {
        let [.., total, read, write] = self.rows().map(|row| row.limit());
        Limits { total, read, write }
    }

    /// Bytes past which a request counts as several; 0 if none does.
    pub fn iops_size(&self) -> u64 {
        self.iops_size.map_or(0, ByteSize::bytes)
    }

    fn rows(&self) -> [Row; 6] {
        let bytes = |size: Option<ByteSize>| size.map(ByteSize::bytes);
        let row = Row::new;
        [
            row("iops-total", self.iops_total, self.iops_total_max, self.iops_total_max_length),
            row("iops-read", self.iops_read, self.iops_read_max, self.iops_read_max_length),
            row("iops-write", self.iops_write, self.iops_write_max, self.iops_write_max_length),
            row("bps-total", bytes(self.bps_total), bytes(self.bps_total_max), self.bps_total_max_length),
            row("bps-read", bytes(self.bps_read), bytes(self.bps_read_max), self.bps_read_max_length),
            row("bps-write", bytes(self.bps_write), bytes(self.bps_write_max), self.bps_write_max_length),
        ]
    }
}

impl Row {
    fn new(name: &'static str, rate: Option<u64>, max: Option<u64>, length: Option<u64>) -> Self {
        Self { name, rate, max, length }
    }

    fn limit(&self) -> Option<Limit> {
        let rate = self.rate.filter(|rate| *rate != 0)?;
        let (burst_rate, burst_seconds) = (self.max.unwrap_or(0), self.length.unwrap_or(1));
        Some(Limit { rate, burst_rate, burst_seconds })
    }

    fn validate(&self) -> Result<(), ThrottleError> {
        let name = self.name;
        let (rate, max) = (self.rate.unwrap_or(0), self.max.unwrap_or(0));
        if let Some(value) = [self.rate, self.max, self.length].into_iter().flatten().find(|v| *v > MAX_RATE)
        {
            return Err(ThrottleError::TooLarge { name, value });
        }
        if max != 0 && rate == 0 {
            return Err(ThrottleError::BurstWithoutRate(name));
        }
        if max != 0 && max < rate {
            return Err(ThrottleError::SlowBurst { name, max, rate });
        }
        match self.length {
            Some(length) if length == 0 || max == 0 => Err(ThrottleError::LengthWithoutBurst(name)),
            _ => Ok(()),
        }
    }
}

/// The text that reads back as the same limits.
impl fmt::Display for ThrottleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Text::of(&self.rows());
        text.put("iops-size", "", self.iops_size.map(ByteSize::bytes));
        f.write_str(&text.0)
    }
}

/// `key=value,key=value` for what is given.
struct Text(String);

impl Text {
    fn of(rows: &[Row]) -> Self {
        let mut text = Self(String::new());
        for Row { name, rate, max, length } in rows {
            text.put(name, "", *rate);
            text.put(name, "-max", *max);
            text.put(name, "-max-length", *length);
        }
        text
    }

    fn put(&mut self, key: &str, ending: &str, value: Option<u64>) {
        if let Some(value) = value {
            let separator = if self.0.is_empty() { "" } else { "," };
            self.0 += &format!("{separator}{key}{ending}={value}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn throttle(text: &str) -> ThrottleConfig {
        options::parse(text, None).unwrap()
    }

    #[test]
    fn text_and_limits() {
        let text = "iops-read=100,iops-read-max=500,iops-read-max-length=10,iops-write=7,bps-total=10M,iops-size=64k";
        let config = throttle(text);
        config.validate().unwrap();
        assert!(!config.is_empty());
        let limit = |rate, burst_rate, burst_seconds| Some(Limit { rate, burst_rate, burst_seconds });
        let iops = Limits { total: None, read: limit(100, 500, 10), write: limit(7, 0, 1) };
        assert_eq!(config.iops(), iops);
        assert_eq!(config.bps(), Limits { total: limit(10 << 20, 0, 1), ..Limits::default() });
        assert_eq!(config.iops_size(), 65536);
        assert_eq!(throttle(&config.to_string()), config);
        assert!(throttle("").is_empty() && throttle("iops-total=0").is_empty());
    }

    #[test]
    fn contradictions_are_refused() {
        use ThrottleError as E;
        for (text, error) in [
            ("iops-total=1,iops-write=1", E::TotalAndPart("iops")),
            ("bps-total=1,bps-read=1", E::TotalAndPart("bps")),
            ("bps-read-max=1", E::BurstWithoutRate("bps-read")),
            ("iops-total=9,iops-total-max=8", E::SlowBurst { name: "iops-total", max: 8, rate: 9 }),
            ("iops-total=9,iops-total-max-length=8", E::LengthWithoutBurst("iops-total")),
            ("iops-total=9,iops-total-max=9,iops-total-max-length=0", E::LengthWithoutBurst("iops-total")),
            ("iops-read=1000000000000001", E::TooLarge { name: "iops-read", value: 1_000_000_000_000_001 }),
            ("iops-size=4k,bps-total=1", E::SizeWithoutIops),
        ] {
            assert_eq!(throttle(text).validate(), Err(error), "{text}");
        }
        throttle("iops-total=1,bps-read=1,bps-write=2").validate().unwrap();
        assert!(options::parse::<ThrottleConfig>("iops-totl=1", None).is_err());
    }
}
