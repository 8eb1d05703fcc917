//! What has been given back since the daemon started, in bytes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::host::Outcome;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    inflated: AtomicU64,
    reported: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Counts {
    /// As the guest put it in the balloon.
    pub(crate) given_back_by_inflation: u64,
    /// As the guest reported it free.
    pub(crate) given_back_by_reporting: u64,
    /// Named by the guest, and no memory or none that it may name.
    pub(crate) refused: u64,
}

impl Counters {
    pub(crate) fn inflated(&self, outcome: &Outcome) {
        self.inflated.fetch_add(outcome.given_back, Ordering::Relaxed);
        self.refused.fetch_add(outcome.refused, Ordering::Relaxed);
    }

    pub(crate) fn reported(&self, outcome: &Outcome) {
        self.reported.fetch_add(outcome.given_back, Ordering::Relaxed);
        self.refused.fetch_add(outcome.refused, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            given_back_by_inflation: self.inflated.load(Ordering::Relaxed),
            given_back_by_reporting: self.reported.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [inflated, reported, refused] =
            [self.given_back_by_inflation, self.given_back_by_reporting, self.refused]
                .map(|bytes| bytes >> 10);
        write!(
            f,
            "given back {inflated} KiB by inflation, {reported} KiB by reporting; refused {refused} KiB"
        )
    }
}
