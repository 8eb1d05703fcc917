//! What the device and its queues' threads share: the port, what the driver has asked for, which pairs are in use.
//!
//! ```text
//!   what the driver wants:  unknown --its control queue starts from the beginning--> known
//!                           known   --the same---------------------------------> known, as by a fresh driver
//!                           unknown --a control queue goes on----> unknown: its driver is asked to announce itself
//! ```
//!
//! *Unknown* is what a daemon finds whose predecessor died: it lets every frame through, on all pairs that have buffers.
//! Whether a driver starts or goes on is decided once after each SET_FEATURES, by where its rings start: rings are taken
//! away and given back at other times, too, and what is known must outlive that.
//!
//! Invariant: frames go to pair 0, and to those others whose receive queue runs and that the driver uses. As long as it is
//! not known which these are, they are those that the driver has given buffers: Linux enables all, and fills only some.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cleave_common::mac::MacAddress;
use rustix::event::{EventfdFlags, eventfd};
use tracing::{debug, warn};

use crate::checkpoint::Checkpoint;
use crate::config_space::{ConfigSpace, feature};
use crate::control::{CommandError, Settings};
use crate::counters::PairCounters;
use crate::filter::{Filter, LOOK_AT};
use crate::port::Port;

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) port: Arc<dyn Port>,
    pub(crate) max_pairs: u16,
    /// By pair.
    pub(crate) counters: Vec<PairCounters>,
    /// How long a queue's thread may look for work before it sleeps.
    pub(crate) poll: Duration,
    pub(crate) checkpoint: Checkpoint,
    state: Mutex<State>,
    /// Moves on when the filter changes.
    filter_version: AtomicU64,
    /// Readable when config space has changed.
    changed: OwnedFd,
    /// By pair: frames may go to it again.
    nudges: Vec<OwnedFd>,
}

#[derive(Debug)]
struct State {
    settings: Settings,
    /// Whether `settings` are the driver's, and not a guess.
    known: bool,
    /// The address the device has until the driver gives it another one.
    home: MacAddress,
    link_up: bool,
    features: u64,
    control_runs: bool,
    /// By pair: its receive queue runs.
    receives: Vec<bool>,
    /// By pair: its receive queue has had buffers since it runs.
    filled: Vec<bool>,
    /// Features were set, and the control queue has not started since: it may be another driver's.
    control_undecided: bool,
    /// The same of the first receive queue.
    receiver_undecided: bool,
}

fn unknown(mac: MacAddress) -> Settings {
    Settings { filter: Filter::unknown(mac), pairs: None, announce: false }
}

impl Shared {
    pub(crate) fn new(
        port: Arc<dyn Port>,
        mac: MacAddress,
        max_pairs: u16,
        poll: Duration,
        checkpoint: Checkpoint,
    ) -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let state = State {
            settings: unknown(mac),
            known: false,
            home: mac,
            link_up: port.link_is_up(),
            features: 0,
            control_runs: false,
            receives: vec![false; max_pairs.into()],
            filled: vec![false; max_pairs.into()],
            control_undecided: true,
            receiver_undecided: true,
        };
        let shared = Self {
            port,
            max_pairs,
            counters: (0..max_pairs).map(|_| PairCounters::default()).collect(),
            poll,
            checkpoint,
            state: Mutex::new(state),
            filter_version: AtomicU64::new(0),
            changed: event()?,
            nudges: (0..max_pairs).map(|_| event()).collect::<Result<_, _>>()?,
        };
        // Frames that come before there is a driver would wait where nobody may ever look.
        shared.attach(&shared.state());
        Ok(shared)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn features(&self) -> u64 {
        self.state().features
    }

    /// Of a driver; no queue runs.
    pub(crate) fn set_features(&self, features: u64) {
        let mut state = self.state();
        state.features = features;
        (state.control_undecided, state.receiver_undecided) = (true, true);
        if features & feature::CTRL_VQ == 0 {
            // Nobody will ever say anything.
            self.replace(&mut state, |home, _| unknown(home));
        }
    }

    /// Back to what it was before the first driver.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        (state.features, state.known) = (0, false);
        (state.control_undecided, state.receiver_undecided) = (true, true);
        self.replace(&mut state, |home, _| unknown(home));
    }

    /// The control queue runs from now on, from its beginning or not.
    pub(crate) fn control_starts(&self, is_fresh: bool) {
        let mut state = self.state();
        state.control_runs = true;
        if !std::mem::take(&mut state.control_undecided) {
            debug!("the control queue goes on");
        } else if is_fresh {
            state.known = true;
            self.replace(&mut state, |home, features| Settings {
                filter: Filter::fresh(home, features & feature::CTRL_VLAN != 0),
                pairs: Some(1),
                announce: false,
            });
        } else if !state.known && state.features & feature::GUEST_ANNOUNCE != 0 {
            debug!(
                "the driver's settings are not known: every frame passes, and it is asked to announce itself"
            );
            state.settings.announce = true;
            self.tell();
        }
        self.attach(&state);
    }

    pub(crate) fn control_stops(&self) {
        self.state().control_runs = false;
    }

    /// The receive queue of `pair` runs from now on, from its beginning or not.
    pub(crate) fn receiver_starts(&self, pair: u16, is_fresh: bool) {
        let mut state = self.state();
        let undecided = pair == 0 && std::mem::take(&mut state.receiver_undecided);
        if undecided && is_fresh && !state.control_runs {
            // Another driver than before, of which nothing is known until its control queue starts, if that is ours at all.
            state.known = false;
            self.replace(&mut state, |home, _| unknown(home));
        }
        state.receives[usize::from(pair)] = true;
        self.attach(&state);
    }

    pub(crate) fn receiver_stops(&self, pair: u16) {
        let mut state = self.state();
        state.receives[usize::from(pair)] = false;
        state.filled[usize::from(pair)] = false;
        self.attach(&state);
    }

    /// The driver has given the receive queue of `pair` buffers. Said once of each start.
    pub(crate) fn receiver_has_buffers(&self, pair: u16) {
        let mut state = self.state();
        state.filled[usize::from(pair)] = true;
        if state.settings.pairs.is_none() {
            self.attach(&state);
        }
    }

    fn replace(&self, state: &mut State, settings: impl FnOnce(MacAddress, u64) -> Settings) {
        let settings = settings(state.home, state.features);
        let told = (settings.filter.mac, settings.announce);
        if told != (state.settings.filter.mac, state.settings.announce) {
            self.tell();
        }
        state.settings = settings;
        self.filter_version.fetch_add(1, Ordering::Release);
    }

    /// Has frames go to the pairs that are in use.
    fn attach(&self, state: &State) {
        for pair in 0..self.max_pairs {
            let at = usize::from(pair);
            let in_use = state.settings.pairs.map_or(state.filled[at], |pairs| pair < pairs);
            if let Err(error) = self.port.set_active(pair, state.receives[at] && in_use) {
                warn!("frames do not go to pair {pair} as they should: {error}");
            }
            nudge(&self.nudges[usize::from(pair)]);
        }
    }

    /// Does what the driver has said on its control queue.
    pub(crate) fn command(&self, words: &[u8]) -> Result<(), CommandError> {
        let mut state = self.state();
        let (features, before) = (state.features, state.settings.clone());
        state.settings.apply(words, features, self.max_pairs)?;
        let after = &state.settings;
        if after.filter != before.filter {
            self.filter_version.fetch_add(1, Ordering::Release);
        }
        if (after.filter.mac, after.announce) != (before.filter.mac, before.announce) {
            self.tell();
        }
        if after.pairs != before.pairs {
            self.attach(&state);
        }
        Ok(())
    }

    /// The filter, if it is another one than that of `version`.
    fn newer_filter(&self, version: u64) -> Option<(u64, Filter)> {
        if self.filter_version.load(Ordering::Acquire) == version {
            return None;
        }
        Some(self.filter())
    }

    /// The filter and its version.
    fn filter(&self) -> (u64, Filter) {
        // Both change under this lock only.
        let state = self.state();
        (self.filter_version.load(Ordering::Acquire), state.settings.filter.clone())
    }

    pub(crate) fn config(&self) -> ConfigSpace {
        let state = self.state();
        ConfigSpace {
            mac: state.settings.filter.mac,
            link_up: state.link_up,
            announce: state.settings.announce,
            max_pairs: self.max_pairs,
            mtu: self.port.mtu(),
        }
    }

    /// As config space says it.
    pub(crate) fn link_is_up(&self) -> bool {
        self.state().link_up
    }

    fn tell(&self) {
        nudge(&self.changed);
    }

    /// Readable when config space may have changed; [`Shared::look_again`] empties it.
    pub(crate) fn changed_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    /// Whether it has changed, though perhaps back again.
    pub(crate) fn look_again(&self) -> bool {
        let told = rustix::io::read(&self.changed, &mut [0; 8]).is_ok();
        let up = self.port.link_is_up();
        let changed = std::mem::replace(&mut self.state().link_up, up) != up;
        if changed {
            debug!("the link is {}", if up { "up" } else { "down" });
        }
        told || changed
    }

    pub(crate) fn nudge_fd(&self, pair: u16) -> BorrowedFd<'_> {
        self.nudges[usize::from(pair)].as_fd()
    }
}

/// The filter as one queue knows it.
#[derive(Debug)]
pub(crate) struct CurrentFilter {
    version: u64,
    filter: Filter,
}

impl CurrentFilter {
    pub(crate) fn of(shared: &Shared) -> Self {
        let (version, filter) = shared.filter();
        Self { version, filter }
    }

    /// Whether the guest wants a frame, whose first bytes `read` puts somewhere, and says how many they are.
    pub(crate) fn passes(&mut self, shared: &Shared, read: impl FnOnce(&mut [u8]) -> usize) -> bool {
        if let Some((version, filter)) = shared.newer_filter(self.version) {
            *self = Self { version, filter };
        }
        if self.filter.promisc {
            return true;
        }
        let mut start = [0; LOOK_AT];
        let len = read(&mut start);
        self.filter.passes(&start[..len])
    }
}

fn nudge(event: &OwnedFd) {
    // A counter that is full is readable all the same.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
