//! What the device, its queues' threads and the control socket share: what is asked of the guest, and what it says.
//!
//! ```text
//!   target (control socket, automatic mode) ──> num_pages in config space ──> the guest inflates or deflates
//!                                   actual in config space <── the guest
//! ```
//!
//! Invariants: what is asked of the guest is what [`Shared::config`] says, and it changes only with a word to the frontend;
//! each change that a successor has to know is kept before it has an effect; the two locks are never held together.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cleave_common::size::ByteSize;
use rustix::event::{EventfdFlags, eventfd};
use tracing::{info, warn};

use crate::auto::{self, AutoConfig, Pressure, Seen};
use crate::config_space::{ConfigSpace, PAGE, feature};
use crate::counters::Counters;
use crate::hints::Hints;
use crate::host::{Host, Outcome};
use crate::state::{Keeper, Kept};
use crate::stats::Statistics;

/// How the daemon was started.
#[derive(Debug)]
pub(crate) struct Options {
    /// Bytes that a guest is left in any case.
    pub(crate) min: u64,
    /// What it is to have at first; all if absent.
    pub(crate) target: Option<u64>,
    pub(crate) interval: Option<Duration>,
    pub(crate) auto: Option<AutoConfig>,
    pub(crate) pressure: Pressure,
    pub(crate) keeper: Keeper,
}

#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    host: Mutex<Host>,
    pub(crate) counters: Counters,
    min: u64,
    auto: Option<AutoConfig>,
    pressure: Pressure,
    keeper: Keeper,
    /// Readable when config space may have changed.
    changed: OwnedFd,
    /// Readable when the thread of the statistics has something to do.
    ask: OwnedFd,
}

#[derive(Debug)]
struct State {
    kept: Kept,
    features: u64,
    actual: u32,
    poison_val: u32,
    hints: Hints,
    /// What config space said when the frontend was told last.
    told: ConfigSpace,
    statistics: Option<(Statistics, Instant)>,
    /// Somebody wants new ones.
    asked: bool,
}

/// What became of a wish for the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Bytes that the guest is to have; `None`: all, or not known before there is a guest.
    pub(crate) size: Option<u64>,
    /// Why it is another size than was asked for.
    pub(crate) because: Option<String>,
}

/// How the balloon is.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) kept: Kept,
    pub(crate) features: u64,
    pub(crate) config: ConfigSpace,
    pub(crate) statistics: Option<(Statistics, Duration)>,
}

impl Shared {
    pub(crate) fn new(options: Options) -> io::Result<Self> {
        let Options { min, target, interval, auto, pressure, keeper } = options;
        let auto_interval = auto.as_ref().map(|_| auto::INTERVAL);
        let interval = interval.or(auto_interval).unwrap_or_default();
        let kept = keeper.load().unwrap_or_else(|| Kept {
            target,
            interval_ms: interval.as_millis() as u64,
            auto: auto.is_some(),
            ..Kept::default()
        });
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let host = Mutex::new(Host::new(kept.inhibited));
        let mut state = State {
            kept,
            features: 0,
            actual: 0,
            poison_val: 0,
            hints: Hints::default(),
            told: ConfigSpace::default(),
            statistics: None,
            asked: false,
        };
        state.told = state.config(min);
        let (changed, ask) = (event()?, event()?);
        let counters = Counters::default();
        Ok(Self { state: Mutex::new(state), host, counters, min, auto, pressure, keeper, changed, ask })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn features(&self) -> u64 {
        self.state().features
    }

    pub(crate) fn config(&self) -> ConfigSpace {
        self.state().config(self.min)
    }

    /// Of a driver, which may be another one than before; no queue runs.
    pub(crate) fn set_features(&self, features: u64) {
        self.host().forget();
        let mut state = self.state();
        state.features = features;
        state.statistics = None;
    }

    /// Back to what it was before the first driver. What was asked for stays.
    pub(crate) fn reset(&self) {
        self.host().forget();
        let mut state = self.state();
        (state.features, state.actual, state.poison_val) = (0, 0, 0);
        state.hints = Hints::default();
        state.statistics = None;
    }

    /// The guest has `memory` bytes, now that its frontend has shared them.
    pub(crate) fn set_memory(&self, memory: u64) {
        let mut state = self.state();
        if state.kept.memory != memory {
            state.kept.memory = memory;
            self.keeper.save(&state.kept);
            if let Some(reason) = state.clamped(self.min).1 {
                warn!("the guest's target: {reason}");
            }
            self.tell();
        }
    }

    pub(crate) fn set_actual(&self, actual: u32) {
        self.state().actual = actual;
    }

    pub(crate) fn set_poison(&self, poison_val: u32) {
        self.state().poison_val = poison_val;
    }

    /// Whether free pages have to keep what they are filled with, and that is not zeros.
    pub(crate) fn is_poisoned(&self) -> bool {
        let state = self.state();
        state.features & feature::PAGE_POISON != 0 && state.poison_val != 0
    }

    /// What the guest is to have from now on; the automatic mode, if it runs, has no say any more.
    pub(crate) fn set_target(&self, target: Option<u64>) -> Target {
        let mut state = self.state();
        state.kept.auto = false;
        self.put_target(&mut state, target)
    }

    fn put_target(&self, state: &mut State, target: Option<u64>) -> Target {
        state.kept.target = target;
        self.keeper.save(&state.kept);
        self.tell();
        let (size, because) = state.clamped(self.min);
        Target { size, because }
    }

    pub(crate) fn set_interval(&self, interval: Duration) {
        let mut state = self.state();
        state.kept.interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        self.keeper.save(&state.kept);
        nudge(&self.ask);
    }

    /// `false`: there is no mark to keep to.
    pub(crate) fn set_auto(&self, on: bool) -> bool {
        if on && self.auto.is_none() {
            return false;
        }
        let mut state = self.state();
        state.kept.auto = on;
        if on && state.kept.interval_ms == 0 {
            state.kept.interval_ms = auto::INTERVAL.as_millis() as u64;
        }
        self.keeper.save(&state.kept);
        nudge(&self.ask);
        true
    }

    /// When this returns nothing is being given back, or all is that was kept meanwhile.
    pub(crate) fn set_inhibited(&self, inhibited: bool) -> Outcome {
        let kept = {
            let mut state = self.state();
            state.kept.inhibited = inhibited;
            state.kept.clone()
        };
        self.keeper.save(&kept);
        let mut outcome = Outcome::default();
        self.host().set_inhibited(inhibited, &mut outcome);
        self.counters.inflated(&outcome);
        outcome
    }

    /// What the guest says of itself. The automatic mode draws its conclusions.
    pub(crate) fn set_statistics(&self, statistics: Statistics) {
        let mut state = self.state();
        if let (true, Some(config), Some(available)) = (state.kept.auto, &self.auto, statistics.available()) {
            let floor = config.min.map_or(self.min, ByteSize::bytes);
            let present = state.kept.memory.saturating_sub(u64::from(state.actual) * PAGE);
            let seen = Seen { memory: state.kept.memory, present, available, pressure: self.pressure.now() };
            let next = auto::next_target(config, seen).map(|next| next.max(floor).min(seen.memory));
            if let Some(next) = next.filter(|next| Some(*next) != state.kept.target) {
                info!(
                    "automatic: the guest has {} available, and is to have {} of memory",
                    Mib(available),
                    Mib(next)
                );
                self.put_target(&mut state, Some(next));
            }
        }
        state.statistics = Some((statistics, Instant::now()));
    }

    /// Asks the guest for new statistics.
    pub(crate) fn ask(&self) {
        self.state().asked = true;
        nudge(&self.ask);
    }

    /// Whether somebody has, once.
    pub(crate) fn take_asked(&self) -> bool {
        std::mem::take(&mut self.state().asked)
    }

    pub(crate) fn interval(&self) -> Option<Duration> {
        self.state().kept.interval()
    }

    pub(crate) fn ask_fd(&self) -> BorrowedFd<'_> {
        self.ask.as_fd()
    }

    /// Does something to the hints; the frontend is told if that changes config space.
    pub(crate) fn with_hints<R>(&self, change: impl FnOnce(&mut Hints) -> R) -> R {
        let mut state = self.state();
        let result = change(&mut state.hints);
        if state.config(self.min) != state.told {
            self.tell();
        }
        result
    }

    pub(crate) fn status(&self) -> Status {
        let state = self.state();
        Status {
            kept: state.kept.clone(),
            features: state.features,
            config: state.config(self.min),
            statistics: state.statistics.as_ref().map(|(said, at)| (said.clone(), at.elapsed())),
        }
    }

    fn tell(&self) {
        nudge(&self.changed);
    }

    pub(crate) fn changed_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    /// Empties [`Shared::changed_fd`]. Whether there is something that the driver does not know.
    pub(crate) fn take_change(&self) -> bool {
        let _ = rustix::io::read(&self.changed, &mut [0; 8]);
        let mut state = self.state();
        let now = state.config(self.min);
        let of_ours = |config: ConfigSpace| (config.num_pages, config.free_page_hint_cmd_id);
        let before = std::mem::replace(&mut state.told, now);
        of_ours(before) != of_ours(now)
    }
}

impl State {
    /// What the guest is to have, and why that is not what was asked for.
    fn clamped(&self, min: u64) -> (Option<u64>, Option<String>) {
        let (Some(target), memory @ 1..) = (self.kept.target, self.kept.memory) else {
            return (self.kept.target, None);
        };
        let min = min.min(memory);
        let because = if target > memory {
            format!("{} is more than all of its memory, which it gets: {}", Mib(target), Mib(memory))
        } else if target < min {
            format!("{} is too little to live with: it is left {} (--min)", Mib(target), Mib(min))
        } else {
            return (Some(target), None);
        };
        (Some(target.clamp(min, memory)), Some(because))
    }

    fn config(&self, min: u64) -> ConfigSpace {
        let target = self.clamped(min).0.unwrap_or(self.kept.memory);
        let pages = self.kept.memory.saturating_sub(target) / PAGE;
        ConfigSpace {
            num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
            actual: self.actual,
            free_page_hint_cmd_id: self.hints.command(),
            poison_val: self.poison_val,
        }
    }
}

/// Bytes for people.
pub(crate) struct Mib(pub(crate) u64);

impl std::fmt::Display for Mib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

fn nudge(event: &OwnedFd) {
    // A counter that is full is readable all the same.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
