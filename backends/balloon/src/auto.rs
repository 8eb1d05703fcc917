//! The automatic mode: how much memory a guest should have, from what it says of it and how the host fares.
//!
//! The guest is to have `free` bytes available. It gets what it lacks at once, for its next step may be to swap or to kill;
//! what it has too much is taken in steps, since its page cache is among it. Around the mark nothing is done: a balloon that
//! follows every breath of a guest costs more than it brings. When tasks of the host wait for memory, half the mark has to do.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use cleave_common::size::ByteSize;
use serde::Deserialize;

/// `--auto free=SIZE[,min=SIZE]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct AutoConfig {
    /// What the guest is to have available.
    pub(crate) free: ByteSize,
    /// What it is left in any case; that of `--min` unless given.
    pub(crate) min: Option<ByteSize>,
}

/// Between two looks, unless statistics are asked for at other times.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);

/// Share of time in which some task waited for memory, over 10 s, from which on the host is short of it.
const PRESSURE: f64 = 5.0;

/// What a decision is made from. All in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// What the guest has when the balloon is empty.
    pub(crate) memory: u64,
    /// What it has with the balloon as it is.
    pub(crate) present: u64,
    pub(crate) available: u64,
    /// In percent; `None` where the host does not say.
    pub(crate) pressure: Option<f64>,
}

/// What the guest should have from now on; `None` is what it has.
pub(crate) fn next_target(config: &AutoConfig, seen: Seen) -> Option<u64> {
    let pressed = seen.pressure.is_some_and(|percent| percent >= PRESSURE);
    let mark = if pressed { config.free.bytes() / 2 } else { config.free.bytes() };
    let calm = mark / 4;
    if seen.available < mark - calm {
        return Some((seen.present + (mark - seen.available)).min(seen.memory))
            .filter(|next| *next != seen.present);
    }
    if seen.available > mark + calm {
        let step = (seen.memory / if pressed { 4 } else { 8 }).max(1);
        return Some(seen.present.saturating_sub((seen.available - mark).min(step)));
    }
    None
}

/// The host's word on how its tasks wait for memory (PSI).
#[derive(Debug)]
pub(crate) struct Pressure(Option<File>);

impl Pressure {
    /// Call it before files are out of reach.
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/pressure/memory").map(|file| Self(Some(file)))
    }

    pub(crate) fn unknown() -> Self {
        Self(None)
    }

    /// In percent of the last 10 s.
    pub(crate) fn now(&self) -> Option<f64> {
        let mut text = [0; 256];
        let read = self.0.as_ref()?.read_at(&mut text, 0).ok()?;
        some_avg10(std::str::from_utf8(&text[..read]).ok()?)
    }
}

fn some_avg10(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split(' ').find_map(|field| field.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn next(present: u64, available: u64, pressure: f64) -> Option<u64> {
        let config = AutoConfig { free: ByteSize(128 * MIB), min: None };
        let seen = Seen {
            memory: 2048 * MIB,
            present: present * MIB,
            available: available * MIB,
            pressure: Some(pressure),
        };
        next_target(&config, seen).map(|bytes| bytes / MIB)
    }

    #[test]
    fn a_guest_gets_what_it_lacks_at_once_and_gives_in_steps() {
        assert_eq!(next(1024, 28, 0.0), Some(1124));
        assert_eq!(next(2048, 28, 0.0), None, "there is no more");
        assert_eq!(next(2000, 28, 0.0), Some(2048));
        assert_eq!(next(1024, 428, 0.0), Some(1024 - 256));
        assert_eq!(next(1024, 200, 0.0), Some(1024 - 72));
        for calm in [100, 128, 155] {
            assert_eq!(next(1024, calm, 0.0), None);
        }
    }

    #[test]
    fn under_pressure_half_has_to_do_and_steps_are_larger() {
        assert_eq!(next(1024, 128, 20.0), Some(1024 - 64));
        assert_eq!(next(2048, 1800, 20.0), Some(2048 - 512));
        assert_eq!(next(1024, 20, 20.0), Some(1024 + 44), "what is lacking is given all the same");
    }

    #[test]
    fn pressure_is_read_as_the_kernel_writes_it() {
        let text = "some avg10=3.25 avg60=1.00 avg300=0.10 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(some_avg10(text), Some(3.25));
        assert_eq!(some_avg10("full avg10=1.00"), None);
        assert_eq!(Pressure::unknown().now(), None);
    }
}
