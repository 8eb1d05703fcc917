//! What the device, its queues' threads and the control socket share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use cleave_scsi::{Nexus, Reset, Restart, State};
use cleave_storage::Nudges;
use tracing::{info, warn};

use crate::address::Address;
use crate::bus::Bus;
use crate::config_space::Sizes;
use crate::events::Events;
use crate::gate::{Gate, Started};
use crate::orders::{Mailboxes, Order};
use crate::state_file::{Saved, StateFile};

/// The initiator's name (NAA, locally assigned) unless another one is given.
pub(crate) const INITIATOR: Nexus = Nexus(0x3c6c_6561_7665_0001);

/// What one queue's thread has to do and has done. It alone writes here, so that no two threads' writes meet in a cache
/// line.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Counts {
    in_flight: AtomicU64,
    served: AtomicU64,
}

impl Counts {
    pub(crate) fn set(&self, in_flight: usize, served: u64) {
        self.in_flight.store(in_flight as u64, Ordering::Relaxed);
        self.served.store(served, Ordering::Relaxed);
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

pub(crate) struct Controller {
    bus: RwLock<Bus>,
    pub(crate) nexus: Nexus,
    pub(crate) sizes: Sizes,
    /// How long a queue's thread may look for work before it sleeps.
    pub(crate) poll: Duration,
    pub(crate) mail: Mailboxes,
    pub(crate) nudges: Arc<Nudges>,
    pub(crate) events: Events,
    state: Mutex<StateFile>,
    /// What there is to go on with, until it is known whether the driver does.
    predecessor: Mutex<Option<Predecessor>>,
    unsaved: AtomicBool,
    counts: Vec<Counts>,
}

/// What a predecessor of this process has left, with the units as they were then.
pub(crate) struct Predecessor {
    pub(crate) bus: Bus,
    pub(crate) saved: Saved,
}

impl Controller {
    pub(crate) fn new(
        bus: Bus,
        predecessor: Option<Predecessor>,
        state: StateFile,
        nexus: Nexus,
        nudges: Arc<Nudges>,
        (queues, poll): (u16, Duration),
    ) -> std::io::Result<Self> {
        Ok(Self {
            bus: RwLock::new(bus),
            nexus,
            sizes: Sizes::default(),
            poll,
            mail: Mailboxes::new(queues, nudges.clone()),
            nudges,
            events: Events::new()?,
            state: Mutex::new(state),
            predecessor: Mutex::new(predecessor),
            unsaved: AtomicBool::new(false),
            counts: (0..queues).map(|_| Counts::default()).collect(),
        })
    }

    pub(crate) fn bus(&self) -> RwLockReadGuard<'_, Bus> {
        self.bus.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bus_mut(&self) -> RwLockWriteGuard<'_, Bus> {
        self.bus.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn predecessor(&self) -> MutexGuard<'_, Option<Predecessor>> {
        self.predecessor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is known which units there are: not while a predecessor's state waits for the driver.
    pub(crate) fn is_settled(&self) -> bool {
        self.predecessor().is_none()
    }

    pub(crate) fn counts(&self, queue: u16) -> &Counts {
        &self.counts[usize::from(queue)]
    }

    /// For a person.
    pub(crate) fn report(&self) -> String {
        let sum = |count: fn(&Counts) -> &AtomicU64| -> u64 {
            self.counts.iter().map(|counts| count(counts).load(Ordering::Relaxed)).sum()
        };
        format!(
            "{} units; {} requests are in flight; {} were served",
            self.bus().slots().count(),
            sum(|counts| &counts.in_flight),
            sum(|counts| &counts.served)
        )
    }

    /// Tasks that a gate has let through.
    pub(crate) fn run_started(&self, gate: &Gate, mut started: Started) {
        while let Some((queue, head)) = started.pop() {
            if !self.mail.post(queue, Order::Run(head)) {
                // Its queue has stopped meanwhile, and it with it.
                started.extend(gate.leave());
            }
        }
    }

    /// The initiator has taken the medium out.
    ///
    /// # Errors
    /// That cannot be kept.
    pub(crate) fn ejected(&self, address: Address) -> std::io::Result<()> {
        // A unit that is gone needs nothing.
        let _ = self.bus_mut().unit_and_image(address, |unit, loaded| {
            if !unit.has_medium() {
                *loaded = None;
            }
        });
        self.mail.post_all(|| Order::Look);
        self.save()
    }

    /// The driver starts its first request queue: it goes on where it was, or has just set the device up.
    pub(crate) fn driver_starts(&self, continues: bool) {
        let predecessor = self.predecessor().take();
        let restart = if continues { Restart::Successor } else { Restart::PowerOn };
        if let Some(Predecessor { bus, saved }) = predecessor {
            let mut current = self.bus_mut();
            if continues {
                *current = bus;
            }
            for (address, state) in saved.units() {
                restore(&mut current, address, state, restart);
            }
            info!("the driver {}", if continues { "goes on where it was" } else { "starts anew" });
        }
        if continues {
            return self.bus().each_unit(|_, unit| unit.introduce(self.nexus));
        }
        self.events.forget();
        self.bus().each_unit(|_, unit| unit.reset(Reset::Hard));
        // What an earlier driver has left is not for this one's successors.
        if let Err(error) = self.keep() {
            warn!("--state: what an earlier driver has left is still there: {error}");
        }
    }

    /// Keeps what a successor has to know, before an answer goes out that says it is so.
    ///
    /// # Errors
    /// It cannot be kept.
    pub(crate) fn save(&self) -> std::io::Result<()> {
        let kept = self.keep()?;
        if !kept && !self.unsaved.swap(true, Ordering::Relaxed) {
            warn!(
                "what the guest and the control socket change of units is not kept over a restart of this daemon: --state says where to keep it"
            );
        }
        Ok(())
    }

    /// `false`: there is no file for it.
    fn keep(&self) -> std::io::Result<bool> {
        let mut file = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if file.is_there() {
            let saved = Saved::of(&self.bus());
            file.write(&saved)?;
        }
        Ok(file.is_there())
    }
}

fn restore(bus: &mut Bus, address: Address, state: State, restart: Restart) {
    let restored = bus.unit_and_image(address, |unit, loaded| {
        let restored = unit.restore(state, restart);
        if !unit.has_medium() {
            *loaded = None;
        }
        restored
    });
    match restored {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!("the state of unit {address} is left out: {error}"),
        Err(_) => info!("the state of unit {address} is left out: there is no such unit"),
    }
}
