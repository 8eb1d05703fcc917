//! Which queue is for what.
//!
//! The specification gives each queue a number of its own: inflate 0, deflate 1, statistics 2, hinting 3, reporting 4
//! (virtio 1.2, 5.5.2). Linux, until it was changed in 2024, and QEMU leave out the queues of features that were not
//! acknowledged, so that those behind move up. Both numberings are understood: where they differ, at most one of them has a
//! queue of that number, but in one case.

use crate::config_space::feature;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

impl Role {
    pub(crate) const ALL: [Self; 5] =
        [Self::Inflate, Self::Deflate, Self::Statistics, Self::Hinting, Self::Reporting];

    /// Its queue exists with these features.
    fn exists(self, features: u64) -> bool {
        let needed = match self {
            Self::Inflate | Self::Deflate => 0,
            Self::Statistics => feature::STATS_VQ,
            Self::Hinting => feature::FREE_PAGE_HINT,
            Self::Reporting => feature::REPORTING,
        };
        features & needed == needed
    }

    /// A thread's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Inflate => "inflate",
            Self::Deflate => "deflate",
            Self::Statistics => "statistics",
            Self::Hinting => "hinting",
            Self::Reporting => "reporting",
        }
    }
}

/// What queue `index` is for, to the driver with these features; `runs` says whether a queue of another index runs already.
pub(crate) fn role(index: u16, features: u64, runs: impl Fn(u16) -> bool) -> Option<Role> {
    let index = usize::from(index);
    let by_number = Role::ALL.get(index).copied().filter(|role| role.exists(features));
    let by_place = Role::ALL.into_iter().filter(|role| role.exists(features)).nth(index);
    match (by_number, by_place) {
        (Some(by_number), Some(by_place)) if by_number != by_place => {
            // Without statistics, queue 3 is hinting or reporting. Only who leaves out queues has a queue 2 then, and starts
            // it first.
            Some(if runs(2) { by_place } else { by_number })
        }
        (by_number, by_place) => by_number.or(by_place),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHERS: [u64; 3] = [feature::STATS_VQ, feature::FREE_PAGE_HINT, feature::REPORTING];

    /// The roles of a driver that starts the queues of these indices, in their order.
    fn start(features: u64, indices: &[u16]) -> Vec<Option<Role>> {
        let mut running: Vec<u16> = Vec::new();
        let mut roles = Vec::new();
        for index in indices {
            roles.push(role(*index, features, |other| running.contains(&other)));
            running.push(*index);
        }
        roles
    }

    #[test]
    fn both_numberings_are_understood_whatever_the_driver_acknowledges() {
        for chosen in 0..8 {
            let features =
                (0..3).filter(|bit| chosen & 1 << bit != 0).map(|bit| OTHERS[bit]).fold(0, |a, b| a | b);
            let wanted: Vec<Role> = Role::ALL.into_iter().filter(|role| role.exists(features)).collect();
            let by_number: Vec<u16> =
                wanted.iter().map(|role| Role::ALL.iter().position(|r| r == role).unwrap() as u16).collect();
            let by_place: Vec<u16> = (0..wanted.len() as u16).collect();
            let wanted: Vec<Option<Role>> = wanted.into_iter().map(Some).collect();
            assert_eq!(start(features, &by_number), wanted, "{features:#x} as in the specification");
            assert_eq!(start(features, &by_place), wanted, "{features:#x} as in Linux");
        }
    }

    #[test]
    fn a_queue_of_a_feature_that_is_not_there_is_none() {
        assert_eq!(start(0, &[2, 3, 4]), [None; 3]);
        assert_eq!(start(u64::MAX, &[5]), [None]);
    }
}
